"""A pretended CUDA device, for a torch built without CUDA: the CPU's memory under a GPU's name.

Its tensors are torch's own, of device type "cuda" and with real storages, so views, writes in place and all that
torch, transformers or we decide by a tensor's device are as on a GPU. What reaches a kernel is computed by the CPU's on
the very same memory, and raises, as CUDA's kernels do, where tensors of several devices meet. Gradients can't be had.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils.dlpack import DLDeviceType

from cuda_kernels import KERNELS

aten = torch.ops.aten
CPU_KERNEL = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
HOME = torch.device("cpu")
COPIES = {aten.copy_, aten._copy_from}
INDEXED = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
# Beside pointwise operations, these take a number that is a tensor on the CPU.
NUMBERED = {aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_, aten.index_fill, aten.index_fill_} | INDEXED

_LIBRARY = Path(torch.__file__).parent / "lib" / "libc10.so"
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def can_pretend() -> bool:
    """Whether torch has no CUDA kernels of its own, and what we need instead."""
    has_kernels = torch._C._dispatch_has_kernel_for_dispatch_key("aten::mm", "CUDA")
    return not has_kernels and _LIBRARY.is_file() and hasattr(torch._C, "_acc")


@contextmanager
def pretended_cuda() -> Iterator[Counter[str]]:
    """Within it "cuda:0", "cuda:1" and so on are there. Gives how often each operation has run on them."""
    calls: Counter[str] = Counter()
    kernel = partial(_kernel, calls)
    every, single = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(kernel, "CUDA")
    # What torch composes of other operations with the help of a CUDA that it doesn't have.
    composed = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeExplicitAutogradNonFunctional")
    for name in ("aten::copy_", *composed):
        namespace, _, name = name.partition("::")
        if namespace == "aten":
            packet, _, overload = name.partition(".")
            single.impl(name, partial(kernel, getattr(getattr(aten, packet), overload or "default")), "CUDA")
    try:
        with _guarded(), mock.patch("torch.cuda._lazy_init"):
            yield calls
    finally:
        every._destroy()
        single._destroy()


def relabelled(tensor: Tensor, device: torch.device) -> Tensor:
    """The same memory under another device's name."""
    capsule = torch._C._to_dlpack(tensor)
    # A DLManagedTensor begins with the data's address, the device's type and its index.
    place = (ctypes.c_int32 * 2).from_address(_pointer(capsule, b"dltensor") + ctypes.sizeof(ctypes.c_void_p))
    place[:] = DLDeviceType.kDLCUDA if device.type == "cuda" else DLDeviceType.kDLCPU, device.index or 0
    return torch._C._from_dlpack(capsule)


class _Guard(torch._C._acc.DeviceGuard if hasattr(torch._C, "_acc") else object):  # type: ignore[misc]
    """Switches between devices: there is nothing to switch."""

    def type_(self) -> Any:
        return torch._C._autograd.DeviceType.CUDA


_GUARD = _Guard()


@contextmanager
def _guarded() -> Iterator[None]:
    """CUDA has a guard; torch lets Python make one for the device type PrivateUse1 only, so it is moved over."""
    types = torch._C._autograd.DeviceType
    cuda, private = types.CUDA.value, types.PrivateUse1.value
    table = (ctypes.c_void_p * (private + 1)).in_dll(
        ctypes.CDLL(str(_LIBRARY)), "_ZN3c104impl26device_guard_impl_registryE"
    )
    before = table[private]
    torch._C._acc.register_python_privateuseone_device_guard(_GUARD)
    table[cuda], table[private] = table[private], before
    try:
        yield
    finally:
        table[cuda] = None


def _kernel(calls: Counter[str], op: Any, *args: Any, **kwargs: Any) -> Any:
    calls[op.overloadpacket.__name__] += 1
    is_view, operands, written = _facts(op)
    if is_view:
        return op.redispatch(CPU_KERNEL, *args, **kwargs)  # of the same storage, whatever its device
    named = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | kwargs
    device = _device(op, named)
    if kwargs.get("device") is not None:
        kwargs["device"] = HOME
    # Numbers among the operands come unpacked; another overload takes them so.
    unpacked = any(isinstance(named.get(name), int | float) for name in operands)
    function = KERNELS.get(op.overloadpacket, op.overloadpacket if unpacked else op)
    output = function(*_each(_here, args), **{name: _each(_here, value) for name, value in kwargs.items()})
    if not written:
        return _each(partial(relabelled, device=device), output)
    targets = [named[name] for name in written]
    for old, new in zip(_tensors(targets), _tensors(output), strict=False):
        if old.is_cuda and not old.numel():
            old.data = relabelled(new, old.device)  # an output that takes the size it needs
        elif old.data_ptr() != new.data_ptr() or old.shape != new.shape:
            raise NotImplementedError(f"{op} can't move a tensor on a pretended device.")
    returns = len(op._schema.returns)
    return None if not returns else targets[0] if returns == 1 else tuple(targets)


@cache
def _facts(op: Any) -> tuple[bool, list[str], list[str]]:
    """Whether an operation gives a view, the names of its tensors, and of those that it writes to."""
    arguments, returns = op._schema.arguments, op._schema.returns
    is_view = any(one.alias_info is not None and not one.alias_info.is_write for one in returns)
    operands = [one.name for one in arguments if isinstance(one.type, torch.TensorType)]
    return is_view, operands, [one.name for one in arguments if one.alias_info is not None and one.alias_info.is_write]


def _each(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """A value whose tensors, also those in lists, are changed."""
    if isinstance(value, Tensor):
        return change(value)
    return type(value)(_each(change, one) for one in value) if isinstance(value, list | tuple) else value


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, list | tuple):
        return [tensor for one in value for tensor in _tensors(one)]
    return [value] if isinstance(value, Tensor) else []


def _here(tensor: Tensor) -> Tensor:
    """The same memory as the CPU's."""
    if not tensor.is_cuda:
        return tensor
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return relabelled(tensor, HOME)


def _device(op: Any, named: dict[str, Any]) -> torch.device | None:
    """The device of all tensors; raises if there are several, but where CUDA takes them."""
    packet, devices, written = op.overloadpacket, set(), _facts(op)[2]
    takes_numbers = packet in NUMBERED or torch.Tag.pointwise in op.tags
    for name, value in named.items():
        for tensor in _tensors(value):
            is_number = takes_numbers and not tensor.dim() and name not in written
            is_index = packet in INDEXED and name == "indices"
            if tensor.is_cuda or not (is_number or is_index):
                devices.add(tensor.device)
    if len(devices) > 1 and packet not in COPIES:
        there = " and ".join(sorted(map(str, devices)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {op} found {there}.")
    return torch.device(named["device"]) if named.get("device") is not None else next(iter(devices), None)

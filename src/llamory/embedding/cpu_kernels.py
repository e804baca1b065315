"""Linear layers for inference in float32 on a CPU: oneDNN's kernels, with what follows the product in the same pass.

torch gives float32 products to MKL, which uses its slower kernels on processors that aren't Intel's; oneDNN, which
torch carries too, makes its kernels for the processor it finds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_KERNEL = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(layer: Any, x: Tensor, *, silu: bool = False, add: Tensor | None = None) -> Tensor:
    """What a linear layer gives, then optionally SiLU of it, then optionally a sum.

    Args:
        layer: an `nn.Linear`, or any module that stands in its place (such as one with a LoRA adapter).
        x: (N, in).
        silu: whether to take SiLU of the product.
        add: (N, out) to add.

    Returns:
        (N, out); without a gradient where the fast kernel was used.
    """
    if _can_use_kernel(layer, x):
        if add is not None and not silu:
            return _KERNEL.binary(x, add, layer.weight, layer.bias, "add")  # type: ignore[union-attr]
        y = _KERNEL(x, layer.weight, layer.bias, "swish" if silu else "none", [], "")  # type: ignore[misc]
    else:
        y = _low_rank(layer, x) if _is_low_rank(layer) else layer(x)
        y = F.silu(y) if silu else y
    return y if add is None else y + add


def swiglu(gate: Any, up: Any, x: Tensor) -> Tensor:
    """SiLU of one layer times another: (N, in) to (N, out)."""
    y = linear(gate, x, silu=True)
    if _can_use_kernel(up, x) and y.dtype == x.dtype:
        return _KERNEL.binary(x, y, up.weight, up.bias, "mul")  # type: ignore[union-attr]
    return y * linear(up, x)


def _low_rank(layer: Any, x: Tensor) -> Tensor:
    """What peft's layer gives: its base layer's output and products of low rank."""
    y = linear(layer.base_layer, x)
    for name in layer.active_adapters:
        y = y + linear(layer.lora_B[name], linear(layer.lora_A[name], x)) * layer.scaling[name]
    return y


def _is_low_rank(layer: Any) -> bool:
    """Whether a layer is peft's for inference, adding products of low rank to its base layer's output, nothing else."""
    return (
        hasattr(layer, "lora_A")
        and not (layer.merged or layer.disable_adapters or layer.training)
        and all(name in layer.lora_A and name not in layer.lora_variant for name in layer.active_adapters)
    )


def _can_use_kernel(layer: nn.Module, x: Tensor) -> bool:
    return (
        _KERNEL is not None
        and type(layer) is nn.Linear
        and x.device.type == "cpu"
        and x.dtype == layer.weight.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
    )

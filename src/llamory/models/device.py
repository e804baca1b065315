"""The device that models run on."""

from __future__ import annotations

from llamory.errors import LlamoryError


def pick_device(name: str | None = None) -> str:
    """The device called `name`; by default the accelerator (CUDA, MPS, XPU), or the CPU if there is none.

    Raises LlamoryError if this machine has no such device.
    """
    available = available_devices()
    kinds = [device.partition(":")[0] for device in available]
    if name is None:
        return kinds[-1]
    if name not in (*available, *kinds):
        raise LlamoryError(f"There is no device {name!r} on this machine; it has {', '.join(available)}.")
    return name


def available_devices() -> list[str]:
    """The names of this machine's devices, such as `cpu`, `cuda:0` and `cuda:1`; the CPU comes first."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return ["cpu"]
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count()))]

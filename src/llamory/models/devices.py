"""The device that models run on."""

from __future__ import annotations

from llamory.errors import LlamoryError


def pick_device(name: str | None = None) -> str:
    """The device to use: the one that is named, else the accelerator (CUDA, XPU, MPS ...), else the CPU.

    Args:
        name: a torch device, such as "cuda:1".

    Raises:
        LlamoryError: the device does not exist on this machine.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return str(accelerator or "cpu")
    kinds = ["cpu", *([accelerator.type] if accelerator is not None else [])]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    count = torch.accelerator.device_count() if device is not None and device.type != "cpu" else 1
    if device is None or device.type not in kinds or (device.index or 0) >= count:
        raise LlamoryError(f"There is no device {name!r} on this machine; choose {' or '.join(kinds)}.")
    return name

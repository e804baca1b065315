"""Room for tensors that are only needed for a moment, used again and again: fresh buffer costs more than filling it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_buffers = threading.local()


def workspace(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of any content, whose numbers are lost when this thread asks for the same name again.

    On other devices than a CPU it is a new tensor: those have buffer ready.
    """
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    buffer: Tensor | None = getattr(_buffers, name, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # else nobody outside of that mode could write into it
            buffer = torch.empty(size, dtype=torch.uint8)
        setattr(_buffers, name, buffer)
    return buffer[:size].view(dtype).view(shape)

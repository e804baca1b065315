"""Room for tensors that are only needed for a moment, used again and again: fresh room costs more than filling it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_rooms = threading.local()


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor of any content, whose numbers are lost when this thread asks for the same name again.

    On other devices than a CPU it is a new tensor: those have room ready.
    """
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = prod(shape) * dtype.itemsize
    room: Tensor | None = getattr(_rooms, name, None)
    if room is None or room.numel() < size:
        with torch.inference_mode(False):  # else nobody outside of that mode could write into it
            room = torch.empty(size, dtype=torch.uint8)
        setattr(_rooms, name, room)
    return room[:size].view(dtype).view(shape)

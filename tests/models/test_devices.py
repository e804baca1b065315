"""The device that models run on."""

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.models.devices import pick_device


def test_the_accelerator_is_preferred_to_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert pick_device() == "mps"
    assert pick_device("cpu") == "cpu"
    assert pick_device("mps:0") == "mps:0"
    with pytest.raises(LlamoryError, match="choose cpu or mps"):
        pick_device("mps:1")


def test_without_an_accelerator_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert pick_device() == "cpu"
    for name in ("cuda", "toaster", ""):
        with pytest.raises(LlamoryError, match=f"no device '{name}' .* choose cpu"):
            pick_device(name)

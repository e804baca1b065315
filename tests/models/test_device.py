"""The device is chosen by one rule, and one that isn't there is refused by name."""

from types import SimpleNamespace

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.models.device import available_devices, pick_device


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch):
    """Pretends that the machine has `count` accelerators of a kind."""

    def pretend(kind: str, count: int) -> None:
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type=kind))

    return pretend


def test_without_an_accelerator_it_is_the_cpu(accelerator) -> None:
    accelerator("cuda", 0)
    assert available_devices() == ["cpu"]
    assert pick_device() == pick_device("cpu") == "cpu"


def test_an_accelerator_is_the_default(accelerator) -> None:
    accelerator("cuda", 2)
    assert available_devices() == ["cpu", "cuda:0", "cuda:1"]
    assert [pick_device(name) for name in (None, "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "nosuch", "", "mps"])
def test_a_device_that_is_not_there_is_refused(accelerator, name: str) -> None:
    accelerator("cuda", 0)
    with pytest.raises(LlamoryError, match=f"no device '{name}' on this machine; it has cpu"):
        pick_device(name)


def test_an_index_that_is_not_there_is_refused(accelerator) -> None:
    accelerator("cuda", 1)
    with pytest.raises(LlamoryError, match=r"no device 'cuda:1' on this machine; it has cpu, cuda:0\."):
        pick_device("cuda:1")

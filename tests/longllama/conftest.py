"""What the tests of LongLLaMA share."""

from collections.abc import Callable

import pytest
import torch

from llamory.longllama import LongLlamaForCausalLM
from tiny_models import make_long_llama


@pytest.fixture
def make_model() -> Callable[..., LongLlamaForCausalLM]:
    """Makes a tiny model; settings can be changed."""
    return make_long_llama


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Random token ids of a given shape, without special ones."""

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))

    return draw

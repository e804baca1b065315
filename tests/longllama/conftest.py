"""Tiny random models with memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM

CONTEXT, LAST = 16, 8

Make = Callable[..., LongLlamaForCausalLM]


@pytest.fixture
def make_model() -> Make:
    """Makes a model of 3 layers, 4 heads over 2 key/value heads, context 16, last context 8, memory in float32."""

    def make(**changes: Any) -> LongLlamaForCausalLM:
        torch.manual_seed(0)
        settings: dict[str, Any] = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "last_context_length": LAST,
            "mem_layers": [1, 2],
            "mem_dtype": "float32",
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        return LongLlamaForCausalLM(LongLlamaConfig(**settings | changes)).eval()

    return make


@pytest.fixture
def ids() -> Callable[..., torch.Tensor]:
    """Random token ids of a given shape, without special ones."""

    def draw(*shape: int, seed: int = 0) -> torch.Tensor:
        return torch.randint(3, 97, shape, generator=torch.Generator().manual_seed(seed))

    return draw

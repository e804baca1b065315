"""Tiny random models that several rooms' tests use."""

from __future__ import annotations

from typing import Any

import torch

from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM

CONTEXT, LAST = 16, 8


def make_long_llama(**changes: Any) -> LongLlamaForCausalLM:
    """3 layers, 4 heads over 2 key/value heads, context 16, last context 8, memory of two layers in float32."""
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

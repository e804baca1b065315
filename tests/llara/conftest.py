"""A tiny LLARA model and template that all of the method's tests use."""

import pytest
import torch
from transformers import LlamaConfig

from llamory.llara import LlaraTemplate, PreLlamaModel

VOCABULARY = 120


@pytest.fixture
def template() -> LlaraTemplate:
    return LlaraTemplate(
        prefix_ids=(1, 5),
        summarize_prompt_ids=(6, 7, 8),
        summarize_slot_ids=(100, 103, 102),
        predict_prompt_ids=(6, 9),
        predict_slot_ids=(101, 105, 104),
        ignored_ids=(0, 1, 2),
    )


@pytest.fixture
def make_model(template):
    """Build a tiny model in float32 with random weights of the size that makes attention matter."""

    def make(cls=PreLlamaModel, implementation="sdpa", template=template, seed=0, **overrides):
        torch.manual_seed(seed)
        settings = {
            "vocab_size": VOCABULARY,
            "hidden_size": 24,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            "initializer_range": 0.4,
        }
        config = LlamaConfig(**(settings | overrides), attn_implementation=implementation)
        if template is not None:
            config.llara = template.to_dict()
        return cls(config).eval()

    return make

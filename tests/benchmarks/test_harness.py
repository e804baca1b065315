"""benchmarks/harness.py: the reference method agrees with the published code and with llamory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from harness import ReferenceLongLlama
from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM

FILES = sorted((Path(__file__).parents[1] / "golden").glob("longllama_*.json"))
VARIANTS = pytest.mark.parametrize("sdpa", [False, True], ids=["eager", "sdpa"])


def golden_way(golden: dict[str, Any], sdpa: bool) -> ReferenceLongLlama:
    """The transcription on the weights that the golden file describes."""
    config = golden["config"]
    theta = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    ours = ("last_context_length", "rope_theta")
    plain = {key: value for key, value in config.items() if not key.startswith("mem_") and key not in ours}
    model = LlamaForCausalLM(LlamaConfig(**plain, rope_parameters=theta)).eval()
    state = model.state_dict()
    for index, key in enumerate(sorted(state)):
        drawn = np.random.RandomState(golden["weights_seed"] + index).standard_normal(tuple(state[key].shape))
        state[key].copy_(torch.from_numpy(drawn.astype(np.float32) * 0.4) + (1 if key.endswith("norm.weight") else 0))
    return ReferenceLongLlama(
        model,
        mem_layers=config["mem_layers"],
        context=config["max_position_embeddings"],
        last=config["last_context_length"],
        mem_dtype=getattr(torch, config["mem_dtype"]),
        positionals=config["mem_positionals"],
        sdpa=sdpa,
    )


def lengths(way: ReferenceLongLlama) -> tuple[list[int], list[int]]:
    """Tokens per layer in the local cache and in memory."""
    layers = range(len(way.model.model.layers))
    return tuple(  # type: ignore[return-value]
        [kept[layer].keys.shape[2] if layer in kept else 0 for layer in layers] for kept in (way.local, way.memory)
    )


@VARIANTS
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_logits_and_lengths_are_the_published_ones(file: Path, sdpa: bool) -> None:
    golden = json.loads(file.read_text())
    way = golden_way(golden, sdpa)
    logits = way.head(way.read(torch.tensor(golden["input_ids"]), use_cache=golden["use_cache"]))
    expected = torch.tensor(golden["logits"])
    torch.testing.assert_close(logits[..., golden["logits_vocab_ids"]], expected, atol=1e-4, rtol=0)
    assert lengths(way) == (golden["local_lengths"], golden["memory_lengths"])
    for step, expected_logits in enumerate(golden.get("decode_logits", [])):
        logits = way.step(torch.tensor(golden["decode_ids"])[:, step : step + 1])[..., golden["logits_vocab_ids"]]
        expected = torch.tensor(expected_logits).reshape(logits.shape)
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
        local, memory = lengths(way)
        assert local + memory == golden["decode_local_then_memory_lengths"][step]


@VARIANTS
@torch.no_grad()
def test_grouped_query_heads_give_what_longllama_gives(sdpa: bool) -> None:
    torch.manual_seed(0)
    config = LongLlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
        last_context_length=8,
        mem_layers=[1, 2],
        mem_dtype="float32",
        initializer_range=0.2,
    )
    model = LongLlamaForCausalLM(config).eval()
    ids = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(1))
    way = ReferenceLongLlama(model, mem_layers=[1, 2], context=16, last=8, mem_dtype=torch.float32, sdpa=sdpa)
    output = model(ids[:, :55])
    torch.testing.assert_close(way.head(way.read(ids[:, :55])), output.logits, atol=1e-4, rtol=0)
    for step in range(55, 60):
        expected = model(ids[:, step : step + 1], past_key_values=output.past_key_values).logits
        torch.testing.assert_close(way.step(ids[:, step : step + 1]), expected, atol=1e-4, rtol=0)

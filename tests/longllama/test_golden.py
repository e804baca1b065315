"""LongLLaMA against values computed once with the published code (tests/golden/README.md)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM

FILES = sorted((Path(__file__).parents[1] / "golden").glob("longllama_*.json"))
TOLERANCE = 3e-5  # of the largest value


def golden_model(golden: dict[str, Any], **changes: Any) -> LongLlamaForCausalLM:
    """The model whose weights the golden file describes."""
    overflow = "flush" if "flush" in golden["name"] else "slide"
    model = LongLlamaForCausalLM(LongLlamaConfig(**golden["config"] | {"local_cache_overflow": overflow} | changes))
    state = model.state_dict()
    assert sorted(state) == golden["state_dict_keys_sorted"]
    for index, key in enumerate(sorted(state)):
        drawn = np.random.RandomState(golden["weights_seed"] + index).standard_normal(tuple(state[key].shape))
        state[key].copy_(torch.from_numpy(drawn.astype(np.float32) * 0.4) + (1 if key.endswith("norm.weight") else 0))
    return model.eval()


def with_key(key: str) -> Any:
    """All golden files that have an entry."""
    files = [json.loads(file.read_text()) | {"name": file.stem} for file in FILES]
    return pytest.mark.parametrize("golden", [file for file in files if key in file], ids=lambda file: file["name"])


def lengths(cache: Any) -> tuple[list[int], list[int]]:
    layers = range(len(cache))
    return [cache.local_length(layer) for layer in layers], [cache.memory_length(layer) for layer in layers]


def assert_close(actual: torch.Tensor, expected: Any) -> None:
    wanted = torch.tensor(expected)
    torch.testing.assert_close(actual, wanted, atol=TOLERANCE * float(wanted.abs().max()), rtol=0)


@with_key("logits")
@torch.no_grad()
def test_prompt_logits_and_lengths(golden: dict[str, Any]) -> None:
    output = golden_model(golden)(torch.tensor(golden["input_ids"]), use_cache=golden["use_cache"])
    assert_close(output.logits[..., golden["logits_vocab_ids"]], golden["logits"])
    assert output.logits.argmax(-1).tolist() == golden["argmax"]
    assert lengths(output.past_key_values) == (golden["local_lengths"], golden["memory_lengths"])


@with_key("decode_ids")
@torch.no_grad()
def test_decoding_step_by_step(golden: dict[str, Any]) -> None:
    model = golden_model(golden)
    cache = model(torch.tensor(golden["input_ids"])).past_key_values
    given = torch.tensor(golden["decode_ids"])
    for step, (expected, expected_lengths) in enumerate(
        zip(golden["decode_logits"], golden["decode_local_then_memory_lengths"], strict=True)
    ):
        output = model(given[:, step : step + 1], past_key_values=cache)
        assert_close(output.logits[..., golden["logits_vocab_ids"]].reshape(torch.tensor(expected).shape), expected)
        local, memory = lengths(cache)
        assert local + memory == expected_lengths


@with_key("generated")
@torch.no_grad()
def test_greedy_continuation(golden: dict[str, Any]) -> None:
    ids, expected = torch.tensor(golden["input_ids"]), golden["generated"]
    output = golden_model(golden).generate(
        ids, do_sample=False, max_new_tokens=len(expected[0]), min_new_tokens=len(expected[0])
    )
    assert output[:, ids.shape[1] :].tolist() == expected

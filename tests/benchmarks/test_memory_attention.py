"""benchmarks/memory_attention.py: methods agree, and measurements and floors are correct."""

import time
from pathlib import Path

import pytest
import torch

from harness import Peak, in_child
from llamory.longllama import LongLlamaConfig
from memory_attention import (
    Case,
    KeyValueStatistics,
    decode_bytes,
    estimate_seconds,
    layer_weights,
    make,
    merge_rounds,
    prefill_seconds,
)

CASE = Case("small windows", context=32, mem_layers=(1, 3), pretrained=False)
TINY = LongLlamaConfig(
    vocab_size=10,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
    last_context_length=16,
    mem_layers=[1, 3],
)


def take_memory(megabytes: int, seconds: float) -> dict:
    """Run in a child: hold some memory for a while."""
    peak = Peak()
    allocated = torch.ones(megabytes << 18)
    time.sleep(seconds)
    return {"megabytes": peak.bytes() / 2**20, "sum": allocated[:3].sum().item()}


def test_all_methods_with_memory_have_the_same_logits() -> None:
    ids = CASE.ids(103)
    logits = {}
    for method in ("published", "published-sdpa", "exact", "pages"):
        contender = make(CASE, method)
        logits[method] = torch.cat(
            [contender.read(ids[:, :100]), *(contender.step(ids[:, i : i + 1]) for i in range(100, 103))]
        )
    for method in logits:
        # Memory is kept in bfloat16, and ours attends to it in bfloat16 as well.
        torch.testing.assert_close(logits[method], logits["published"], atol=2e-3, rtol=0)


def test_the_stock_model_has_the_same_weights() -> None:
    ids = CASE.ids(CASE.last)
    torch.testing.assert_close(make(CASE, "stock").read(ids), make(CASE, "exact").read(ids), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["published", "exact", "stock"])
def test_a_filled_memory_has_the_requested_length(method: str, tmp_path: Path) -> None:
    KeyValueStatistics.measure(CASE, tmp_path / "likeness.pt")
    contender = make(CASE, method)
    contender.read(CASE.ids(8))
    contender.fill(KeyValueStatistics.load(tmp_path / "likeness.pt"), 20_000)
    if method == "published":
        assert contender.method.memory[3].keys.shape == (1, 4, 20_000, 64)  # type: ignore[attr-defined]
    elif method == "exact":
        assert contender.cache.memory_length(3) == 20_000  # type: ignore[attr-defined]
    else:
        assert contender.cache.get_seq_length() == 20_008  # type: ignore[attr-defined]
    contender.step(CASE.ids(1))


@pytest.mark.slow
def test_sampled_keys_have_the_means_and_covariances_of_real_ones(tmp_path: Path) -> None:
    KeyValueStatistics.measure(CASE, tmp_path / "likeness.pt")
    pretrained = CASE.long_model().read(CASE.ids(2048)[0]).keys(1)
    sampled = torch.cat([keys for keys, _ in KeyValueStatistics.load(tmp_path / "likeness.pt").sample(1, 50_000)], 1)
    for head in range(len(pretrained)):
        scale = pretrained[head].var().item()
        torch.testing.assert_close(sampled[head].mean(0), pretrained[head].mean(0), atol=0.03 * scale**0.5, rtol=0)
        torch.testing.assert_close(sampled[head].T.cov(), pretrained[head].T.cov(), atol=0.05 * scale, rtol=0)


@pytest.mark.slow
def test_a_child_reports_its_memory_and_is_stopped_at_its_limits() -> None:
    settings = {"threads": 1, "seconds": 60, "memory": 4 << 30}
    result = in_child(take_memory, 256, 0.0, **settings)
    assert result["megabytes"] == pytest.approx(256, abs=24)
    assert in_child(take_memory, 8192, 0.0, **settings) == {"skipped": "needs more than 4 GiB"}
    assert in_child(take_memory, 1, 60.0, **settings | {"seconds": 0.5}) == {"skipped": "stopped after 0 s"}
    with pytest.raises(RuntimeError, match="take_memory"):
        in_child(take_memory, None, 0.0, **settings)


def test_estimates_extrapolate_from_two_lengths() -> None:
    seconds = {length: 2e-3 * length + 3e-7 * length**2 for length in (4096, 16384, 65536)}
    assert estimate_seconds({4096: seconds[4096], 16384: seconds[16384]}, 65536, linear=False) == pytest.approx(
        seconds[65536]
    )
    assert estimate_seconds({4096: 2.0}, 16384, linear=True) == 8.0
    assert estimate_seconds({}, 4096, linear=True) == 0.0


def test_rounds_are_merged_by_medians_without_skipped_ones() -> None:
    rounds = [
        {"first_step": 9.0, "steps": [1.0, 2.0, 9.0], "peak": 5},
        {"first_step": 5.0, "steps": [4.0], "peak": 7},
        {"first_step": 1.0, "steps": [3.0, 3.0], "peak": 6},
    ]
    merged = merge_rounds([*rounds, {"skipped": "no"}])
    assert (merged["seconds"], merged["rounds"], merged["first_step"], merged["peak"]) == (3.0, [2.0, 4.0, 3.0], 5.0, 7)
    assert merge_rounds([{"skipped": "no"}]) == {"skipped": "no"}


def test_floors_are_correct() -> None:
    # Query and output 8x8, key and value 8x4, three products with 16 columns.
    assert layer_weights(TINY) == 2 * 64 + 2 * 32 + 3 * 128
    case = Case("tiny", context=32, mem_layers=(1, 3), pretrained=False)
    weights = 4 * 576 + 10 * 8
    assert decode_bytes(case, TINY, 100) == 4 * (weights + 4 * 2 * 4 * 16) + 2 * 2 * 2 * 4 * 100
    # 80 tokens: windows of 32 and 32 go into memory, 16 stay. The last memory layer only needs keys and values of the
    # first 64, so local attention is in three layers there, and attention to memory in one.
    linear = 2 * (64 * (3 * 576 + 64) + 16 * 4 * 576 + 80)
    local = 4 * 8 * (2 * 32 * 32 / 2 * 3 + 16 * 16 / 2 * 4)
    memory_products = 4 * 8 * (32 * 32 + 16 * 64 * 2)
    assert prefill_seconds(case, TINY, 80, 1.0, 1.0) == linear + local + memory_products
    assert prefill_seconds(case, TINY, 80, 1.0, 2.0) == linear + local + memory_products / 2

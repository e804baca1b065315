"""Attention with its log-sum-exp, held against a plain softmax in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.memory.search import base
from llamory.memory.search.base import AttentionAccumulator, flash, merge

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def tensors(heads, kv_heads, queries, keys, dtype=torch.float32, batch=2, head_dim=16):
    chance = torch.Generator().manual_seed(7)
    shapes = [(batch, heads, queries), (batch, kv_heads, keys), (batch, kv_heads, keys)]
    return [torch.randn(*shape, head_dim, generator=chance).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_flash_is_softmax_attention_with_a_natural_log_sum(memory, dtype, heads, kv_heads):
    query, key, value = tensors(heads, kv_heads, 5, 33, dtype)
    output, lse = flash(query, key, value, scaling=0.3)
    expected, expected_sum = memory.plain_attention(query, key, value, 0.3)
    assert output.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    memory.close(output, expected, TOLERANCE[dtype])
    memory.close(lse, expected_sum, TOLERANCE[dtype])


def test_the_output_has_the_type_of_the_query(memory):
    query, key, value = tensors(4, 2, 5, 33)
    output, _ = flash(query.bfloat16(), key, value, scaling=0.3)
    assert output.dtype == torch.bfloat16
    memory.close(output, memory.plain_attention(query, key, value, 0.3)[0], 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mask_heads", [1, 6])
def test_masks_are_added_for_grouped_heads_too(memory, dtype, mask_heads):
    query, key, value = tensors(6, 2, 5, 33, dtype)
    mask = torch.randn(2, mask_heads, 5, 33)
    found = flash(query, key, value, scaling=0.3, mask=mask)
    for one, other in zip(found, memory.plain_attention(query, key, value, 0.3, mask), strict=True):
        memory.close(one, other)


@pytest.mark.parametrize("unseen", [-torch.inf, torch.finfo(torch.float32).min, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_that_see_nothing_are_zero_and_minus_infinity(memory, dtype, unseen):
    query, key, value = tensors(2, 2, 5, 33, dtype)
    mask = torch.ones(5, 33, dtype=torch.bool) if unseen is False else torch.zeros(5, 33)
    mask[3] = unseen
    output, lse = flash(query, key, value, scaling=0.3, mask=mask)
    expected, expected_sum = memory.plain_attention(query, key, value, 0.3)
    assert (output[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
    memory.close(output[:, :, :3], expected[:, :, :3])
    memory.close(lse[:, :, 4], expected_sum[:, :, 4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_causal_queries_see_the_keys_up_to_their_own(memory, dtype):
    query, key, value = tensors(6, 2, 9, 9, dtype)
    found = flash(query, key, value, scaling=0.3, causal=True)
    mask = torch.full((9, 9), -torch.inf).triu(1)
    for one, other in zip(found, memory.plain_attention(query, key, value, 0.3, mask), strict=True):
        memory.close(one, other)


def test_no_keys_and_no_queries_are_no_error():
    query, key, value = tensors(6, 2, 5, 33)
    output, lse = flash(query, key[:, :, :0], value[:, :, :0], scaling=1.0)
    assert (output == 0).all() and (lse == -torch.inf).all()
    assert flash(query[:, :, :0], key, value, scaling=1.0)[0].shape == (2, 6, 0, 16)


def test_the_fallback_holds_the_scores_of_some_queries_at_once(memory, monkeypatch):
    monkeypatch.setattr(base, "MAX_MATMUL_SCORES", 300)
    query, key, value = tensors(6, 2, 40, 33, torch.float64)
    mask = torch.randn(40, 33)
    found = flash(query, key, value, scaling=0.3, mask=mask)
    for one, other in zip(found, memory.plain_attention(query, key, value, 0.3, mask), strict=True):
        memory.close(one, other)


@settings(deadline=None, max_examples=30)
@given(cuts=st.lists(st.integers(0, 40), max_size=5), bound=st.sampled_from([1, 1 << 22]))
def test_parts_merge_into_the_whole(cuts, bound):
    query, key, value = tensors(6, 2, 5, 40)
    whole = flash(query, key, value, scaling=0.3)
    edges, parts = [0, *sorted(cuts), 40], []
    for start, stop in pairwise(edges):
        parts.append(flash(query, key[:, :, start:stop], value[:, :, start:stop], scaling=0.3))
    kept, base.MERGE_ELEMENTS = base.MERGE_ELEMENTS, bound
    try:
        gathered = AttentionAccumulator()
        for part in parts:
            gathered.add(*part)
        for found in (merge(*zip(*parts, strict=True)), gathered.result(query)):
            for one, other in zip(found, whole, strict=True):
                torch.testing.assert_close(one, other)
    finally:
        base.MERGE_ELEMENTS = kept


def test_parts_that_all_see_nothing_merge_into_nothing():
    parts = AttentionAccumulator()
    for _ in range(3):
        parts.add(torch.zeros(2, 5, 4), torch.full((2, 5), -torch.inf))
    output, lse = parts.result(torch.zeros(2, 5, 4))
    assert (output == 0).all() and (lse == -torch.inf).all()
    assert AttentionAccumulator().result(torch.zeros(2, 5, 4))[1].tolist() == [[-torch.inf] * 5] * 2

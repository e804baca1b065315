"""Exact search: every token is read, whatever the memory's type, the spans and the threads."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.memory.blocks import Span
from llamory.memory.search import ExactSearch, exact

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.int8: 1e-5}
if exact._has_amx_tiles():
    TOLERANCE[torch.bfloat16] = 2e-2  # read without conversion there, with the query rounded to it


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_exact_search_is_a_softmax_over_all_spans(memory, dtype, groups):
    bank = memory.filled(700, dtype=dtype)
    query = memory.queries(2, 2 * groups, 5, 16)
    output, lse = ExactSearch().attend(query, bank, 0, 0.4)
    assert output.shape == query.shape and lse.dtype == torch.float32
    memory.close((output, lse), memory.expected(query, bank, 0.4), TOLERANCE[dtype])


@settings(deadline=None, max_examples=40)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
    kv_heads=st.integers(1, 5),
    tokens=st.integers(1, 90),
    cuts=st.tuples(st.integers(0, 90), st.integers(0, 90)),
    threads=st.integers(1, 4),
)
def test_exact_reads_any_spans_in_any_split(memory, dtype, kv_heads, tokens, cuts, threads):
    chance = torch.Generator().manual_seed(tokens)
    bank = memory.Bank(kv_heads, 8, dtype, capacity=32)
    bank.append(0, *torch.randn(2, kv_heads, tokens, 8, generator=chance))
    start, stop = sorted(min(cut, tokens) for cut in cuts)
    block = bank._spans[0].block
    bank._spans += [Span(block, min(start, block.filled), min(stop, block.filled))]
    bank._spans = [span for span in bank._spans if len(span)]
    query = torch.randn(1, kv_heads * 2, 3, 8, generator=chance)
    keys, values = bank.tensors()
    chunk, before = exact.CHUNK, torch.get_num_threads()
    exact.CHUNK = 7
    torch.set_num_threads(threads)
    try:
        result = ExactSearch().attend(query, bank, 0, 0.4)
    finally:
        exact.CHUNK = chunk
        torch.set_num_threads(before)
    memory.close(result, memory.plain_attention(query, keys[None], values[None], 0.4), TOLERANCE[dtype])


def test_queries_need_not_be_contiguous(memory):
    bank, query = memory.filled(700), memory.queries(2, 5, 4, 16).transpose(1, 2)
    assert not query.is_contiguous()
    memory.close(ExactSearch().attend(query, bank, 0, 0.4), memory.expected(query, bank, 0.4))


def test_the_output_has_the_type_of_the_query_not_of_the_memory(memory):
    bank, query = memory.filled(300, dtype=torch.int8), memory.queries(1, 4, 3, 16).bfloat16()
    output, lse = ExactSearch().attend(query, bank, 0, 0.4)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    memory.close((output, lse), memory.expected(query, bank, 0.4), 2e-2)

"""What all ways of searching in memory have in common."""

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.memory.attention import attend
from llamory.memory.blocks import Span
from llamory.memory.search import exact
from llamory.memory.search import workspace as scratch
from llamory.memory.search.base import make_search

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5, torch.int8: 1e-5}
if torch.cpu._is_amx_tile_supported():
    TOLERANCE[torch.bfloat16] = 2e-2  # read as it is there, with the query rounded to it
EVERYTHING = 10**9


def close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["exact", "pages", "faiss"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("groups", [1, 3, 4])
def test_reading_everything_is_a_softmax_over_all_spans(memory, name, dtype, groups):
    bank = memory.filled(700, dtype=dtype)
    query = memory.queries(2, 2 * groups, 5, 16)
    found = make_search(name, EVERYTHING).attend(query, bank, 0, 0.4)
    assert found[0].shape == query.shape and found[1].dtype == torch.float32
    close(found, memory.expected(query, bank, 0.4), TOLERANCE[dtype])


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
    kept, before = exact.CHUNK, torch.get_num_threads()
    exact.CHUNK = 7
    torch.set_num_threads(threads)
    try:
        found = make_search("exact").attend(query, bank, 0, 0.4)
    finally:
        exact.CHUNK = kept
        torch.set_num_threads(before)
    close(found, memory.plain_attention(query, keys[None], values[None], 0.4), TOLERANCE[dtype])


def test_queries_may_lie_in_memory_as_projections_leave_them(memory):
    bank, query = memory.filled(700), memory.queries(2, 5, 4, 16).transpose(1, 2)
    assert not query.is_contiguous()
    close(make_search("exact").attend(query, bank, 0, 0.4), memory.expected(query, bank, 0.4))


@pytest.mark.parametrize("name", ["pages", "faiss"])
def test_what_was_read_is_told(memory, name):
    bank, query = memory.filled(9000, head_dim=64, capacity=8192), memory.queries(1, 4, 2, 64)
    few, many = (make_search(name, count).attend_with_stats(query, bank, 0, 0.125) for count in (10, 200))
    everything = memory.expected(query, bank, 0.125)[1]
    found = [(told[2].double() - everything).exp() for told in (few, many)]
    assert (found[0] < found[1]).all() and (found[1] < 1 + 1e-5).all() and (found[0] > 808 / 9000 / 2).all()


@pytest.mark.parametrize("name", ["exact", "pages", "faiss"])
def test_an_empty_memory_gives_nothing(memory, name):
    query = memory.queries(1, 4, 3, 16)
    output, lse = make_search(name).attend(query, memory.Bank(2, 16), 0, 1.0)
    assert (output == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize("name", ["exact", "pages", "faiss"])
def test_rows_get_what_each_gets_alone(memory, name):
    full, other, empty = memory.filled(300), memory.filled(90, seed=5), memory.Bank(2, 16)
    search, query = make_search(name), memory.queries(5, 4, 3, 16)
    banks = [full, empty, other, full.fork(), full]
    output, lse = attend(query, banks, 0, 0.4, search)
    for row, bank in enumerate(banks):
        alone = search.attend(query[row : row + 1], bank, 0, 0.4)
        close((output[row : row + 1], lse[row : row + 1]), alone)
    assert (output[1] == 0).all() and (lse[1] == -torch.inf).all()


def test_rows_that_share_a_memory_read_it_once(memory):
    full, other, reads = memory.filled(300), memory.filled(90, seed=5), []

    class Counting:
        def attend(self, query, bank, layer, scaling):
            reads.append((len(query), bank.length()))
            return make_search("exact").attend(query, bank, layer, scaling)

    query = memory.queries(4, 4, 3, 16)
    attend(query, [full, other, full.fork(), full], 0, 0.4, Counting())
    assert sorted(reads) == [(1, 90), (3, 300)]


def test_a_memory_of_another_type_than_the_query_leaves_the_query_its_type(memory):
    bank, query = memory.filled(300, dtype=torch.int8), memory.queries(1, 4, 3, 16).bfloat16()
    output, lse = make_search("exact").attend(query, bank, 0, 0.4)
    assert output.dtype == torch.bfloat16 and lse.dtype == torch.float32
    close((output, lse), memory.expected(query, bank, 0.4), 2e-2)


@pytest.mark.parametrize("name", ["exact", "pages", "faiss"])
def test_a_growing_memory_is_seen_at_every_step(memory, name):
    bank, search = memory.Bank(2, 16), make_search(name, EVERYTHING)
    for step, tokens in enumerate((1, 5, 250, 1, 300, 40)):
        bank.append(0, *memory.queries(2, 2, tokens, 16, seed=step))
        query = memory.queries(1, 4, 2, 16, seed=100 + step)
        close(search.attend(query, bank, 0, 0.4), memory.expected(query, bank, 0.4))


@pytest.mark.parametrize("name", ["exact", "pages", "faiss"])
def test_a_memory_first_asked_in_inference_mode_can_be_asked_outside_of_it(memory, name, monkeypatch):
    monkeypatch.setattr(scratch, "_buffers", threading.local())
    bank, search, query = (
        memory.filled(9000, dtype=torch.int8, capacity=8192),
        make_search(name),
        memory.queries(1, 4, 3, 16),
    )
    with torch.inference_mode():
        inside = [tensor.clone() for tensor in search.attend(query, bank, 0, 0.4)]
    close(search.attend(query, bank, 0, 0.4), inside)


def test_wrong_settings_are_refused_in_a_sentence():
    with pytest.raises(LlamoryError, match="choose one of exact, pages, faiss"):
        make_search("fast")
    with pytest.raises(LlamoryError, match="at least 1"):
        make_search("pages", 0)

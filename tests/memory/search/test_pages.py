"""Search by pages: sorted by likeness, best pages read, the rest estimated, needles found."""

import math

import pytest
import torch

from llamory.memory.blocks import Span
from llamory.memory.search import make_search, page_index, pages
from llamory.memory.search.pages import PagesSearch


@pytest.fixture(autouse=True)
def _pages_in_small_memories_too(monkeypatch):
    monkeypatch.setattr(pages, "EXACT_TOKENS", 0)


def relative_error(found, expected):
    return ((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def test_all_pages_equal_dense_attention(memory):
    bank, query = memory.filled(5000, capacity=8192), memory.queries(1, 4, 3, 16)
    memory.close(make_search("pages", 5000).attend(query, bank, 0, 0.4), memory.expected(query, bank, 0.4))


@pytest.mark.parametrize("queries", [1, 3, 200])
@pytest.mark.parametrize("capacity", [1024, 16384])
def test_all_pages_but_one_are_nearly_exact(memory, queries, capacity):
    # Reading all but the worst page leaves next to no room for an error of the estimate, and any page that was read
    # twice or not at all would show.
    bank, query = memory.filled(4500, capacity=capacity), memory.queries(2, 6, queries, 16)
    stable = 4096
    found = PagesSearch(stable // 32 - 1, tolerance=math.inf).attend(query, bank, 0, 0.2)
    expected = memory.expected(query, bank, 0.2)
    memory.close(found, expected, 5e-3, size=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_uniform_attention_is_right_with_one_page(memory, dtype):
    bank = memory.Bank(2, 16, dtype, capacity=16384)
    chance = torch.Generator().manual_seed(0)
    bank.append(0, torch.ones(2, 9000, 16), torch.randn(2, 9000, 16, generator=chance) + 1)
    query = memory.queries(1, 4, 3, 16)
    found = make_search("pages", 1).attend(query, bank, 0, 0.4)
    memory.close(found, memory.expected(query, bank, 0.4), 1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("strength", [1.0, 3.0])
@pytest.mark.parametrize("queries", [1, 100])
def test_a_needle_among_noise_is_found(memory, strength, queries):
    # Strength 1: a needle three times as long as the noise. Strength 3: no longer than the noise, but the query is.
    bank = memory.filled(20000, kv_heads=2, head_dim=64, capacity=32768)
    block = bank._spans[0].block
    needle = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    block.keys[:, 7777] = needle * 3 / strength
    block.values[:, 7777] = 5.0
    query = memory.queries(1, 4, queries, 64)
    query[0, :, queries // 2] = needle.repeat_interleave(2, 0) * strength
    expected, _ = memory.expected(query, bank, 0.125)
    assert (expected[0, :, queries // 2] > 4).all()  # it is what the query looks at
    output, _ = make_search("pages").attend(query, bank, 0, 0.125)
    assert relative_error(output[0, :, queries // 2], expected[0, :, queries // 2]) < 0.05


def test_clusters_are_read_right(memory):
    chance = torch.Generator().manual_seed(0)
    centres = torch.randn(2, 100, 64, generator=chance) * 1.5
    names = torch.randint(100, (2, 16384), generator=chance)
    keys = centres.gather(1, names[..., None].expand(-1, -1, 64)) + 0.5 * torch.randn(2, 16384, 64, generator=chance)
    bank = memory.Bank(2, 64, capacity=16384)
    bank.append(0, keys, torch.randn(2, 16384, 64, generator=chance) + keys)
    query = centres[:, :40].reshape(1, 2, 40, 64).repeat_interleave(2, 1)
    found = make_search("pages").attend(query, bank, 0, 0.125)
    expected = memory.expected(query, bank, 0.125)
    assert relative_error(found[0], expected[0]) < 0.1
    memory.close(found[1:], expected[1:], 0.05)


@pytest.mark.parametrize("queries", [1, 200])
def test_uncertain_queries_read_everything(memory, queries):
    # A long query over noise looks at a few keys of many pages: no choice of pages is right.
    bank, query = memory.filled(20000, head_dim=64, capacity=32768), memory.queries(1, 4, queries, 64)
    query[:, :, 0] *= 3
    expected = memory.expected(query, bank, 0.125)[0][:, :, 0]
    found = PagesSearch(tolerance=0.05).attend(query, bank, 0, 0.125)[0][:, :, 0]
    assert relative_error(found, expected) < 1e-4
    guessed = PagesSearch(tolerance=math.inf).attend(query, bank, 0, 0.125)[0][:, :, 0]
    assert relative_error(guessed, expected) > 0.1


def test_memory_may_grow_and_be_shared_between_calls(memory):
    bank, search = memory.Bank(2, 16, capacity=8192), make_search("pages", 400)
    for step, tokens in enumerate((3000, 1500, 1, 6000, 300, 9000)):
        bank.append(0, *memory.queries(2, 2, tokens, 16, seed=step))
        query = memory.queries(1, 4, 2, 16, seed=100 + step)
        memory.close(search.attend(query, bank, 0, 0.1), memory.expected(query, bank, 0.1), 5e-3, size=1)
        if step == 2:
            early = bank.fork()
            before = search.attend(query, early, 0, 0.1)
    memory.close(search.attend(memory.queries(1, 4, 2, 16, seed=102), early, 0, 0.1), before)


def test_a_window_over_a_small_memory_reads_everything(memory, monkeypatch):
    monkeypatch.setattr(pages, "EXACT_TOKENS", 8192)
    bank, query = memory.filled(9000, capacity=16384), memory.queries(1, 4, 100, 16)
    memory.close(make_search("pages", 1).attend(query, bank, 0, 0.4), memory.expected(query, bank, 0.4))


def test_a_range_is_indexed_once(memory, monkeypatch):
    made = []
    monkeypatch.setattr(
        page_index,
        "_build",
        lambda block, start, stop, make=page_index._build: made.append(stop) or make(block, start, stop),
    )
    bank, search, query = memory.filled(5000, capacity=32768), make_search("pages", 2), memory.queries(1, 4, 1, 16)
    for _ in range(4):
        search.attend(query, bank, 0, 0.4)
        search.attend(query, bank.fork(), 0, 0.4)
    bank.append(0, *memory.queries(2, 2, 4000, 16))
    search.attend(query, bank, 0, 0.4)
    assert made == [4096, 8192]


def test_segments_in_another_order_give_the_same(memory):
    one, other = memory.filled(6000, capacity=2048), memory.filled(5000, capacity=8192, seed=4)
    block = other._spans[0].block
    spans = [*one._spans, Span(block, 0, 1000), Span(block, 1300, 5000)]
    both, reversed_ = memory.Bank(2, 16), memory.Bank(2, 16)
    both._spans, reversed_._spans = spans, spans[::-1]
    query, search = memory.queries(1, 4, 70, 16), make_search("pages", 20)
    found = search.attend(query, both, 0, 0.1)
    memory.close(search.attend(query, reversed_, 0, 0.1), found)
    memory.close(found, memory.expected(query, both, 0.1), 0.02, size=1)


@pytest.mark.parametrize("queries", [2, 150])
def test_rows_that_share_a_memory_get_what_each_gets_alone(memory, queries):
    bank, query = memory.filled(9000, capacity=16384), memory.queries(3, 6, queries, 16)
    search = make_search("pages", 4)
    together = search.attend(query, bank, 0, 0.4)
    for row in range(3):
        memory.close(search.attend(query[row : row + 1], bank, 0, 0.4), [t[row : row + 1] for t in together])

"""Search by Faiss: nearest neighbours are read, the lists' rest is estimated, indexes are kept in a folder."""

import math

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.memory.search import faiss, make_search
from llamory.memory.search.faiss import FaissSearch


def relative_error(found, expected):
    return ((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max().item()


def test_as_many_neighbours_as_tokens_equal_dense_attention(memory):
    bank, query = memory.filled(5000, capacity=8192), memory.queries(1, 4, 3, 16)
    memory.close(make_search("faiss", 5000).attend(query, bank, 0, 0.4), memory.expected(query, bank, 0.4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("queries", [1, 40])
def test_nearly_all_neighbours_and_the_estimate_are_nearly_exact(memory, dtype, queries, monkeypatch):
    # All lists are looked into, so only what top_k leaves out is estimated: found and left add up to the list.
    monkeypatch.setattr(faiss, "MIN_PROBES", 10**6)
    bank, query = memory.filled(4500, dtype=dtype, capacity=4096), memory.queries(2, 6, queries, 16)
    found = FaissSearch(4000, tolerance=math.inf).attend(query, bank, 0, 0.2)
    memory.close(found, memory.expected(query, bank, 0.2), 2e-3, size=1)


def test_lists_that_are_not_searched_are_estimated(memory):
    bank, query = memory.filled(9000, capacity=8192), memory.queries(1, 4, 5, 16)
    output, lse = FaissSearch(10, tolerance=math.inf).attend(query, bank, 0, 0.1)
    expected, expected_sum = memory.expected(query, bank, 0.1)
    memory.close((output, lse), (expected, expected_sum), 0.03, size=1)


def test_uniform_attention_is_right_with_one_neighbour(memory):
    bank = memory.Bank(2, 16, capacity=16384)
    chance = torch.Generator().manual_seed(0)
    keys = torch.ones(2, 9000, 16) + 0.001 * torch.randn(2, 9000, 16, generator=chance)
    bank.append(0, keys, torch.randn(2, 9000, 16, generator=chance) + 1)
    query = memory.queries(1, 4, 3, 16)
    memory.close(make_search("faiss", 1).attend(query, bank, 0, 0.4), memory.expected(query, bank, 0.4), 1e-3, size=1)


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
    output, _ = FaissSearch(tolerance=math.inf).attend(query, bank, 0, 0.125)
    assert relative_error(output[0, :, queries // 2], expected[0, :, queries // 2]) < 0.05


def test_memory_may_grow_between_calls(memory):
    bank, search = memory.Bank(2, 16, capacity=16384), FaissSearch(50, tolerance=math.inf)
    for step, tokens in enumerate((3000, 1500, 1, 6000, 300, 9000)):
        bank.append(0, *memory.queries(2, 2, tokens, 16, seed=step))
        query = memory.queries(1, 4, 2, 16, seed=100 + step)
        memory.close(search.attend(query, bank, 0, 0.1), memory.expected(query, bank, 0.1), 0.03, size=1)


def test_indexes_in_a_folder_are_reused_and_give_the_same(memory, tmp_path, monkeypatch):
    query = memory.queries(1, 4, 5, 16)
    in_memory = make_search("faiss", 10).attend(query, memory.filled(9000, capacity=8192), 0, 0.1)
    on_disk = make_search("faiss", 10, folder=tmp_path / "indexes").attend(
        query, memory.filled(9000, capacity=8192), 0, 0.1
    )
    memory.close(on_disk, in_memory)
    assert len(list((tmp_path / "indexes").iterdir())) == 4  # two parts, two heads
    monkeypatch.setattr(faiss, "_build", lambda span: pytest.fail("built again"))
    again = make_search("faiss", 10, folder=tmp_path / "indexes").attend(
        query, memory.filled(9000, capacity=8192), 0, 0.1
    )
    memory.close(again, in_memory)


def test_an_unusable_folder_and_a_broken_index_are_refused(memory, tmp_path):
    (tmp_path / "file").write_text("")
    query = memory.queries(1, 4, 1, 16)
    with pytest.raises(LlamoryError, match="can't store indexes"):
        make_search("faiss", 10, folder=tmp_path / "file").attend(query, memory.filled(9000, capacity=8192), 0, 0.1)
    make_search("faiss", 10, folder=tmp_path).attend(query, memory.filled(9000, capacity=8192), 0, 0.1)
    for file in tmp_path.glob("*.faiss"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(LlamoryError, match="not a complete memory index"):
        make_search("faiss", 10, folder=tmp_path).attend(query, memory.filled(9000, capacity=8192), 0, 0.1)

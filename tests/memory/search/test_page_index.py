"""The page index: groups of similar vectors, ranges of blocks, and files of pages."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.memory import MemoryBank
from llamory.memory.blocks import Block, Span
from llamory.memory.search import page_index
from llamory.memory.search.page_index import balanced_pca_partition, load_pages, page_bytes, save_pages
from llamory.memory.search.pages import PagesSearch

LAYERS, HEADS, SIZE = [2, 5], 2, 16


@pytest.fixture(params=["float32", "bfloat16", "int8"])
def make_file(tmp_path, request):
    def make(name: str, tokens: int, seed: int = 0, fingerprint: str = "me"):
        torch.manual_seed(seed)
        bank = MemoryBank(LAYERS, HEADS, SIZE, dtype=request.param, fingerprint=fingerprint)
        for layer in LAYERS:
            bank.append(layer, torch.randn(HEADS, tokens, SIZE), torch.randn(HEADS, tokens, SIZE), segment=name)
        bank.save(tmp_path / name)
        return tmp_path / name

    return make


def attached_bank(banks) -> MemoryBank:
    merged = MemoryBank(LAYERS, HEADS, SIZE, dtype=banks[0].dtype, fingerprint="me")
    for bank in banks:
        merged.attach(bank)
    return merged


def found(banks) -> tuple[torch.Tensor, ...]:
    query = torch.randn(1, 4, 3, SIZE, generator=torch.Generator().manual_seed(1)) * 3
    search = PagesSearch(4)
    return tuple(
        tensor
        for layer in LAYERS
        for tensor in search.attend_with_stats(query, attached_bank(banks), layer, SIZE**-0.5)
    )


def test_loaded_pages_give_the_same_and_none_are_built(make_file, monkeypatch) -> None:
    files = [make_file("a", 5000), make_file("b", 700, seed=1)]
    banks = [MemoryBank.load(file) for file in files]
    for bank, file in zip(banks, files, strict=True):
        save_pages(bank, file.with_suffix(".pages"))
    wanted = found([MemoryBank.load(file) for file in files])
    again = [MemoryBank.load(file) for file in files]
    monkeypatch.setattr(page_index, "_build", None)
    assert all(load_pages(bank, file.with_suffix(".pages")) for bank, file in zip(again, files, strict=True))
    for one, other in zip(found(again), wanted, strict=True):
        assert torch.equal(one, other)


def test_pages_take_at_most_the_estimated_bytes(make_file) -> None:
    for tokens in (1024, 5000):
        file = make_file("a", tokens)
        bank = MemoryBank.load(file)
        save_pages(bank, file.with_suffix(".pages"))
        said = page_bytes(bank, tokens)
        assert file.with_suffix(".pages").stat().st_mode == file.stat().st_mode
        assert 0.8 * said < file.with_suffix(".pages").stat().st_size < said + 4096


def test_a_memory_too_short_for_pages_has_none(make_file) -> None:
    file = make_file("a", 100)
    bank = MemoryBank.load(file)
    save_pages(bank, file.with_suffix(".pages"))
    assert load_pages(bank, file.with_suffix(".pages"))
    assert "paged_ranges" not in bank.spans(2)[0].block.search_cache


@pytest.mark.parametrize(
    "other",
    [{"tokens": 1500}, {"tokens": 1024, "fingerprint": "another"}, {"tokens": 1024, "seed": 1}],
    ids=["length", "model", "content"],
)
def test_pages_of_another_memory_are_refused(make_file, other) -> None:
    file = make_file("a", 1024)
    save_pages(MemoryBank.load(file), file.with_suffix(".pages"))
    bank = MemoryBank.load(make_file("b", **other))
    assert not load_pages(bank, file.with_suffix(".pages"))
    assert not bank.spans(2)[0].block.search_cache


def test_a_flipped_bit_in_the_pages_is_noticed(make_file) -> None:
    file = make_file("a", 1024)
    pages = file.with_suffix(".pages")
    save_pages(MemoryBank.load(file), pages)
    intact = pages.read_bytes()
    for position in range(len(intact) - 1, 0, -997):
        pages.write_bytes(intact[:position] + bytes([intact[position] ^ 1]) + intact[position + 1 :])
        bank = MemoryBank.load(file)
        assert not load_pages(bank, pages)
        assert not bank.spans(2)[0].block.search_cache
    pages.write_bytes(intact)
    assert load_pages(MemoryBank.load(file), pages)


def test_pages_of_a_memory_in_ram_fit_its_file(make_file) -> None:
    file = make_file("a", 1024)
    bank = MemoryBank.load(file).fork()
    for block in {span.block for layer in LAYERS for span in bank.spans(layer)}:
        block.checksum = ""
    save_pages(bank, file.with_suffix(".pages"))
    assert load_pages(bank, file.with_suffix(".pages"))


def test_missing_and_broken_pages_are_refused(make_file, tmp_path) -> None:
    file = make_file("a", 1024)
    bank, pages = MemoryBank.load(file), file.with_suffix(".pages")
    assert not load_pages(bank, pages)
    save_pages(bank, pages)
    pages.write_bytes(pages.read_bytes()[:-5])
    assert not load_pages(MemoryBank.load(file), pages)
    pages.write_bytes(b"nothing")
    assert not load_pages(MemoryBank.load(file), pages)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_similar_vectors_become_neighbours():
    centres = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)) * 10
    names = torch.arange(8).repeat(32)
    vectors = centres[names] + 0.1 * torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    order = balanced_pca_partition(torch.stack([vectors, vectors.flip(0)]), 32)
    for head, names_of_head in zip(order, (names, names.flip(0)), strict=True):
        assert head.sort().values.tolist() == list(range(256))
        assert (names_of_head[head].view(8, 32).float().std(1, correction=0) == 0).all()


def test_equal_vectors_can_be_partitioned():
    order = balanced_pca_partition(torch.ones(1, 64, 4), 16)
    assert order.sort().values.tolist() == [list(range(64))]


@settings(deadline=None)
@given(start=st.integers(0, 3000), length=st.integers(1, 9000))
def test_a_span_is_split_into_ranges_and_a_rest_without_gap_or_overlap(start, length):
    block = Block.allocate(1, 12000, 4, torch.float32)
    ranges, rest = page_index.aligned_ranges(Span(block, start, start + length))
    tokens = [t for a, b in ranges for t in range(a, b)] + [t for span in rest for t in range(span.start, span.stop)]
    assert sorted(tokens) == list(range(start, start + length))
    assert all(a % (b - a) == 0 for a, b in ranges)
    assert sum(len(span) for span in rest) < 2 * page_index.SUPERPAGE_SIZE

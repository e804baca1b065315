"""What every registered search must do. A search that is added to the registry enters these tests by itself."""

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.memory import MemoryBank
from llamory.memory.search import SEARCHES, TOP_K_SEARCHES, Search, make_search

KINDS = [*((name, False) for name in SEARCHES), *((name, True) for name in TOP_K_SEARCHES)]
LAYER, HEADS, KV_HEADS, HEAD_DIM, SCALING = 3, 6, 2, 16, 0.25
ALL = 10**9
DTYPES = ["float32", "bfloat16", "int8"]


@pytest.fixture(params=KINDS, ids=lambda kind: kind[0] + (" top_k" if kind[1] else ""))
def make(request):
    """Constructs the search under test."""
    name, top_k_attention = request.param

    def construct(top_k: int | None = None, **settings) -> Search:
        return make_search(name, top_k, top_k_attention=top_k_attention, **settings)

    construct.top_k_attention = top_k_attention
    return construct


def make_bank(lengths: dict[str, int], dtype: str = "float32") -> MemoryBank:
    bank = MemoryBank([LAYER], KV_HEADS, HEAD_DIM, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for name, tokens in lengths.items():
        keys, values = torch.randn(2, KV_HEADS, tokens, HEAD_DIM, generator=generator)
        bank.append(LAYER, keys, values + 1, segment=name)
    return bank


def reference(memory, query, bank):
    """Dense softmax attention in float64 over the memory as it is stored."""
    keys, values = (part[None].expand(len(query), -1, -1, -1) for part in (bank.keys(LAYER), bank.values(LAYER)))
    return memory.plain_attention(query, keys, values, SCALING)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [2, 6, 8])
def test_a_search_that_reads_all_tokens_is_dense_attention(memory, make, dtype, heads):
    bank, query = make_bank({"a": 500, "b": 41}, dtype), memory.queries(2, heads, 5, HEAD_DIM)
    output, lse = make(ALL).attend(query, bank, LAYER, SCALING)
    assert output.shape == query.shape and output.dtype == query.dtype and lse.dtype == torch.float32
    # AMX reads bfloat16 with a rounded query.
    memory.close((output, lse), reference(memory, query, bank), 2e-2 if dtype == "bfloat16" else 1e-5)


@pytest.mark.parametrize("queries", [1, 200])
def test_the_error_of_the_default_settings_is_within_the_tolerance(memory, make, queries):
    if make.top_k_attention:
        pytest.skip("top-k attention leaves tokens out")
    bank, query = make_bank({"a": 9000, "b": 700, "c": 3}), memory.queries(1, HEADS, queries, HEAD_DIM)
    search = make()
    output, lse = search.attend(query, bank, LAYER, SCALING)
    expected, expected_lse = reference(memory, query, bank)
    error = (output.double() - expected).norm(dim=-1) / bank.values(LAYER).norm(dim=-1).mean()
    assert error.max() <= search.tolerance + 1e-5
    memory.close([lse], [expected_lse], search.tolerance + 1e-5)


def test_segments_may_have_any_order(memory, make):
    bank, query = make_bank({"a": 5000, "b": 300, "c": 4500}), memory.queries(1, HEADS, 2, HEAD_DIM)
    expected = make().attend(query, bank, LAYER, SCALING)
    bank.reorder(["c", "a", "b"])
    memory.close(make().attend(query, bank, LAYER, SCALING), expected, 0.02, size=1)


def test_a_saved_memory_gives_the_same(memory, make, tmp_path):
    bank, query = make_bank({"a": 5000, "b": 300}), memory.queries(1, HEADS, 2, HEAD_DIM)
    bank.save(tmp_path / "memory")
    expected = make().attend(query, bank, LAYER, SCALING)
    loaded = MemoryBank.load(tmp_path / "memory")
    memory.close(make(folder=tmp_path / "indexes").attend(query, loaded, LAYER, SCALING), expected, 0.02, size=1)


def test_an_empty_memory_gives_zero_and_minus_infinity(memory, make):
    for bank in (make_bank({}), make_bank({"a": 0})):
        output, lse = make().attend(memory.queries(1, HEADS, 3, HEAD_DIM), bank, LAYER, SCALING)
        assert (output == 0).all() and (lse == -torch.inf).all()


def test_no_queries_are_no_error(memory, make):
    output, lse = make().attend(memory.queries(1, HEADS, 0, HEAD_DIM), make_bank({"a": 5}), LAYER, SCALING)
    assert output.shape == (1, HEADS, 0, HEAD_DIM) and lse.shape == (1, HEADS, 0)


def test_a_growing_memory_is_seen_at_every_step(memory, make):
    bank, search = make_bank({}), make(ALL)
    for step, tokens in enumerate((1, 5, 250, 1, 300, 40)):
        bank.append(LAYER, *memory.queries(2, KV_HEADS, tokens, HEAD_DIM, seed=step), segment=f"document {step // 2}")
        query = memory.queries(1, HEADS, 2, HEAD_DIM, seed=100 + step)
        memory.close(search.attend(query, bank, LAYER, SCALING), reference(memory, query, bank))


def test_top_k_must_be_positive(make):
    with pytest.raises(LlamoryError, match="at least 1"):
        make(0)

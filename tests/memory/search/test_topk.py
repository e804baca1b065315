"""Reading the best tokens only, against a plain top-k softmax."""

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.memory.search import faiss, make_search, topk


def best_only(query, bank, scaling, top_k):
    """Attention over the top_k best tokens of each query and head."""
    keys, values = bank.tensors()
    groups = query.shape[1] // len(keys)
    keys, values = (part.repeat_interleave(groups, 0).double() for part in (keys, values))
    scores = query.double() @ keys.transpose(1, 2) * scaling
    lowest = scores.topk(min(top_k, scores.shape[-1]), -1).values[..., -1:]
    scores = scores.masked_fill(scores < lowest, -torch.inf)
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("name", ["exact", "faiss"])
@pytest.mark.parametrize("top_k", [1, 5, 32, 10_000])
def test_only_the_best_tokens_of_all_spans_are_read(memory, name, top_k, monkeypatch):
    monkeypatch.setattr(topk, "MAX_SCANNED_TOKENS", 64)
    monkeypatch.setattr(topk, "MAX_GATHERED_ELEMENTS", 5000)
    monkeypatch.setattr(faiss, "MIN_PROBES", 10_000)  # all lists are looked into, so nothing is missed
    bank = memory.filled(5000, capacity=4096 + 300)
    query = memory.queries(2, 6, 7, 16)
    found = make_search(name, top_k, top_k_attention=True).attend(query, bank, 0, 0.25)
    memory.close(found, best_only(query, bank, 0.25, top_k))


def test_an_empty_memory_gives_nothing(memory):
    bank = memory.filled(0)
    output, lse = make_search("faiss", 4, top_k_attention=True).attend(memory.queries(1, 2, 3, 16), bank, 0, 0.25)
    assert not output.any() and torch.isinf(lse).all()


def test_pages_have_no_top_k_attention():
    with pytest.raises(LlamoryError, match="whole pages"):
        make_search("pages", 4, top_k_attention=True)

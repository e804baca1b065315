"""Attention of a batch over its rows' memories, and what searches share."""

import threading

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.memory import MemoryBank
from llamory.memory.blocks import Span
from llamory.memory.search import SEARCHES, base, make_search
from llamory.memory.search.base import attend


@pytest.mark.parametrize("name", SEARCHES)
def test_each_row_gets_what_it_gets_alone(memory, name):
    full, other, empty = memory.filled(300), memory.filled(90, seed=5), memory.Bank(2, 16)
    search, query = make_search(name), memory.queries(5, 4, 3, 16)
    banks = [full, empty, other, full.fork(), full]
    output, lse = attend(query, banks, 0, 0.4, search)
    for row, bank in enumerate(banks):
        alone = search.attend(query[row : row + 1], bank, 0, 0.4)
        memory.close((output[row : row + 1], lse[row : row + 1]), alone)
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


@pytest.mark.parametrize("name", ["pages", "faiss"])
def test_the_log_sum_of_the_tokens_read_is_returned(memory, name):
    bank, query = memory.filled(9000, head_dim=64, capacity=8192), memory.queries(1, 4, 2, 64)
    few, many = (make_search(name, count).attend_with_stats(query, bank, 0, 0.125)[2] for count in (10, 200))
    total = memory.expected(query, bank, 0.125)[1]
    few, many = ((lse.double() - total).exp() for lse in (few, many))
    assert (few < many).all() and (many < 1 + 1e-5).all() and (few > 808 / 9000 / 2).all()


@pytest.mark.parametrize("name", SEARCHES)
def test_buffers_of_inference_mode_can_be_reused_outside(memory, name, monkeypatch):
    monkeypatch.setattr(base, "_buffers", threading.local())
    bank, query = memory.filled(9000, dtype=torch.int8, capacity=8192), memory.queries(1, 4, 3, 16)
    search = make_search(name)
    with torch.inference_mode():
        inside = [tensor.clone() for tensor in search.attend(query, bank, 0, 0.4)]
    memory.close(search.attend(query, bank, 0, 0.4), inside)


@pytest.mark.parametrize("name", SEARCHES)
def test_a_token_costs_no_work_per_document(name, monkeypatch):
    """Spans are listed, sorted and compared once per change of the memory, not once per token (defect 6)."""
    bank = MemoryBank([0], 2, 16, dtype="float32")
    for document in range(40):
        bank.append(0, *torch.randn(2, 2, 300, 16), segment=str(document))
    bank.reorder(bank.segments[::-1])  # one span per document
    query, search = torch.randn(2, 4, 1, 16), make_search(name)
    assert len(bank.spans(0)) >= 40
    banks = [bank, bank.fork()]
    first = attend(query, banks, 0, 0.25, search)
    assert bank.spans(0) is bank.spans(0) is banks[1].spans(0)
    monkeypatch.setattr("llamory.memory.bank.merge_spans", None)
    monkeypatch.setattr("llamory.memory.search.page_index.stable_spans", None)
    monkeypatch.setattr("llamory.memory.search.faiss.stable_spans", None)
    lengths = []
    if name != "exact":  # exact search reads each span and so asks for its length
        monkeypatch.setattr(Span, "__len__", lambda span: lengths.append(span) or span.stop - span.start)
    again = attend(query, banks, 0, 0.25, search)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert name == "faiss" or len(lengths) < 10


def test_invalid_settings_are_refused():
    with pytest.raises(LlamoryError, match="choose one of exact, pages, faiss"):
        make_search("fast")
    with pytest.raises(LlamoryError, match="at least 1"):
        make_search("pages", 0)

"""The chunked losses and their gradients are those of the plain definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.llara import losses
from llamory.llara.losses import bag_of_words, head_losses

VOCABULARY, HIDDEN, ROWS, SLOTS = 37, 8, 40, 3


def plain(hidden, weight, weights, rows, labels, slots, targets, ignored):
    logits = hidden @ weight.T
    ar = -logits[rows].log_softmax(-1)[torch.arange(len(rows)), labels].mean() if len(rows) else torch.zeros(())
    values = []
    for place, words in zip(slots, targets, strict=True):
        words = sorted({w for w in words.tolist() if w >= 0} - set(ignored))
        if words:
            values.append(-logits[place].max(0).values.log_softmax(-1)[words].mean())
    bow = torch.stack(values).mean() if values else torch.zeros(())
    return ar * weights[0] + bow * weights[1], len(values)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_targets_in_any_chunks(data):
    seed = data.draw(st.integers(0, 2**16))
    passages = data.draw(st.integers(1, 6))
    width = data.draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, requires_grad=True)
    weights = torch.tensor([1.0, 0.3, 0.0], requires_grad=True)
    rows = torch.randperm(ROWS, generator=generator)[: data.draw(st.integers(0, ROWS))]
    labels = torch.randint(VOCABULARY, (len(rows),), generator=generator)
    slots = torch.randint(ROWS, (passages, SLOTS), generator=generator)
    targets = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(-2, VOCABULARY - 1), min_size=width, max_size=width),
                           min_size=passages, max_size=passages))
    )  # fmt: skip
    ignored = data.draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=4))
    wanted, with_target = plain(hidden, weight, weights, rows, labels, slots, targets, ignored)

    bag = bag_of_words(slots, targets, torch.tensor(sorted(ignored), dtype=torch.long))
    assert int(bag.valid.any(1).sum()) == with_target
    counts = torch.tensor([len(rows), with_target, 0]).float()
    before = losses._CHUNK_BYTES, losses._MIN_CHUNK_ROWS
    try:
        losses._CHUNK_BYTES, losses._MIN_CHUNK_ROWS = 0, data.draw(st.integers(1, 50))
        total, parts = head_losses(hidden, weight, weights, rows, labels, counts, bag)
    finally:
        losses._CHUNK_BYTES, losses._MIN_CHUNK_ROWS = before
    torch.testing.assert_close(total, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close((parts * weights).sum(), total)
    if wanted.requires_grad and (len(rows) or with_target):
        found = torch.autograd.grad(total * 2, (hidden, weight, weights))
        for a, b in zip(found, torch.autograd.grad(wanted * 2, (hidden, weight, weights)), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_logits_that_would_overflow_or_underflow_stay_finite():
    hidden = torch.tensor([[300.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True)
    rows, labels = torch.tensor([0, 1]), torch.tensor([1, 1])
    total, _ = head_losses(hidden, weight, torch.tensor([1.0, 0, 0]), rows, labels, torch.tensor([2.0, 0, 0]))
    assert total.item() == pytest.approx((600 + 0) / 2)
    total.backward()
    assert torch.isfinite(hidden.grad).all()


def test_without_gradients_nothing_is_kept():
    hidden, weight = torch.randn(4, 8), torch.randn(5, 8)
    rows, labels = torch.tensor([0, 2]), torch.tensor([1, 4])
    with torch.no_grad():
        total, _ = head_losses(hidden, weight, torch.ones(3), rows, labels, torch.tensor([2.0, 0, 0]))
    wanted = torch.nn.functional.cross_entropy((hidden @ weight.T)[rows], labels)
    torch.testing.assert_close(total, wanted)


def test_a_frozen_head_lets_gradients_through():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(5, 8)
    rows, labels = torch.tensor([0, 2]), torch.tensor([1, 4])
    total, _ = head_losses(hidden, weight, torch.ones(3), rows, labels, torch.tensor([2.0, 0, 0]))
    wanted = torch.nn.functional.cross_entropy((hidden @ weight.T)[rows], labels)
    (found,), (expected,) = torch.autograd.grad(total, hidden), torch.autograd.grad(wanted, hidden)
    torch.testing.assert_close(found, expected)


def test_evaluation_computes_no_gradient_of_the_head(monkeypatch):
    hidden, weight = torch.randn(4, 8), torch.randn(5, 8, requires_grad=True)
    rows, labels, counts = torch.tensor([0, 2]), torch.tensor([1, 4]), torch.tensor([2.0, 1, 0])
    bag = bag_of_words(torch.tensor([[1, 3]]), torch.tensor([[2, 3]]), torch.tensor([0]))
    calls = []
    add_gradient = losses._Head._add_gradient

    def count(self, *arguments):
        calls.append(self.grad_weight is not None)
        add_gradient(self, *arguments)

    monkeypatch.setattr(losses._Head, "_add_gradient", count)
    with torch.no_grad():
        evaluated, _ = head_losses(hidden, weight, torch.ones(3), rows, labels, counts, bag)
    assert not calls and not evaluated.requires_grad
    trained, _ = head_losses(hidden, weight, torch.ones(3), rows, labels, counts, bag)
    assert calls == [True, True] and trained.requires_grad
    assert torch.equal(trained, evaluated)

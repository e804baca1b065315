"""Training on rows that were read apart: attention, what memory layers get, and batches."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.longllama import flash_backward as kernels
from llamory.longllama.crossbatch import cross_batch_parts, plan_frozen_contexts
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.instruct.batches import (
    DocumentExamples,
    FrozenContextBatches,
    HiddenStateCache,
    MemorySplit,
    build_context,
    collate_frozen_contexts,
)
from plain_crossbatch import plain_cross_batch
from tiny_models import make_long_llama


def rotary(seq, dim):
    frequencies = 1 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("way", ["cpu", "plain"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_rows_outside_the_batch_equal_the_plain_way(way, data):
    """The plain way has all rows in one batch, and names a row that counts as three of its kind three times."""
    asked, outside, seq = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    kv_heads, groups, dim = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), 8
    some = st.lists(st.sampled_from(range(outside)), unique=True)
    shared = data.draw(some)
    contexts = [shared if data.draw(st.booleans()) else data.draw(some) for _ in range(asked)]
    weights = [[data.draw(st.sampled_from([1, 3])) for _ in seen] for seen in contexts]
    lengths = data.draw(st.none() | st.lists(st.integers(1, seq), min_size=outside, max_size=outside))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))

    def drawn(rows, heads):
        return torch.randn((rows, heads, seq, dim), generator=generator, dtype=torch.float64).requires_grad_()

    near = [drawn(asked, kv_heads * groups), drawn(asked, kv_heads), drawn(asked, kv_heads)]
    far = [drawn(asked, kv_heads * groups), drawn(outside, kv_heads), drawn(outside, kv_heads)]
    cos, sin = rotary(seq, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_backend", lambda query: way)
        given_settings = {"lengths": lengths, "weights": weights, "frozen_contexts": True}
        found = cross_batch_parts(tuple(near), tuple(far), cos, sin, contexts, **given_settings)
        cotangents = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in found]
        got = torch.autograd.grad(list(found), near + far, cotangents)

    def whole(tensor, before):
        empty = tensor.new_zeros(outside if before else asked, *tensor.shape[1:])
        return torch.cat([empty, tensor] if before else [tensor, empty])

    together = [whole(each, True) for each in near]
    others = whole(far[0], True), whole(far[1], False), whole(far[2], False)
    repeated = [
        [row for row, weight in zip(seen, given, strict=True) for _ in range(weight)]
        for seen, given in zip(contexts, weights, strict=True)
    ]
    every = None if lengths is None else [*lengths, *[seq] * asked]
    plain = plain_cross_batch(*together, cos, sin, [[]] * outside + repeated, lengths=every, far=others)
    plain = [part[outside:] for part in plain]
    wanted = torch.autograd.grad(plain, near + far, cotangents, allow_unused=True)
    for one, two in zip(found, plain, strict=True):
        torch.testing.assert_close(one, two, atol=1e-9, rtol=0)
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, torch.zeros_like(one) if two is None else two, atol=1e-9, rtol=0)


def test_rows_that_see_the_same_are_looked_for_at_once():
    looks = plan_frozen_contexts([[0, 1, 2], [0, 1, 2], [2]], 3, 3, [4, 4, 2], [[1, 5, 5], [1, 5, 5], [1]])
    assert [(look.rows.start, look.rows.stop, look.seen, look.length, look.weight) for look in looks] == [
        (0, 2, (0,), 4, 1),
        (0, 2, (1,), 4, 5),
        (0, 2, (2,), 2, 5),
        (2, 3, (2,), 2, 1),
    ]
    with pytest.raises(LlamoryError, match="can't see row 3"):
        plan_frozen_contexts([[3]], 1, 3)


# ---- in the model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mem_projections": True},
        {"mem_positionals": False},
        {"attn_implementation": "eager"},
        {"mem_projections": True, "memory_size_bias": 0.6, "memory_size_bias_start": 7},
    ],
    ids=str,
)
def test_a_question_to_rows_read_apart_is_one_to_a_memory_with_each_mounted(changes):
    model = make_long_llama(max_position_embeddings=8, last_context_length=8, **changes)
    draw = torch.Generator().manual_seed(3)
    rows, lengths = torch.randint(5, 60, (3, 8), generator=draw), [8, 8, 5]
    asked = torch.randint(5, 60, (2, 6), generator=draw)
    contexts = [[0, 1, 2], [1]]
    memory = model.new_memory()
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        model.read(row[:length], memory, segment=str(number))
    rows[2, 5:] = 0
    states = model.model.layer_inputs(rows)
    more = {"contexts": contexts, "context_states": states, "context_lengths": lengths}
    with torch.no_grad():
        got = model.model(asked, **more).last_hidden_state
        for question, seen, hidden in zip(asked, contexts, got, strict=True):
            mounted = model.new_memory()
            mounted.attach(memory, list(map(str, seen)))
            cache = model.memory_cache(mounted)
            wanted = model.model(question[None], past_key_values=cache, last_context_length=8).last_hidden_state
            torch.testing.assert_close(hidden[None], wanted, atol=2e-5, rtol=0)


def test_gradients_of_memory_projections_equal_those_through_rows_of_the_batch():
    """What is read apart is the base's alone, so that nothing is lost by reading it without gradient."""
    model = make_long_llama(max_position_embeddings=8, last_context_length=8, mem_projections=True).train()
    model.requires_grad_(False)
    trained = [each.requires_grad_() for name, each in model.named_parameters() if ".mem_" in name]
    draw = torch.Generator().manual_seed(3)
    rows, asked = torch.randint(5, 60, (3, 8), generator=draw), torch.randint(5, 60, (2, 8), generator=draw)
    targets = torch.randint(5, 60, (2, 8), generator=draw)
    contexts, weights = [[0, 1, 2], [2, 1]], [[1, 3, 1], [2, 1]]
    whole = {"contexts": [[], [], [], *contexts], "context_weights": [[], [], [], *weights]}
    labels = torch.cat([torch.full((3, 8), IGNORE_INDEX), targets])
    plain = model(torch.cat([rows, asked]), shift_labels=labels, **whole).loss
    apart = {"contexts": contexts, "context_weights": weights, "context_states": model.model.layer_inputs(rows)}
    loss = model(asked, shift_labels=targets, **apart).loss
    torch.testing.assert_close(loss, plain)
    for got, wanted in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-4)


def test_states_are_kept_and_are_those_of_rows_read_anew():
    model = make_long_llama(max_position_embeddings=8, last_context_length=8).model
    rows = torch.randint(5, 60, (6, 8), generator=torch.Generator().manual_seed(3))
    lengths = [8, 3, 8, 8, 5, 8]
    rows[5] = rows[0]
    read = []
    whole, model.layer_inputs = model.layer_inputs, lambda ids: (read.append(len(ids)), whole(ids))[1]
    states = HiddenStateCache(2)
    for numbers, new in (([0, 1, 2, 5], 3), ([1, 2], 0), ([3, 4], 2), ([2], 1)):
        got = states.get(model, rows[numbers], [lengths[number] for number in numbers])
        assert sum(read) == new
        read.clear()
        for layer, wanted in whole(rows[numbers]).items():
            for place, number in enumerate(numbers):
                real = slice(lengths[number])
                torch.testing.assert_close(got[layer][place, real], wanted[place, real], atol=1e-6, rtol=0)


# ---- batches -------------------------------------------------------------------------------------------------------


def numbered(count, questions=3, document=7):
    """DocumentExamples with questions, whose tokens tell which they are; every fourth example is of no document."""
    made = {"input_ids": [], "labels": [], "source": [], "document": []}
    for number in range(count):
        size = 0 if number % 4 == 3 else document
        for question in range(questions if size else 1):
            ids = [number] * (size or 9) + [50 + question] * 2 + [60 + question] * 2
            made["input_ids"].append(ids)
            made["labels"].append([IGNORE_INDEX] * (len(ids) - 2) + ids[-2:])
            made["source"].append(f"file:{number}")
            made["document"].append(size)
    return Listed(made)


class Listed:
    """Columns by name, examples by number, as a dataset has them."""

    def __init__(self, columns):
        self.columns = columns

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: all_[key] for name, all_ in self.columns.items()}

    def __len__(self):
        return len(self.columns["source"])


def made(data, proportions=(1.0,), **options):
    return FrozenContextBatches(
        data, proportions, MemorySplit(3, 3, 13, "memory"), **{"rows": 8, "query_token_budget": 30} | options
    )


def test_examples_of_a_document_are_together():
    documents = DocumentExamples(numbered(9))
    assert len(documents) == 9
    assert [len(documents[number]) for number in range(9)] == [3, 3, 3, 1, 3, 3, 3, 1, 3]
    assert {each["source"] for each in documents[4]} == {"file:4"}


def test_a_document_is_in_memory_and_each_question_a_row():
    split = MemorySplit(3, 3, 13, "memory")
    group = build_context(DocumentExamples(numbered(2))[1], split, random.Random(0))
    assert group.rows == [[1] * 3, [1] * 3, [1]]
    assert [(each.ids, each.targets, each.num_visible_rows) for each in group.queries] == [
        ([50 + q, 50 + q, 60 + q], [IGNORE_INDEX, 60 + q, 60 + q], 3) for q in range(3)
    ]
    alone = build_context(DocumentExamples(numbered(4))[3], split, random.Random(0))
    ids = [3] * 9 + [50, 50, 60, 60]
    following = [IGNORE_INDEX] * 10 + [60, 60, IGNORE_INDEX]
    assert sum(map(list, alone.rows), []) == ids[: sum(map(len, alone.rows))]
    for each in alone.queries:
        start = sum(map(len, alone.rows[: each.num_visible_rows]))
        assert list(each.ids) == ids[start : start + len(each.ids)]
        assert list(each.targets) == following[start : start + len(each.ids)]
    assert sum(target != IGNORE_INDEX for each in alone.queries for target in each.targets) == 2


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 20), negatives=st.integers(0, 9), most=st.integers(1, 40))
def test_a_batch_sees_its_document_whole_and_negatives_of_others(seed, negatives, most):
    batches = made([numbered(12)], seed=seed, negatives=negatives, negative_weight=(2, 8), query_token_budget=most)
    for _ in range(3):
        batch = next(batches)
        assert len(batch["context_ids"]) <= 8
        assert len(batch["input_ids"]) == 1 or batch["input_ids"].numel() <= most
        owners = []
        for row in batch["context_ids"].tolist():  # what isn't a document's number goes on with the same text
            owners.append(row[0] if row[0] < 50 else owners[-1])
        assert set(owners) <= {int(source.split(":")[1]) for source in batch["sources"]}
        for seen, weights, target in zip(
            batch["contexts"], batch["context_weights"], batch["shift_labels"], strict=True
        ):
            assert (target != IGNORE_INDEX).any()
            own = [owners[row] for row, weight in zip(seen, weights, strict=True) if weight == 1]
            others = [owners[row] for row, weight in zip(seen, weights, strict=True) if weight != 1]
            assert len(set(own)) <= 1 and not set(own) & set(others)
            if own and own[0] % 4 != 3:
                assert len(own) == owners.count(own[0]) == 3
                assert len(others) == min(negatives, len(owners) - 3)
            assert all(2 <= weight <= 8 for weight in weights if weight != 1)


def test_batches_are_of_one_dataset_and_go_on_where_they_were():
    data = [numbered(8), numbered(12)]
    for each in data[1].columns["source"]:
        assert each.startswith("file")
    data[1].columns["source"] = [f"other:{each}" for each in data[1].columns["source"]]
    running, resumed = (made(data, (0.5, 0.5), negatives=2, stream=1, streams=2) for _ in range(2))
    kinds = set()
    for _ in range(20):
        found = {source.split(":")[0] for source in next(running)["sources"]}
        assert len(found) == 1
        kinds |= found
    assert kinds == {"file", "other"}
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for _ in range(3):
        one, two = next(running), next(resumed)
        assert one["contexts"] == two["contexts"] and one["sources"] == two["sources"]
        assert torch.equal(one["input_ids"], two["input_ids"])
    with pytest.raises(LlamoryError, match="at least 1 token"):
        made([numbered(4)], query_token_budget=0)


def test_rows_that_nobody_may_see_make_no_contexts():
    group = build_context(DocumentExamples(numbered(1))[0], MemorySplit(3, 3, 13), random.Random(0))
    batch = collate_frozen_contexts([group], 0, query_token_budget=99, negatives=5, rng=random.Random(1))
    assert batch["contexts"] == [[0, 1, 2]] * 3 and "context_weights" not in batch
    assert batch["context_lengths"] == [3, 3, 1]

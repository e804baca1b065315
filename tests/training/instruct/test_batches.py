"""Instruction batches: rows in memory, frozen contexts, and what flows between rows."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.instruct.batches import (
    DocumentExamples,
    FrozenContextBatches,
    HiddenStateCache,
    InstructBatches,
    MemorySplit,
    SplitExample,
    build_context,
    collate,
    collate_frozen_contexts,
)
from tiny_models import CONTEXT, LAST, make_long_llama

# ---- rows ------------------------------------------------------------------------------------------------------------


def splits():
    def make(row, last, total, how):
        return MemorySplit(row, min(row, last), total, how)

    return st.builds(
        make, st.integers(1, 9), st.integers(1, 9), st.integers(2, 40), st.sampled_from(["random", "memory", "last"])
    )


@settings(deadline=None)
@given(split=splits(), data=st.data(), seed=st.integers(0, 99))
def test_rows_are_the_published_padding_without_the_padding(split, data, seed):
    length = data.draw(st.integers(1, split.total_length))
    rows = split.split_rows(length, random.Random(seed))
    # The published way: columns of padding and tokens, the last of which are local.
    columns = split.total_length if split.mode != "last" else length
    left = random.Random(seed).randint(0, columns - length) if split.mode == "random" else 0
    padded = [None] * left + list(range(length)) + [None] * (columns - length - left)
    memory = [token for token in padded[: max(0, columns - split.last_context_length)] if token is not None]
    local = [token for token in padded[max(0, columns - split.last_context_length) :] if token is not None]
    windows = [memory[start : start + split.row_length] for start in range(0, len(memory), split.row_length)]
    assert [list(range(*row)) for row in rows] == windows + [local] * bool(local)
    assert len(rows) <= split.max_rows
    assert all(stop - start <= split.row_length for start, stop in rows)


def test_every_split_is_drawn():
    split, rng = MemorySplit(16, 4, 8), random.Random(0)
    assert {split.num_memory_tokens(5, rng) for _ in range(99)} == {1, 2, 3, 4}
    assert {split.num_memory_tokens(8, rng) for _ in range(9)} == {4}


def test_a_batch_by_hand():
    first = SplitExample([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], [(0, 2), (2, 4), (4, 5)])
    second = SplitExample([3, 4], [-100, 4], [(0, 2)])
    batch = collate([first, second], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 8], [9, 0], [3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 1], [1, 0], [1, 1]]
    assert batch["shift_labels"].tolist() == [[-100, 7], [8, 9], [-100, -100], [4, -100]]
    assert batch["contexts"] == [[], [0], [1, 0], []]


def test_negatives_by_hand():
    first = SplitExample([5, 6, 7, 8], [-100, -100, -100, 8], [(0, 2), (2, 4)])
    second = SplitExample([1, 2, 3, 4, 5, 6], [-100, -100, -100, 4, -100, -100], [(0, 2), (2, 4), (4, 6)])
    batch = collate([first, second], 0, negatives=9)
    # The last row of the second example stands behind its answer: nobody else may see it, and it asks nothing.
    assert batch["contexts"] == [[], [0, 2], [], [2, 0], [3, 2]]
    assert collate([first, second], 0, negatives=1)["contexts"] == [[], [0, 2], [], [2, 0], [3, 2]]
    assert collate([first], 0, negatives=3)["contexts"] == [[], [0]]
    assert collate([first, second], 0, negatives=9, negative_weight=(4, 6))["context_weights"] == [
        [],
        [1, 4],
        [],
        [1, 4],
        [1, 1],
    ]
    assert "context_weights" not in collate([first, second], 0, negatives=9)


def test_copies_are_drawn_for_each_row_between_the_least_and_the_most():
    made, drawn = batches([talks()], rows=12, negatives=3, negative_weight=(2, 50), seed=3), []
    for _ in range(30):
        batch = next(made)
        for contexts, weights in zip(batch["contexts"], batch["context_weights"], strict=True):
            assert len(contexts) == len(weights)
            negative = {weight for weight in weights if weight != 1}
            assert len(negative) < 2
            drawn += negative
    assert 2 <= min(drawn) < 4 and 25 < max(drawn) <= 50
    # As many below the geometric mean as above.
    assert 0.3 < sum(weight < 10 for weight in drawn) / len(drawn) < 0.7
    assert len(set(drawn)) > len(drawn) / 2


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_no_row_is_told_its_own_answers(wanted):
    made = [batches([talks()], rows=12, negatives=number, seed=3) for number in (wanted, 0)]
    added = []
    for _ in range(20):
        batch, own = (next(each) for each in made)
        answers = (batch["shift_labels"] != IGNORE_INDEX).any(1).tolist()
        for row, (contexts, earlier) in enumerate(zip(batch["contexts"], own["contexts"], strict=True)):
            assert contexts[: len(earlier)] == earlier
            negatives = contexts[len(earlier) :]
            assert not negatives or answers[row]
            added.append(len(negatives))
            seen, waiting = set(), list(negatives)
            while waiting:
                seen.add(at := waiting.pop())
                waiting += [other for other in batch["contexts"][at] if other not in seen]
            assert not any(answers[at] for at in seen)
    assert max(added) == wanted


def talks():
    """Examples with answers in their last third only, at times with something behind them."""
    made = numbered(24)
    for talk in made:
        size = len(talk["labels"])
        talk["labels"] = [IGNORE_INDEX] * (2 * size // 3) + talk["labels"][2 * size // 3 :]
        talk["labels"][-1] = IGNORE_INDEX if size % 2 and size > 3 else talk["labels"][-1]
    return made


def numbered(count, longest=7, kind=0):
    """Examples whose first token tells which they are."""
    sizes = random.Random(kind)
    return [
        {"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]], "source": f"{kind}:{number}"}
        for number in range(count)
        for ids in [[number, *range(50, 50 + sizes.randint(1, longest - 1))]]
    ]


def batches(data, proportions=(1.0,), rows=6, **options):
    return InstructBatches(data, proportions, MemorySplit(3, 2, 7), rows=rows, **options)


def test_batches_hold_as_many_whole_examples_as_fit():
    data = numbered(20)
    made = batches([data])
    for _ in range(12):
        batch = next(made)
        assert len(batch["input_ids"]) <= 6
        assert len(batch["sources"]) == batch["contexts"].count([])
        following = made._next_example()[1]
        assert len(batch["input_ids"]) + len(following.rows) > 6
        for source in batch["sources"]:
            example = data[int(source.split(":")[1])]
            first = [row for row, ids in enumerate(batch["input_ids"].tolist()) if ids[0] == example["input_ids"][0]]
            end = next((row for row in range(first[0] + 1, len(batch["contexts"])) if not batch["contexts"][row]), None)
            real = batch["attention_mask"][first[0] : end].bool()
            assert batch["input_ids"][first[0] : end][real].tolist() == example["input_ids"]


def test_an_epoch_has_every_example_once_and_another_order_next():
    made = [batches([numbered(24)], stream=stream, streams=2, seed=3) for stream in range(2)]
    orders = [[], []]
    for epoch in range(2):
        for stream in made:
            while stream._counts[0] < 12 * (epoch + 1):
                orders[epoch].append(stream._next_example()[1].source)
                stream._counts[0] += 1
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(example["source"] for example in numbered(24))
    assert orders[0] != orders[1]


def test_examples_come_in_their_proportions():
    made = batches([numbered(5, kind=1), numbered(50, kind=2)], (0.8, 0.2))
    drawn = [source for _ in range(400) for source in next(made)["sources"]]
    share = sum(source.startswith("1:") for source in drawn) / len(drawn)
    assert abs(share - 0.8) < 4 * (0.16 / len(drawn)) ** 0.5
    assert made.state_dict()["drawn"] == [round(share * len(drawn)), round((1 - share) * len(drawn))]


@settings(deadline=None, max_examples=30)
@given(before=st.integers(0, 20), seed=st.integers(0, 5), stream=st.integers(0, 1))
def test_a_resumed_run_sees_the_same_batches(before, seed, stream):
    def make():
        data = [numbered(5, kind=1), numbered(11, kind=2)]
        return batches(data, (0.3, 0.7), seed=seed, stream=stream, streams=2)

    running, resumed = make(), make()
    for _ in range(before):
        next(running)
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for _ in range(3):
        one, two = next(running), next(resumed)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in ("input_ids", "attention_mask", "shift_labels"))
        assert (one["contexts"], one["sources"]) == (two["contexts"], two["sources"])


def test_rows_and_positions_that_do_not_fit_are_refused():
    with pytest.raises(LlamoryError, match="may need 3 rows, but a batch has 2"):
        batches([numbered(3)], rows=2)
    with pytest.raises(LlamoryError, match="negatives must be at least 0"):
        batches([numbered(3)], negatives=-1)
    for negative_weight in ((0, 3), (3, 2), (1, math.inf)):
        with pytest.raises(LlamoryError, match="negative_weight must be two numbers above 0"):
            batches([numbered(3)], negatives=1, negative_weight=negative_weight)
    with pytest.raises(LlamoryError, match="can't have 5 tokens where a row has 4"):
        MemorySplit(4, 5, 9)
    with pytest.raises(LlamoryError, match="seed"):
        batches([numbered(3)], seed=1).load_state_dict(batches([numbered(3)], seed=2).state_dict())


# ---- what the model learns from them ---------------------------------------------------------------------------------


def cut(length, how="random", seed=0, answer=5):
    split = MemorySplit(CONTEXT, LAST, 60, how)
    ids = random.Random(seed).choices(range(3, 97), k=length)
    labels = [IGNORE_INDEX] * (length - answer) + ids[length - answer :]
    return SplitExample(ids, labels, split.split_rows(length, random.Random(seed)))


def loss_of(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "sources"}).loss


@pytest.mark.parametrize("answer", [5, 30])
@pytest.mark.parametrize("length", [60, 41, 31])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_that_of_windows_read_one_by_one(length, seed, answer):
    model, example = make_long_llama(), cut(length, seed=seed, answer=answer)
    loss = loss_of(model, collate([example], 0))
    ids = torch.tensor([example.input_ids])
    start, stop = example.rows[-1]
    with torch.no_grad():
        logits = model(ids, last_context_length=stop - start, use_cache=False).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[-answer - 1 : -1], ids[0, -answer:])
    torch.testing.assert_close(loss, wanted, atol=0, rtol=1e-5)


def test_memory_is_trained_through_and_other_examples_are_not_seen():
    model, kept = make_long_llama(), {}
    for index, layer in enumerate(model.model.layers):

        def keep(module, inputs, output, index=index):
            output.retain_grad()
            kept[index] = output

        layer.self_attn.k_proj.register_forward_hook(keep)
    example, other = cut(60, "last"), cut(41, "last", seed=1)
    batch = collate([other, example, other], 0)
    own = slice(len(other.rows), len(other.rows) + len(example.rows))
    last = own.stop - 1
    targets = torch.full_like(batch["shift_labels"], IGNORE_INDEX)
    targets[last] = batch["shift_labels"][last]
    loss_of(model, batch | {"shift_labels": targets}).backward()
    # At the last layer nothing but memory leads from an earlier row's keys to the last row's loss.
    deepest = kept[2].grad.flatten(1).norm(dim=1)
    assert (deepest[own] > 0).all()
    for layer in kept.values():
        assert (layer.grad[: own.start] == 0).all()
        assert (layer.grad[own.stop :] == 0).all()


def test_an_example_is_learned_alike_in_any_company():
    model, example, other = make_long_llama(), cut(41), cut(60, seed=1)
    alone = collate([example], 0)
    hidden = model(alone["input_ids"], alone["attention_mask"], contexts=alone["contexts"]).hidden_states[0]
    for together in ([example, other], [other, example]):
        batch = collate(together, 0)
        found = model(batch["input_ids"], batch["attention_mask"], contexts=batch["contexts"]).hidden_states[0]
        first = 0 if together[0] is example else len(other.rows)
        for row, (start, stop) in enumerate(example.rows):
            torch.testing.assert_close(found[first + row, : stop - start], hidden[row, : stop - start])


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
                torch.testing.assert_close(got[layer][place, real], wanted[place, real], atol=1e-5, rtol=1e-4)


# ---- batches -------------------------------------------------------------------------------------------------------


def numbered_documents(count, questions=3, document=7):
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
    documents = DocumentExamples(numbered_documents(9))
    assert len(documents) == 9
    assert [len(documents[number]) for number in range(9)] == [3, 3, 3, 1, 3, 3, 3, 1, 3]
    assert {each["source"] for each in documents[4]} == {"file:4"}


def test_a_document_is_in_memory_and_each_question_a_row():
    split = MemorySplit(3, 3, 13, "memory")
    group = build_context(DocumentExamples(numbered_documents(2))[1], split, random.Random(0))
    assert group.rows == [[1] * 3, [1] * 3, [1]]
    assert [(each.ids, each.targets, each.num_visible_rows) for each in group.queries] == [
        ([50 + q, 50 + q, 60 + q], [IGNORE_INDEX, 60 + q, 60 + q], 3) for q in range(3)
    ]
    alone = build_context(DocumentExamples(numbered_documents(4))[3], split, random.Random(0))
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
    batches = made(
        [numbered_documents(12)], seed=seed, negatives=negatives, negative_weight=(2, 8), query_token_budget=most
    )
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
    data = [numbered_documents(8), numbered_documents(12)]
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
    with pytest.raises(LlamoryError, match="query_token_budget must be at least 1"):
        made([numbered_documents(4)], query_token_budget=0)


def test_rows_that_nobody_may_see_make_no_contexts():
    group = build_context(DocumentExamples(numbered_documents(1))[0], MemorySplit(3, 3, 13), random.Random(0))
    batch = collate_frozen_contexts([group], 0, query_token_budget=99, negatives=5, rng=random.Random(1))
    assert batch["contexts"] == [[0, 1, 2]] * 3 and "context_weights" not in batch
    assert batch["context_lengths"] == [3, 3, 1]

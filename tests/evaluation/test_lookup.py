"""The dictionary look-up task and its evaluation."""

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.evaluation.lookup import ANSWER, ASK, BOS, DEFINE, VALUE, Dictionaries, LookupTask, run_lookup
from tiny_models import make_long_llama


def lines_of(row, first, second, task):
    """Keys and values that a half says, read token by token."""
    assert row[0] == BOS
    found, at = {}, 1
    while at < len(row) and row[at] == first:
        key = tuple(row[at + 1 : at + 1 + task.key_length])
        assert row[at + 1 + task.key_length] == second
        value = tuple(row[at + 2 + task.key_length : at + task.line])
        found[key] = (value, at + 2 + task.key_length)
        at += task.line
    assert not any(row[at:])
    return found


@pytest.mark.parametrize("task", [LookupTask(), LookupTask(20, 2, 3, 40), LookupTask(8, 1, 1, 5)], ids=str)
def test_questions_ask_for_what_was_defined(task):
    generator = torch.Generator().manual_seed(1)
    drawn = task.draw(5, generator)
    rows, targets = task.questions(drawn, generator)
    for defined, asked, wanted in zip(task.definitions(drawn).tolist(), rows.tolist(), targets.tolist(), strict=True):
        meanings, questions = lines_of(defined, DEFINE, VALUE, task), lines_of(asked, ASK, ANSWER, task)
        assert {key: value for key, (value, _) in meanings.items()} == {k: v for k, (v, _) in questions.items()}
        expected = [-100] * task.half
        for value, column in questions.values():
            expected[column - 1 : column - 1 + task.value_length] = value
        if len(questions) == task.lines:
            assert wanted == expected
    assert rows.max() < task.vocabulary


def test_the_paper_has_25_lines_of_10_tokens_in_256():
    assert (LookupTask().lines, LookupTask().line, LookupTask().all_keys) == (25, 10, 58**4)


def test_distinct_keys_are_distinct_and_look_random():
    task = LookupTask()
    drawn = task.draw_distinct(2000, torch.Generator().manual_seed(0))
    keys = drawn.keys.view(-1, 4)
    assert len(keys.unique(dim=0)) == len(keys) == 50000
    assert drawn.keys.min() >= 6 and drawn.keys.max() < 64
    counts = torch.stack([torch.bincount(keys[:, place], minlength=64)[6:] for place in range(4)]).float()
    assert (counts - 50000 / 58).abs().max() < 6 * (50000 / 58) ** 0.5


@pytest.mark.parametrize("documents", [1, 8, 128])
def test_confusable_keys_are_half_of_all_keys_of_few_symbols(documents):
    task = LookupTask()
    keys = task.draw_confusable(documents, torch.Generator().manual_seed(documents)).keys.view(-1, 4)
    symbols = len(keys.unique())
    assert len(keys.unique(dim=0)) == len(keys) == 25 * documents
    assert (symbols - 1) ** 4 < 2 * len(keys) <= symbols**4
    assert keys.min() >= 6 and keys.max() < 64


def test_more_documents_begin_with_the_same_ones():
    task = LookupTask()
    few, many = (task.draw_distinct(count, torch.Generator().manual_seed(7)) for count in (3, 500))
    assert torch.equal(few.keys, many.keys[:3]) and torch.equal(few.values, many.values[:3])


def test_more_keys_than_there_are():
    with pytest.raises(LlamoryError, match="different keys"):
        LookupTask(10, 1, 1, 8).draw_distinct(100, torch.Generator())


def test_no_room_for_a_line():
    with pytest.raises(LlamoryError, match="rows of at least 11"):
        LookupTask(half=10)


# ---- evaluation ------------------------------------------------------------------------------------------------------
TASK = LookupTask(vocabulary=20, key_length=2, value_length=2, half=20)


def lookup_model(**changes):
    settings = {"vocab_size": 20, "max_position_embeddings": 20, "last_context_length": 20, "mem_layers": [1]}
    return make_long_llama(**settings | changes)


def test_answers_are_those_of_rows_that_see_all_definitions_at_once():
    """Memory of documents read one by one against one pass in which questions see the definitions' rows."""
    model, documents, asked = lookup_model(), 12, 3
    (cell,) = run_lookup(model, [documents * 20], task=TASK, documents=asked, seed=5)
    drawn = TASK.draw_distinct(documents, torch.Generator().manual_seed(5))
    asked_about = Dictionaries(drawn.keys[:asked], drawn.values[:asked])
    questions, targets = TASK.questions(asked_about, torch.Generator().manual_seed(5))
    rows = torch.cat([TASK.definitions(drawn), questions])
    contexts = [[] for _ in range(documents)] + [list(range(documents))] * asked
    with torch.no_grad():
        hidden = model.model(rows, contexts=contexts).last_hidden_state[documents:]
    right = (model.lm_head(hidden).argmax(-1) == targets)[targets != -100]
    assert 0 < right.sum() < len(right)  # else the comparison would say nothing
    assert cell.accuracy == pytest.approx(right.float().mean().item())
    assert cell.value_accuracy == pytest.approx(right.view(-1, 2).all(1).float().mean().item())
    assert (cell.tokens, cell.num_values) == (240, len(right) // 2)


def test_the_same_is_asked_at_every_length():
    """A memory that is left out of the softmax altogether gives the same answers whatever it holds."""
    model = lookup_model()
    torch.nn.init.zeros_(model.model.layers[1].self_attn.v_proj.weight)
    cells = run_lookup(model, [480, 160], task=TASK, documents=8)
    assert [cell.tokens for cell in cells] == [160, 480]
    assert len({(cell.num_values, cell.accuracy) for cell in cells}) == 1
    (alone,) = run_lookup(model, [160], task=TASK, documents=8)
    (longer,) = run_lookup(model, [640], task=TASK, documents=8)
    assert alone.accuracy == longer.accuracy == cells[0].accuracy > 0


def test_a_memory_too_small_for_the_documents_that_are_asked_about():
    with pytest.raises(LlamoryError, match="at least 60 tokens"):
        run_lookup(lookup_model(), [40], task=TASK, documents=3)


def test_a_model_without_memory():
    with pytest.raises(LlamoryError, match="no memory layers"):
        run_lookup(lookup_model(mem_layers=[]), [400], task=TASK)

"""The look-up evaluation against a plain way of asking."""

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.evaluation.lookup import run_lookup
from llamory.evaluation.lookup_data import Dictionaries, LookupTask
from tiny_models import make_long_llama

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
    assert cell.whole == pytest.approx(right.view(-1, 2).all(1).float().mean().item())
    assert (cell.tokens, cell.asked) == (240, len(right) // 2)


def test_the_same_is_asked_at_every_length():
    """A memory that is left out of the softmax altogether gives the same answers whatever it holds."""
    model = lookup_model()
    torch.nn.init.zeros_(model.model.layers[1].self_attn.v_proj.weight)
    cells = run_lookup(model, [480, 160], task=TASK, documents=8)
    assert [cell.tokens for cell in cells] == [160, 480]
    assert len({(cell.asked, cell.accuracy) for cell in cells}) == 1
    (alone,) = run_lookup(model, [160], task=TASK, documents=8)
    (longer,) = run_lookup(model, [640], task=TASK, documents=8)
    assert alone.accuracy == longer.accuracy == cells[0].accuracy > 0


def test_a_memory_too_small_for_the_documents_that_are_asked_about():
    with pytest.raises(LlamoryError, match="at least 60 tokens"):
        run_lookup(lookup_model(), [40], task=TASK, documents=3)


def test_a_model_without_memory():
    with pytest.raises(LlamoryError, match="no memory layers"):
        run_lookup(lookup_model(mem_layers=[]), [400], task=TASK)

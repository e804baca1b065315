"""Shares of attention equal those of a dense softmax over everything that is seen."""

import pytest
import torch

from llamory.documents import Chunk
from llamory.longllama.cache import LongLlamaCache
from llamory.qa import attribution as shares
from llamory.qa.attribution import BASELINE_FACTOR, AttentionRecorder, cite, sum_mass_by_chunk
from plain_longllama import logits, mounted_sight
from tiny_models import CONTEXT, make_long_llama

DOCUMENTS, QUESTION, ANSWER, OWN = [37, 9, 20], 8, 5, 3


@pytest.fixture(scope="module", params=[{}, {"memory_size_bias": 0.7, "memory_size_bias_start": 9}], ids=str)
def asked(request):
    """A model, the tokens of documents and of a question with its answer, and each layer's dense probabilities."""
    model = make_long_llama(**request.param)
    ids = torch.randint(3, 97, (sum(DOCUMENTS) + QUESTION + ANSWER,), generator=torch.Generator().manual_seed(0))
    dense: dict[int, torch.Tensor] = {}
    seen = mounted_sight(DOCUMENTS, QUESTION + ANSWER, CONTEXT)
    plain = logits(model, ids, seen, list(model.config.mem_layers), attention=dense)
    return model, ids, dense, plain


def ask(model, ids, recorder):
    """Read the documents and feed the question at once, then the answer token by token, as `generate` does."""
    memory, first = model.new_memory(), 0
    for number, length in enumerate(DOCUMENTS):
        model.read(ids[first : first + length], memory, segment=str(number))
        first += length
    cache = model.memory_cache(memory)
    cache.observer = recorder
    rest, found = ids[first:], []
    with torch.no_grad():
        for part in (rest[:QUESTION], *rest[QUESTION:-1].split(1)):
            found.append(model(part[None], past_key_values=cache).logits[0])
    return memory, torch.cat(found)


def mass_of(model, memory, recorder, segments):
    scalings = {layer: model.model.layers[layer].self_attn.scaling for layer in memory.layers}
    return recorder.mass(memory, segments, scalings, baseline_tokens=OWN, question=QUESTION, answer=ANSWER)


def expected(dense, ids):
    first = sum(DOCUMENTS)
    attention_mass = torch.zeros(first, dtype=torch.float64)
    baseline_corrected_mass = torch.zeros(first, dtype=torch.float64)
    for layer in (1, 2):
        for head in range(4):
            baseline = sum(dense[layer][head, first + i, :first] for i in range(OWN)) / OWN
            for column in range(OWN, QUESTION + ANSWER - 1):
                probability = dense[layer][head, first + column, :first]
                baseline_corrected_mass += (probability - BASELINE_FACTOR * baseline).clamp(min=0)
                if column >= QUESTION - 1:
                    attention_mass += probability
    return attention_mass, baseline_corrected_mass


def test_masses_are_those_of_the_dense_softmax(asked) -> None:
    model, ids, dense, plain = asked
    recorder = AttentionRecorder()
    memory, found = ask(model, ids, recorder)
    torch.testing.assert_close(found.double(), plain[sum(DOCUMENTS) : -1], atol=1e-5, rtol=1e-5)
    attention_mass, baseline_corrected_mass = expected(dense, ids)
    mass = mass_of(model, memory, recorder, ["0", "1", "2"])
    torch.testing.assert_close(mass.attention_mass, attention_mass, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass.baseline_corrected_mass, baseline_corrected_mass, atol=1e-5, rtol=1e-4)
    assert float(baseline_corrected_mass.max()) > 0.05


def test_segments_come_in_the_order_asked_for_and_can_be_left_out(asked) -> None:
    model, ids, dense, _ = asked
    recorder = AttentionRecorder()
    memory, _ = ask(model, ids, recorder)
    attention_mass, _ = expected(dense, ids)
    zero, _, two = attention_mass.split(DOCUMENTS)
    mass = mass_of(model, memory, recorder, ["2", "0"])
    torch.testing.assert_close(mass.attention_mass, torch.cat([two, zero]), atol=1e-5, rtol=1e-4)
    assert mass_of(model, memory, recorder, []).attention_mass.shape == (0,)


@pytest.mark.parametrize("chunk", [7, 64])
def test_chunks_make_no_difference(asked, monkeypatch, chunk) -> None:
    model, ids, dense, _ = asked
    monkeypatch.setattr(shares, "SCORE_BATCH_TOKENS", chunk)
    recorder = AttentionRecorder()
    memory, _ = ask(model, ids, recorder)
    torch.testing.assert_close(
        mass_of(model, memory, recorder, ["0", "1", "2"]).attention_mass, expected(dense, ids)[0], atol=1e-5, rtol=1e-4
    )


def test_a_long_answer_is_measured_at_some_steps_the_last_among_them(asked, monkeypatch) -> None:
    model, ids, dense, _ = asked
    monkeypatch.setattr(shares, "MAX_SCORES", 1)
    monkeypatch.setattr(shares, "MIN_STEPS", 1)
    recorder = AttentionRecorder()
    memory, _ = ask(model, ids, recorder)
    first = sum(DOCUMENTS)
    last = sum(dense[layer][:, -2, :first].sum(0) for layer in (1, 2))
    torch.testing.assert_close(
        mass_of(model, memory, recorder, ["0", "1", "2"]).attention_mass, last, atol=1e-5, rtol=1e-4
    )


def test_what_was_asked_before_can_be_forgotten(asked) -> None:
    model, ids, _, _ = asked
    recorder = AttentionRecorder()
    memory, _ = ask(model, ids, recorder)
    wanted = mass_of(model, memory, recorder, ["1"]).baseline_corrected_mass
    recorder.clear()
    memory, _ = ask(model, ids, recorder)
    torch.testing.assert_close(mass_of(model, memory, recorder, ["1"]).baseline_corrected_mass, wanted)
    assert isinstance(model.memory_cache(memory), LongLlamaCache)
    assert model.memory_cache(memory).observer is None


# ---- citations ----

PASSAGES = [Chunk(text, "a.md", text.title(), line) for line, text in enumerate("one two three".split(), start=1)]


def test_a_passages_mass_is_the_sum_over_its_tokens_and_a_mark_in_front_is_nobodys() -> None:
    mass = torch.tensor([[9.0, 1, 2, 3, 4], [0.0, 1, 1, 1, 1]])
    assert sum_mass_by_chunk(mass, [1, 2, 2]).tolist() == [[1, 1], [0, 0], [9, 3]]


def test_those_that_drew_most_come_first_and_shares_are_of_all() -> None:
    cited = cite(PASSAGES, torch.tensor([[6.0, 1.0], [3.0, 3.0], [1.0, 0.0]]), 9)
    assert [(each.location, each.share, each.attention) for each in cited] == [
        ("a.md:2", 0.75, pytest.approx(0.3)),
        ("a.md:1", 0.25, pytest.approx(0.6)),
    ]
    assert (cited[0].text, cited[0].title, cited[0].line, cited[0].source) == ("two", "Two", 2, "a.md")
    assert len(cite(PASSAGES, torch.ones(3, 2), 2)) == 2


def test_where_nothing_was_drawn_the_plain_sums_count() -> None:
    cited = cite(PASSAGES, torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0]]), 9)
    assert [(each.line, each.share) for each in cited] == [(2, 0.75), (1, 0.25)]
    assert cite(PASSAGES, torch.zeros(3, 2), 9) == []

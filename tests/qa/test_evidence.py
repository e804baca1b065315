"""Questions are answered from the documents that make them likeliest, and from all where that says nothing."""

import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.ingest.encode import read_documents_into
from llamory.library import Library
from llamory.memory import SegmentSpan
from llamory.qa import evidence as choosing
from llamory.qa.evidence import (
    COARSE_TOKENS,
    FINE_TOKENS,
    make_evidence_search,
    question_likelihoods,
    select_evidence,
    split_units,
)
from llamory.qa.open_memory import OpenMemory
from plain_longllama import logits, mounted_sight
from tiny_models import make_long_llama

LAYERS, CONTEXT = [0, 1], 16
HOUSES = ("Abbotsford House", "Marlow Lodge", "Quarry Hall")
YEARS = ("1532", "1788", "1915")
FILLER = "The committee met in the afternoon and spoke about the weather and the garden. "


@pytest.fixture(scope="module")
def tiny():
    """A random model, and a memory of three documents of it."""
    model = make_long_llama(mem_layers=LAYERS, max_position_embeddings=CONTEXT, mem_dtype="float32").eval()
    memory, documents = model.new_memory(), {}
    for number, length in enumerate((5, 40, 17)):
        documents[str(number)] = torch.randint(
            0, model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(number)
        )
        model.read(documents[str(number)], memory, segment=str(number))
    return model, memory, documents


@pytest.mark.parametrize(("at_once", "tokens"), [(1, 99), (2, 99), (16, 99), (16, 11), (16, 3)])
def test_likelihoods_are_those_of_a_dense_model_with_one_document(tiny, monkeypatch, at_once, tokens) -> None:
    model, memory, documents = tiny
    monkeypatch.setattr(choosing, "_BATCH_UNITS", at_once)
    monkeypatch.setattr(choosing, "_BATCH_TOKENS", tokens)
    question = torch.tensor([3, 30, 9, 12, 7])
    units = [("2",), ("0",), ("1",), ("0", "2")]
    spans = [[SegmentSpan(name, 0, len(documents[name])) for name in names] for names in units]
    found = question_likelihoods(model, question.tolist(), memory, spans)
    for value, names in zip(found, units, strict=True):
        ids = torch.cat([*(documents[name] for name in names), question])
        seen = mounted_sight([len(documents[name]) for name in names], len(question), CONTEXT)
        plain = logits(model, ids, seen, LAYERS)
        each = plain[-len(question) : -1].double().log_softmax(-1)[range(len(question) - 1), question[1:]]
        assert float(value) == pytest.approx(float(each.sum()), rel=1e-5)


def test_what_makes_a_question_too_unlikely_is_left_out(tiny, monkeypatch) -> None:
    model, memory, _ = tiny
    log_likelihoods = torch.tensor([-30.0, -30 - math.log(99), -30 - math.log(101)])
    monkeypatch.setattr(choosing, "question_likelihoods", lambda *_: log_likelihoods)

    def selected(evidence_ratio: float) -> list[str]:
        return [span.segment for span in select_evidence(model, [1, 2, 3], memory, ["0", "1", "2"], evidence_ratio)]

    assert selected(100) == ["0", "1"]
    assert selected(102) == selected(0) == ["0", "1", "2"]
    assert selected(1) == ["0"]


def test_of_a_long_question_the_end_is_looked_for(monkeypatch) -> None:
    model = make_long_llama(mem_layers=LAYERS, max_position_embeddings=512)
    memory, questions = model.new_memory(), []
    for name in "ab":
        model.read([1, 2, 3], memory, segment=name)
    monkeypatch.setattr(
        choosing, "question_likelihoods", lambda _, question, *__: questions.append(question) or torch.ones(2)
    )
    question = [i % 90 for i in range(400)]
    select_evidence(model, question, memory, "ab", 100)
    assert questions == [question[-128:]]


def test_one_document_or_one_token_is_nothing_to_choose_by(tiny, monkeypatch) -> None:
    model, memory, _ = tiny
    monkeypatch.setattr(choosing, "question_likelihoods", lambda *_: pytest.fail("there is nothing to choose"))
    assert select_evidence(model, [1, 2, 3], memory, ["1"], 100) == [("1", 0, 40)]
    assert select_evidence(model, [1], memory, ["0", "1"], 100) == [("0", 0, 5), ("1", 0, 40)]


def test_choosing_leaves_the_memory_as_it_is(tiny) -> None:
    model, memory, _ = tiny
    lengths = [memory.length(segment=name) for name in memory.segments]
    select_evidence(model, list(range(1, 40)), memory, memory.segments, 100)  # longer than the context
    assert [memory.length(segment=name) for name in memory.segments] == lengths


@pytest.mark.parametrize("training", [True, False])
def test_likelihoods_are_computed_in_evaluation_mode(tiny, monkeypatch, training) -> None:
    model, memory, _ = tiny
    model.train(training)
    modes: list[bool] = []
    hook = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    select_evidence(model, [1, 2, 3], memory, memory.segments, 100)
    hook.remove()
    assert set(modes) == {False}
    assert model.training == training
    model.eval()


# ---- long documents --------------------------------------------------------------------------------------------------


lengths = st.lists(st.sampled_from([0, 1, 3, 300, 2048, 2049, 5000, 70_000]), min_size=1, max_size=40)


@given(lengths, st.sampled_from([FINE_TOKENS, COARSE_TOKENS, 4 * COARSE_TOKENS, 64 * COARSE_TOKENS]))
def test_units_hold_every_token_once_and_are_of_about_one_size(lengths, size) -> None:
    full_spans = [SegmentSpan(str(number), 0, length) for number, length in enumerate(lengths)]
    units = split_units(full_spans, size)
    spans = [span for unit in units for span in unit]
    assert list(dict.fromkeys(span.segment for span in spans)) == [span.segment for span in full_spans]
    for name, _, length in full_spans:
        document_spans = [span for span in spans if span.segment == name]
        assert (document_spans[0].start, document_spans[-1].stop) == (0, length)
        assert all(one.stop == other.start for one, other in pairwise(document_spans))
        assert len(document_spans) == max(1, math.ceil(length / size))
    for unit in units:
        assert sum(stop - start for _, start, stop in unit) <= size
        assert len(unit) == 1 or size > COARSE_TOKENS


@pytest.fixture
def long(monkeypatch):
    """Chooses in documents of so many tokens, one of which is what is asked for; tells how many units it looked at."""

    def run(lengths: list[int], target: tuple[str, int], least: float = -30.0) -> tuple[list[SegmentSpan], int]:
        looked: list[int] = []

        def likelihoods(model, question, memory, units) -> torch.Tensor:
            looked.append(len(units))
            holds = [any(n == target[0] and start <= target[1] < stop for n, start, stop in unit) for unit in units]
            return torch.tensor([-10.0 if each else least for each in holds])

        monkeypatch.setattr(choosing, "question_likelihoods", likelihoods)
        model = make_long_llama(mem_layers=LAYERS, max_position_embeddings=CONTEXT)
        memory = model.new_memory()
        for number, length in enumerate(lengths):
            for layer in LAYERS:
                memory.append(layer, torch.zeros(2, length, 8), torch.zeros(2, length, 8), segment=str(number))
        return select_evidence(model, [1, 2, 3], memory, memory.segments, 100), sum(looked)

    return run


@pytest.mark.parametrize("at", [0, 511, 700, 20_480, 59_999])
def test_of_a_long_document_the_window_and_what_stands_around_it_is_left(long, at) -> None:
    found, looked = long([900, 60_000, 30], ("1", at))
    assert [name for name, _, _ in found] == ["1"]
    ((_, start, stop),) = found
    assert max(0, at - 64) >= start
    assert min(60_000, at + 64) <= stop
    assert stop - start <= 512 + 2 * 64
    assert looked < 2 + 60_000 / 2048 + 1 + 4 + 1


def test_a_document_of_a_window_is_never_cut(long) -> None:
    assert long([900, 60_000, 512], ("2", 5))[0] == [("2", 0, 512)]


@pytest.mark.parametrize("lengths", [[1_000_000], [500] * 1500, [0, *[3] * 1000, 600_000]])
def test_much_memory_is_looked_at_in_large_parts_first(long, lengths) -> None:
    found, looked = long(lengths, (str(len(lengths) - 1), 400 if lengths[-1] == 500 else 300_000))
    assert len(found) == 1
    assert found[0].segment == str(len(lengths) - 1)
    assert looked < 300


def test_a_question_that_is_likely_everywhere_is_answered_from_all(long) -> None:
    found, _ = long([900, 5000, 2000], ("2", 5), least=-11.0)
    assert found == [("0", 0, 900), ("1", 0, 5000), ("2", 0, 2000)]


def test_no_pages_are_made_for_a_question(tiny, monkeypatch) -> None:
    model, memory, _ = tiny
    monkeypatch.setattr(model.config, "mem_search", "pages")
    monkeypatch.setattr("llamory.memory.search.pages.PagesSearch.attend", lambda *_: pytest.fail("pages were searched"))
    select_evidence(model, [1, 2, 3, 4], memory, memory.segments, 100)


@pytest.mark.parametrize(
    ("spans", "top_k_attention", "exact"),
    [
        ([("1", 3, 30)], False, True),
        ([("0", 0, 5), ("1", 3, 30)], False, True),
        ([("0", 0, 5), ("1", 0, 40)], False, False),  # whole documents have pages of their own
        ([("1", 3, 30)], True, False),
    ],
)
def test_few_tokens_of_parts_of_documents_are_read_exactly(tiny, monkeypatch, spans, top_k_attention, exact) -> None:
    model, memory, _ = tiny
    monkeypatch.setattr(model.config, "mem_top_k_attention", top_k_attention)
    found = make_evidence_search(model, memory, [SegmentSpan(*each) for each in spans])
    assert (found is not None) == exact
    monkeypatch.setattr(choosing, "MAX_EXACT_TOKENS", 20)
    assert make_evidence_search(model, memory, [SegmentSpan("1", 3, 30)]) is None


# ---- with the packaged reader ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("houses")
    for house, year in zip(HOUSES, YEARS, strict=True):
        (folder / f"{house}.txt").write_text(f"{FILLER * 3}The roof of {house} was repaired in {year}. {FILLER * 3}")
    return folder


@pytest.fixture(scope="module")
def opened(texts, tmp_path_factory) -> OpenMemory:
    memory_file = tmp_path_factory.mktemp("book") / "book"
    read_documents_into(memory_file, [texts], model="reader", progress=False)
    return OpenMemory(memory_file)


@pytest.mark.slow
def test_facts_of_one_kind_are_told_apart(opened) -> None:
    for house, year in zip(HOUSES, YEARS, strict=True):
        answer = opened.ask(f"When was the roof of {house} repaired?", max_new_tokens=16)
        assert [Path(name).stem for name in answer.evidence_documents] == [house]
        assert year in answer.text
        assert answer.evidence_tokens == opened.memory.length(segment=answer.evidence_documents[0])
        assert answer.seconds >= answer.seconds_to_first_token > 0
    everything = opened.ask("When was the roof of Quarry Hall repaired?", max_new_tokens=1, evidence_ratio=0)
    assert len(everything.evidence_documents) == len(answer.documents) == 3
    assert everything.evidence_tokens == answer.memory_tokens == opened.memory.length()


@pytest.mark.slow
def test_a_chat_turns_from_one_document_to_another(opened, tmp_path) -> None:
    chat = opened.chat()
    for house, year in zip(HOUSES, YEARS, strict=True):
        answer = chat.ask(f"When was the roof of {house} repaired?", max_new_tokens=16)
        assert [Path(name).stem for name in answer.evidence_documents] == [house]
        assert year in answer.text
    assert [Path(name).stem for name in chat.ask("And when?", max_new_tokens=2).evidence_documents] == [HOUSES[-1]]
    assert chat.documents == opened.documents
    chat.save(tmp_path / "saved")
    assert OpenMemory(tmp_path / "saved").documents == (*opened.documents, "conversation")


@pytest.mark.slow
def test_a_library_cites_what_it_answers_from(texts, tmp_path) -> None:
    library = Library(tmp_path / "lib", "default", reader="reader")
    library.add(texts, progress=False)
    answer = library.ask("When was the roof of Marlow Lodge repaired?", max_new_tokens=16)
    assert [Path(name).stem for name in answer.evidence_documents] == ["Marlow Lodge"]
    assert "1788" in answer.text
    assert {Path(citation.source).stem for citation in answer.citations} == {"Marlow Lodge"}


@pytest.mark.parametrize("evidence_ratio", [0.5, -1.0, float("nan")])
def test_a_focus_below_one_is_refused(opened, evidence_ratio) -> None:
    with pytest.raises(LlamoryError, match="evidence_ratio must be at least 1, or 0 to disable it"):
        opened.ask("when", evidence_ratio=evidence_ratio)

"""Chunks fit, and hold every word once, in order."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from llamory.documents import Document, Section, chunk_document, chunking, read_documents
from llamory.errors import LlamoryError
from sample_documents import BYTES, WORDS, byte_tokenizer, read


def chunks_of(
    tmp_path: Path, name: str, text: str, max_tokens: int, tokenizer: PreTrainedTokenizerFast = WORDS
) -> list:
    [document] = read(tmp_path / name, text)
    return list(chunk_document(document, tokenizer, max_tokens))


def test_sentences_are_joined_while_they_fit(tmp_path):
    chunks = chunks_of(tmp_path, "a.txt", "One two three. Four five.\nSix seven.\n\nEight nine ten.", 5)
    assert [(p.text, p.line) for p in chunks] == [
        ("One two three. Four five.", 1),
        ("Six seven.\n\nEight nine ten.", 2),
    ]


def test_a_long_sentence_is_cut_between_words_and_its_rest_joined_with_the_next(tmp_path):
    chunks = chunks_of(tmp_path, "a.txt", "Rain falls. One two three four five. Six seven.", 4)
    assert [p.text for p in chunks] == ["Rain falls.", "One two three four", "five. Six seven."]


def test_sections_stay_apart_but_a_bare_heading_joins_the_next(tmp_path):
    text = "# Guide\n\n## Bees\n\nThey make honey.\n\n## Rain\n\nIt falls down.\n\n## End\n"
    chunks = chunks_of(tmp_path, "a.md", text, 50)
    assert [(p.title, p.line, p.text) for p in chunks] == [
        ("Bees", 1, "# Guide\n\n## Bees\n\nThey make honey."),
        ("Rain", 7, "## Rain\n\nIt falls down.\n\n## End"),
    ]


def test_code_is_cut_between_lines(tmp_path):
    text = "def f():\n    a = 1. + x\n    b = 2\n\n    return a . b\n"
    chunks = chunks_of(tmp_path, "a.py", text, 8)
    assert [(p.text, p.line, p.title) for p in chunks] == [
        ("def f():\n    a = 1. + x", 1, "a.f"),
        ("b = 2\n\nreturn a . b", 3, "a.f"),
    ]


def test_a_chunk_has_its_location(tmp_path):
    lines = json.dumps({"text": "One two.\nThree four."})
    assert [p.location for p in chunks_of(tmp_path, "a.jsonl", lines, 2)] == [f"{tmp_path}/a.jsonl:1"] * 2
    assert [p.location for p in chunks_of(tmp_path, "b.txt", "One two.\nThree four.", 2)] == [
        f"{tmp_path}/b.txt:{line}" for line in (1, 2)
    ]


def test_the_line_of_a_chunk_is_that_of_its_first_word(tmp_path):
    chunks = chunks_of(tmp_path, "a.md", "Bees make honey.\n\n\n\n\nRain falls down.", 3)
    assert [(p.text, p.line) for p in chunks] == [("Bees make honey.", 1), ("Rain falls down.", 6)]


def test_a_word_longer_than_a_chunk_is_cut_within(tmp_path):
    chunks = chunks_of(tmp_path, "a.txt", "x" * 50, 20, byte_tokenizer(256))
    assert [len(p.text) for p in chunks] == [20, 20, 10]


def test_a_chunk_has_at_least_one_token(tmp_path):
    with pytest.raises(LlamoryError, match="at least 1 token"):
        chunks_of(tmp_path, "a.txt", "One.", 0)


def test_a_huge_section_is_cut_in_pieces_and_keeps_words_and_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(chunking, "_MAX_PIECE_CHARACTERS", 64)
    monkeypatch.setattr(chunking, "_BATCH_CHARACTERS", 100)
    lines = [f"Line {i} says {'so ' * (i % 5)}much." + "\n" * (i % 7 == 0) for i in range(200)] + ["x" * 300, "end"]
    text = "\n".join(lines)
    chunks = chunks_of(tmp_path, "a.txt", text, 6)
    assert "".join("".join(p.text for p in chunks).split()) == "".join(text.split())
    written = text.split("\n")
    assert all(p.text.split()[0] in written[p.line - 1] for p in chunks)


TEXTS = st.lists(
    st.sampled_from([*"abehinrt.,!? \n\t\x0c\u2028é’“”。今🐝", "the ", "hive. ", "\n\n", "Hello. "]), max_size=200
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, max_tokens=st.integers(4, 60), code=st.booleans())
def test_chunks_fit_and_hold_every_word_once_in_order(tmp_path_factory, text, max_tokens, code):
    path = tmp_path_factory.getbasetemp() / ("any.c" if code else "any.txt")
    path.write_text(text + "end", encoding="utf-8")
    [document] = read_documents(path)
    chunks = list(chunk_document(document, BYTES, max_tokens))
    assert "".join("".join(p.text for p in chunks).split()) == "".join(document.text.split())
    # No character of these texts takes more than 4 tokens, so every passage can fit.
    assert max(len(BYTES(p.text)["input_ids"]) for p in chunks) <= max_tokens
    lines = document.text.split("\n")
    assert all(p.text.split()[0] in " ".join(lines[p.line - 1].split()) for p in chunks)


@settings(max_examples=100, deadline=None)
@given(sentences=st.lists(st.integers(1, 9), min_size=1, max_size=20), max_tokens=st.integers(1, 20))
def test_no_chunk_could_have_taken_the_next_sentence(sentences, max_tokens):
    text = " ".join(" ".join(["Word"] * (n - 1) + ["end."]) if n > 1 else "End." for n in sentences)
    document = Document(text, "a.txt", "a", (Section(text, "a", 1),))
    taken = [len(p.text.split()) for p in chunk_document(document, WORDS, max_tokens)]
    # The same by plain arithmetic: a sentence is joined if it fits, a longer one is cut into full pieces and a rest.
    pieces = []
    for length in sentences:
        full, rest = divmod(length, max_tokens) if length > max_tokens else (0, length)
        pieces += [max_tokens] * full + ([rest] if rest else [])
    expected = [0]
    for piece in pieces:
        if expected[-1] + piece > max_tokens:
            expected.append(0)
        expected[-1] += piece
    assert taken == expected

"""Documents: every kind of file is read into its parts, and passages fit, in order, without loss."""

import io
import json
import logging
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llamory.documents import Document, Section, chunk_document, find_files, read_documents
from llamory.documents import chunking as chunking_module
from llamory.errors import LlamoryError


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the bees in the hive make honey and the rain falls in the hills. " * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word and every punctuation mark is one (unknown) token, so tokens can be counted by hand."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


BYTES, WORDS = byte_tokenizer(300), word_tokenizer()


def read(path: Path, text: str | bytes, **settings: object) -> list[Document]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return list(read_documents(path, **settings))


def parts(document: Document) -> list[tuple[str, int]]:
    return [(section.title, section.line) for section in document.sections]


# ---- finding files ---------------------------------------------------------------------------------------------------


def test_folders_are_searched_in_order_without_hidden_files_and_unknown_kinds(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", ".git/d.txt", "sub/.e.txt", "f.png", "sub/G.HTML"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    found = find_files([tmp_path / "b.txt", tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b.txt", "a.md", "sub/G.HTML", "sub/c.py"]


def test_what_cannot_be_read_is_told_in_a_sentence(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(LlamoryError, match=r"no file or folder .*missing"):
        find_files([tmp_path / "missing.txt"])
    with pytest.raises(LlamoryError, match=r"folder .* has no documents"):
        find_files([tmp_path / "folder"])
    with pytest.raises(LlamoryError, match=r"empty\.txt is empty"):
        find_files([tmp_path / "empty.txt"])
    with pytest.raises(LlamoryError, match=r"photo\.png is not of a kind"):
        find_files([tmp_path / "photo.png"])
    with pytest.raises(LlamoryError, match="has any text"):
        find_files([tmp_path])
    with pytest.raises(LlamoryError, match="No documents were given"):
        find_files([])


def test_an_empty_file_in_a_folder_is_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "b.txt").write_text("Rain.")
    assert [document.source for document in read_documents(tmp_path)] == [str(tmp_path / "b.txt")]


def test_files_that_hold_no_words_are_an_error_in_the_end(tmp_path):
    with pytest.raises(LlamoryError, match="No text could be read"):
        read(tmp_path / "a.html", "<p><br></p>")


# ---- kinds of files --------------------------------------------------------------------------------------------------


def test_markdown_has_its_sections_but_no_headings_inside_code(tmp_path):
    text = "Intro.\n\n# The *Guide*\n\nHello.\n\n```sh\n# no heading\n```\n\nSecond\n------\nDeep `x`.\n\n> # Quoted\n"
    [document] = read(tmp_path / "a.md", text)
    assert document.title == "The Guide"
    assert parts(document) == [("The Guide", 1), ("The Guide", 3), ("Second", 11)]
    assert document.sections[2].text == "Second\n------\nDeep `x`.\n\n> # Quoted"
    assert document.text == text


def test_markdown_front_matter_is_no_heading(tmp_path):
    [document] = read(tmp_path / "a.md", "---\ntitle: x\n---\n# Real\nText.\n")
    assert parts(document) == [("Real", 1), ("Real", 4)]


def test_rst_has_its_sections_with_and_without_overline(tmp_path):
    text = "=====\nGuide\n=====\n\nHello.\n\nPart\n----\n\nA table::\n\n    ab\n    --\n\n----\n\nEnd.\n"
    [document] = read(tmp_path / "a.rst", text)
    assert document.title == "Guide"
    assert parts(document) == [("Guide", 1), ("Part", 7)]


def test_html_gives_what_a_reader_sees(tmp_path):
    text = (
        "<html><head><title>My\n page</title><style>p {}</style></head>\n<body><p>Before.</p>\n"
        "<h1>Bees &amp; <i>honey</i></h1>\n<script>var x = '<p>no</p>';</script><p>They  make\nho<b>ney</b>.<p>Daily."
        "<ul><li>one<li>two</ul>\n<pre>a\n  b</pre><!-- hidden -->\n<h2>Rain</h2>It falls."
    )
    [document] = read(tmp_path / "a.html", text)
    assert document.title == "My page"
    assert parts(document) == [("My page", 3), ("Bees & honey", 4), ("Rain", 9)]
    assert document.sections[1].text == "Bees & honey\n\nThey make honey.\n\nDaily.\n\none\ntwo\n\na\n  b"
    assert " ".join(document.text.split()) == "Before. Bees & honey They make honey. Daily. one two a b Rain It falls."


def test_text_has_paragraphs(tmp_path):
    [document] = read(tmp_path / "notes.txt", "\n\nOne\ntwo.\n \nThree.\n")
    assert document.sections == (Section("One\ntwo.", "notes", 3), Section("Three.", "notes", 6))


def test_python_has_functions_and_methods_and_the_code_around_them(tmp_path):
    text = '''"""About bees."""

import os

@cache
def find(x):
    """Find it."""
    def inner(): pass
    return x

class Hive:
    """Their home."""
    size = 1

    # How many.
    async def count(self):
        return 1

if os:
    def late(): pass
LAST = find(1)
'''
    [document] = read(tmp_path / "bees.py", text)
    assert parts(document) == [
        ("bees", 1),
        ("bees", 3),
        ("bees.find", 5),
        ("bees.Hive", 11),
        ("bees.Hive.count", 15),
        ("bees", 19),
        ("bees.late", 20),
        ("bees", 21),
    ]
    assert document.sections[4].text == "    # How many.\n    async def count(self):\n        return 1"
    assert " ".join(section.text for section in document.sections).split() == text.split()


def test_python_that_does_not_parse_is_read_as_text(tmp_path):
    [document] = read(tmp_path / "old.py", "print 'x'\n\nprint 'y'\n")
    assert parts(document) == [("old", 1), ("old", 3)]


def test_python_may_declare_its_encoding(tmp_path):
    [document] = read(tmp_path / "a.py", "# -*- coding: latin-1 -*-\nx = 'ß'\n".encode("latin-1"))
    assert "ß" in document.text


def test_json_lines_are_one_document_each_with_their_line(tmp_path):
    lines = '{"body": "Bees.", "title": "A"}\n\n{"body": " "}\n{"body": "Rain.", "title": null}\n'
    first, second = read(tmp_path / "a.jsonl", lines, text_field="body")
    assert (first.source, first.title, first.text) == (f"{tmp_path}/a.jsonl:1", "A", "Bees.")
    assert (second.source, second.title, second.sections[0].line) == (f"{tmp_path}/a.jsonl:4", "", 4)


def test_a_byte_order_mark_and_other_newlines_are_no_text(tmp_path):
    assert read(tmp_path / "a.txt", b"\xef\xbb\xbfBees.\r\nRain.")[0].text == "Bees.\nRain."
    assert read(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "Bees."}')[0].text == "Bees."


def test_other_encodings_with_a_mark_are_text(tmp_path):
    for name in ("utf-16", "utf-32"):
        assert read(tmp_path / f"{name}.txt", "Bienen.\r\nRegen ☔.".encode(name))[0].text == "Bienen.\nRegen ☔."


def pdf(pages: list[list[str]], outline: dict[str, int], title: str = "") -> bytes:
    """A PDF file that draws lines of text."""
    writer = PdfWriter()
    font = DictionaryObject({NameObject(f"/{key}"): NameObject(f"/{value}") for key, value in FONT.items()})
    for lines in pages:
        page = writer.add_blank_page(300, 300)
        page[NameObject("/Resources")] = DictionaryObject(
            {NameObject("/Font"): DictionaryObject({NameObject("/F"): font})}
        )
        stream = DecodedStreamObject()
        drawn = "".join(f"({line}) Tj 0 -14 Td " for line in lines)
        stream.set_data(f"BT /F 12 Tf 20 250 Td {drawn}ET".encode())
        page[NameObject("/Contents")] = stream
    for heading, page_number in outline.items():
        writer.add_outline_item(heading, page_number)
    if title:
        writer.add_metadata({"/Title": title})
    file = io.BytesIO()
    writer.write(file)
    return file.getvalue()


FONT = {"Type": "Font", "Subtype": "Type1", "BaseFont": "Helvetica", "Encoding": "WinAnsiEncoding"}


def test_pdf_has_pages_under_the_headings_of_its_outline(tmp_path):
    pages = [["A word first."], ["Bees", "make honey."], [], ["More of bees."], ["Rain falls."]]
    [document] = read(tmp_path / "book.pdf", pdf(pages, {"Bees": 1, "Rain": 4}, title="A book"))
    assert document.title == "A book"
    assert [(b.title, b.page, b.text) for b in document.sections] == [
        ("A book", 1, "A word first."),
        ("Bees", 2, "Bees\nmake honey."),
        ("Bees", 4, "More of bees."),
        ("Rain", 5, "Rain falls."),
    ]
    passages = list(chunk_document(document, WORDS, 4))
    assert [p.location.removeprefix(f"{tmp_path}/") for p in passages] == [f"book.pdf, page {n}" for n in (1, 2, 4, 5)]


def test_pdf_without_a_title_or_outline_has_the_name_of_its_file(tmp_path):
    [document] = read(tmp_path / "b.pdf", pdf([["One."], ["Two."]], {}))
    assert [(b.title, b.page) for b in document.sections] == [("b", 1), ("b", 2)]


def test_pdf_that_cannot_be_read_says_why(tmp_path):
    locked = PdfWriter(clone_from=io.BytesIO(pdf([["One."]], {})))
    locked.encrypt("secret", algorithm="RC4-128")
    file = io.BytesIO()
    locked.write(file)
    for name, data, reason in [
        ("locked", file.getvalue(), "needs a password"),
        ("scan", pdf([[], []], {}), "has no text"),
        ("cut", pdf([["One."]], {})[:200], "can't be read as PDF"),
    ]:
        with pytest.raises(LlamoryError, match=rf"{name}\.pdf {reason}"):
            read(tmp_path / f"{name}.pdf", data)


def test_notebooks_have_their_cells_under_the_headings_before_them(tmp_path):
    cells = [
        ("markdown", ["# Bees\n", "\n", "A study."]),
        ("code", "import hive\n\nhive.count()"),
        ("markdown", "Some text.\n\n## Rain\n\nIt falls."),
        ("code", ["x = 1"]),
    ]
    notebook = {"cells": [{"cell_type": kind, "source": source, "outputs": ["no"]} for kind, source in cells]}
    [document] = read(tmp_path / "study.ipynb", json.dumps(notebook))
    assert document.title == "Bees"
    assert [(b.title, b.page, b.line, b.text) for b in document.sections] == [
        ("Bees", 1, 1, "# Bees\n\nA study."),
        ("Bees", 2, 1, "import hive"),
        ("Bees", 2, 3, "hive.count()"),
        ("Bees", 3, 1, "Some text."),
        ("Rain", 3, 3, "## Rain\n\nIt falls."),
        ("Rain", 4, 1, "x = 1"),
    ]
    assert [p.location for p in chunk_document(document, WORDS, 5)][-1] == f"{tmp_path}/study.ipynb, cell 4"


# ---- what is broken --------------------------------------------------------------------------------------------------

BROKEN_LINES = {
    '{"text": "x"': "not valid JSON",
    "[1]": "should be a JSON object",
    '{"txt": "x"}': "no 'text'",
    '{"text": 3}': "should be a string, not int",
    '{"text": "\\ud800"}': "not valid Unicode",
}


@pytest.mark.parametrize(("line", "reason"), BROKEN_LINES.items())
def test_a_broken_json_line_is_named_with_its_number(tmp_path, line, reason):
    with pytest.raises(LlamoryError, match=rf"a\.jsonl:3: .*{reason}"):
        read(tmp_path / "a.jsonl", '{"text": "good"}\n\n' + line + "\n")


def test_broken_lines_can_be_passed_over_with_a_count(tmp_path, caplog):
    lines = ['{"text": "first"}', *BROKEN_LINES, '{"text": "last"}']
    path = tmp_path / "a.jsonl"
    with caplog.at_level(logging.WARNING):
        documents = read(path, "\n".join(lines).encode() + b'\n{"text": "\xff"}\n', skip_broken=True)
    assert [document.text for document in documents] == ["first", "last"]
    assert f"{len(BROKEN_LINES) + 1} broken lines" in caplog.text
    assert f"{path}:2" in caplog.text


def test_a_file_that_is_not_utf8_is_named_with_its_line_or_passed_over(tmp_path, caplog):
    (tmp_path / "b.txt").write_text("Rain.")
    (tmp_path / "a.txt").write_bytes("Bees.\ncaf\xe9".encode("latin-1"))
    with pytest.raises(LlamoryError, match=r"a\.txt:2: the file is not UTF-8"):
        list(read_documents(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert [document.text for document in read_documents(tmp_path, skip_broken=True)] == ["Rain."]
    assert "a.txt:2" in caplog.text


# ---- passages --------------------------------------------------------------------------------------------------------


def cut(tmp_path: Path, name: str, text: str, max_tokens: int, tokenizer: PreTrainedTokenizerFast = WORDS) -> list:
    [document] = read(tmp_path / name, text)
    return list(chunk_document(document, tokenizer, max_tokens))


def test_sentences_are_joined_while_they_fit(tmp_path):
    passages = cut(tmp_path, "a.txt", "One two three. Four five.\nSix seven.\n\nEight nine ten.", 5)
    assert [(p.text, p.line) for p in passages] == [
        ("One two three. Four five.", 1),
        ("Six seven.\n\nEight nine ten.", 2),
    ]


def test_a_long_sentence_is_cut_between_words_and_its_rest_joined_with_the_next(tmp_path):
    passages = cut(tmp_path, "a.txt", "Rain falls. One two three four five. Six seven.", 4)
    assert [p.text for p in passages] == ["Rain falls.", "One two three four", "five. Six seven."]


def test_sections_stay_apart_but_a_bare_heading_joins_the_next(tmp_path):
    text = "# Guide\n\n## Bees\n\nThey make honey.\n\n## Rain\n\nIt falls down.\n\n## End\n"
    passages = cut(tmp_path, "a.md", text, 50)
    assert [(p.title, p.line, p.text) for p in passages] == [
        ("Bees", 1, "# Guide\n\n## Bees\n\nThey make honey."),
        ("Rain", 7, "## Rain\n\nIt falls down.\n\n## End"),
    ]


def test_code_is_cut_between_lines(tmp_path):
    text = "def f():\n    a = 1. + x\n    b = 2\n\n    return a . b\n"
    passages = cut(tmp_path, "a.py", text, 8)
    assert [(p.text, p.line, p.title) for p in passages] == [
        ("def f():\n    a = 1. + x", 1, "a.f"),
        ("b = 2\n\nreturn a . b", 3, "a.f"),
    ]


def test_a_passage_tells_its_place(tmp_path):
    lines = json.dumps({"text": "One two.\nThree four."})
    assert [p.location for p in cut(tmp_path, "a.jsonl", lines, 2)] == [f"{tmp_path}/a.jsonl:1"] * 2
    assert [p.location for p in cut(tmp_path, "b.txt", "One two.\nThree four.", 2)] == [
        f"{tmp_path}/b.txt:{line}" for line in (1, 2)
    ]


def test_the_line_of_a_passage_is_that_of_its_first_word(tmp_path):
    passages = cut(tmp_path, "a.md", "Bees make honey.\n\n\n\n\nRain falls down.", 3)
    assert [(p.text, p.line) for p in passages] == [("Bees make honey.", 1), ("Rain falls down.", 6)]


def test_a_word_longer_than_a_passage_is_cut_within(tmp_path):
    passages = cut(tmp_path, "a.txt", "x" * 50, 20, byte_tokenizer(256))
    assert [len(p.text) for p in passages] == [20, 20, 10]


def test_a_passage_needs_room_for_a_token(tmp_path):
    with pytest.raises(LlamoryError, match="at least 1 token"):
        cut(tmp_path, "a.txt", "One.", 0)


def test_a_huge_section_is_cut_in_pieces_and_keeps_words_and_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(chunking_module, "_PIECE_CHARACTERS", 64)
    monkeypatch.setattr(chunking_module, "_CALL_CHARACTERS", 100)
    lines = [f"Line {i} says {'so ' * (i % 5)}much." + "\n" * (i % 7 == 0) for i in range(200)] + ["x" * 300, "end"]
    text = "\n".join(lines)
    passages = cut(tmp_path, "a.txt", text, 6)
    assert "".join("".join(p.text for p in passages).split()) == "".join(text.split())
    written = text.split("\n")
    assert all(p.text.split()[0] in written[p.line - 1] for p in passages)


TEXTS = st.lists(
    st.sampled_from([*"abehinrt.,!? \n\t\x0c\u2028é’“”。今🐝", "the ", "hive. ", "\n\n", "Hello. "]), max_size=200
).map("".join)


@settings(max_examples=150, deadline=None)
@given(text=TEXTS, max_tokens=st.integers(4, 60), code=st.booleans())
def test_passages_fit_and_hold_every_word_once_in_order(tmp_path_factory, text, max_tokens, code):
    path = tmp_path_factory.getbasetemp() / ("any.c" if code else "any.txt")
    path.write_text(text + "end", encoding="utf-8")
    [document] = read_documents(path)
    passages = list(chunk_document(document, BYTES, max_tokens))
    assert "".join("".join(p.text for p in passages).split()) == "".join(document.text.split())
    # No character of these texts takes more than 4 tokens, so every passage can fit.
    assert max(len(BYTES(p.text)["input_ids"]) for p in passages) <= max_tokens
    lines = document.text.split("\n")
    assert all(p.text.split()[0] in " ".join(lines[p.line - 1].split()) for p in passages)


@settings(max_examples=100, deadline=None)
@given(sentences=st.lists(st.integers(1, 9), min_size=1, max_size=20), max_tokens=st.integers(1, 20))
def test_no_passage_could_have_taken_the_next_sentence(sentences, max_tokens):
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

"""PDF files."""

import io
import logging

import pytest
from pypdf import PdfReader, PdfWriter
from pypdf.errors import PdfReadError

from llamory.documents import chunk_document
from llamory.errors import LlamoryError
from sample_documents import WORDS, pdf, read


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


def test_a_damaged_outline_is_a_warning_and_the_text_is_read(tmp_path, monkeypatch, caplog):
    def damaged(reader):
        raise PdfReadError("no outline")

    monkeypatch.setattr(PdfReader, "outline", property(damaged))
    with caplog.at_level(logging.WARNING):
        [document] = read(tmp_path / "a.pdf", pdf([["Bees."]], {"Bees": 0}, title="A book"))
    assert [(section.title, section.text) for section in document.sections] == [("A book", "Bees.")]
    assert f"The outline of {tmp_path / 'a.pdf'} is damaged" in caplog.text


def test_a_fault_of_the_program_is_no_broken_file(tmp_path, monkeypatch):
    class Fault(Exception):
        pass

    def failing(*_):
        raise Fault

    monkeypatch.setattr("llamory.documents.formats.pdf._clean_text", failing)
    with pytest.raises(Fault):
        read(tmp_path / "a.pdf", pdf([["Bees."]], {}))

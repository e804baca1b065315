"""Markdown, reStructuredText and Jupyter notebooks."""

import json

from llamory.documents import chunk_document
from sample_documents import WORDS, parts, read


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

"""Jupyter notebooks."""

import json

from llamory.documents import chunk_document
from sample_documents import WORDS, read


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

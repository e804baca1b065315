"""What every registered format must do. A format that is added needs a sample here."""

import json

import pytest

from llamory.documents import SUFFIXES, chunk_document
from llamory.documents.formats import FORMATS, JSON_LINES
from llamory.documents.formats.text import read_text
from llamory.errors import LlamoryError
from sample_documents import WORDS, pdf, read

# By suffix: the content, and the title and the location of its passage "Bees make honey."; None is plain text.
SAMPLES = {
    None: ("Bees make honey.", "sample", ":1"),
    ".md": ("# Bees\n\nBees make honey.", "Bees", ":1"),
    ".markdown": ("Bees\n====\n\nBees make honey.", "Bees", ":1"),
    ".rst": ("Bees\n====\n\nBees make honey.", "Bees", ":1"),
    ".html": ("<title>Bees</title>\n<p>Bees make honey.", "Bees", ":2"),
    ".htm": ("<h1>Bees</h1>\n<p>Bees make honey.", "Bees", ":1"),
    ".py": ("def honey():\n    return 'Bees make honey.'", "sample", ":1"),
    ".ipynb": (json.dumps({"cells": [{"cell_type": "markdown", "source": "Bees make honey."}]}), "sample", ", cell 1"),
    ".pdf": (pdf([["Bees make honey."]], {}, title="Bees"), "Bees", ", page 1"),
    ".jsonl": (json.dumps({"title": "Bees", "text": "Bees make honey."}), "Bees", ":1"),
}


def sample(suffix):
    plain = suffix in FORMATS and FORMATS[suffix].read_bytes is None and FORMATS[suffix].read_text is read_text
    return SAMPLES[None if plain else suffix]


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_a_file_gives_text_title_and_location(tmp_path, suffix):
    content, title, location = sample(suffix)
    path = tmp_path / f"sample{suffix}"
    [document] = read(path, content)
    assert "Bees make honey." in document.text and document.title == title
    assert document.source.removeprefix(str(path)) in ("", ":1")
    assert "".join(section.text for section in document.sections).count("Bees make honey.") == 1
    [chunk] = chunk_document(document, WORDS, 50)
    assert "Bees make honey." in chunk.text and chunk.location == f"{path}{location}"


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
def test_the_suffix_may_be_in_capitals_and_the_file_may_be_empty(tmp_path, suffix):
    (tmp_path / f"empty{suffix}").write_text(" \n")
    with pytest.raises(LlamoryError, match="is empty"):
        read(tmp_path / f"empty{suffix}", " \n")
    [document] = read(tmp_path / f"SAMPLE{suffix.upper()}", sample(suffix)[0])
    assert "Bees make honey." in document.text


@pytest.mark.parametrize("suffix", sorted(SUFFIXES - {JSON_LINES, ".pdf"}))
def test_binary_data_is_refused(tmp_path, suffix):
    with pytest.raises(LlamoryError, match=rf"a\{suffix} is a binary file"):
        read(tmp_path / f"a{suffix}", b"PK\0\1")

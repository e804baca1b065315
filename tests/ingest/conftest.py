"""Small documents, and reading them into a memory with the tiny model."""

from pathlib import Path

import pytest

from llamory.ingest.encode import ReadReport, read_documents_into
from small_texts import SETTINGS, sentence


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three documents of a window at most and two longer ones."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for number, (name, words) in enumerate({"a": 3, "b": 40, "c": 5, "more/d": 90, "more/e": 2}.items()):
        (folder / f"{name}.txt").write_text(sentence(number, words))
    return folder


@pytest.fixture
def read(model_folder: Path, tmp_path: Path):
    """Reads into one memory file with the tiny model."""

    def run(*paths: Path, **settings) -> ReadReport:
        settings = {"model": model_folder, "progress": False} | SETTINGS | settings
        return read_documents_into(tmp_path / "book", paths, **settings)

    return run


@pytest.fixture
def memory_file(tmp_path: Path) -> Path:
    return tmp_path / "book"

"""A reader uses the memories and the configuration that earlier versions stored."""

import shutil
from pathlib import Path

import pytest

from llamory.library import Library
from llamory.library.memory_cache import memory_folder
from llamory.library.reader import ReaderConfig
from llamory.qa.open_memory import OpenMemory

GOLDEN = Path(__file__).parents[1] / "golden" / "version_0_1"
READING = {"mem_layers": [0, 1], "context_length": 16, "mem_dtype": "float32"}


@pytest.fixture
def stored(tmp_path) -> Path:
    """A copy of the files of version 0.1: an answer changes the times of use."""
    return shutil.copytree(GOLDEN, tmp_path / "stored")


def test_memories_of_version_0_1_are_used(stored) -> None:
    library = Library(stored / "library", stored / "embedder", reader=stored / "tiny_reader", **READING)
    answer = library.ask("the cat", mode="bm25", max_new_tokens=2)
    assert answer.documents
    assert answer.tokens_read == 0
    assert library.precompute_memory(progress=False).read == 0


def test_the_reader_config_of_version_0_1_is_read(stored) -> None:
    folder = memory_folder(str(stored / "library"))
    config = ReaderConfig(memory_budget="1GB").with_saved(folder)
    assert config == ReaderConfig("/golden/tiny_reader", **READING, memory_budget="1GB")


def test_a_memory_file_of_version_0_1_is_read(stored) -> None:
    memory = OpenMemory(stored / "memory", model=stored / "tiny_reader")
    assert memory.documents[:2] == ("documents/cats.md", "documents/dogs.txt")
    assert memory.ask("the cat", max_new_tokens=2).answer_tokens

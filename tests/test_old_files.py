"""Files that version 0.1.0 wrote before its terms changed: a library with memories, and a memory file, still open.

`tests/golden/version_0_1` was written by commit 824fd67: three documents, an embedding model that counts four words, a
two-layer LLaMA with random weights, a library with memories of its four documents (float32), a memory file (int8).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from llamory.library import Library
from llamory.memory import MemoryBank, read_header

GOLDEN = Path(__file__).parent / "golden" / "version_0_1"
SOURCES = ["/golden/documents/cats.md", "/golden/documents/lines.jsonl:1", "/golden/documents/dogs.txt"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GOLDEN, tmp_path / "files"))


@pytest.fixture
def library(files: Path) -> Library:
    settings = {"mem_layers": [0, 1], "context_length": 16, "mem_dtype": "float32"}
    return Library(files / "library", model=files / "embedder", reader=files / "tiny_reader", **settings)


def test_a_library_is_searched(library: Library) -> None:
    info = library.info()
    assert (info["documents"], info["passages"], info["dimension"]) == (4, 4, 4)
    hits = library.search("cat river", mode="dense")
    # By hand, of the words cat, dog, river, money: (2, 0, 1, 0), (0, 0, 1, 0) and (6, 6, 0, 6) beside (1, 0, 1, 0).
    assert [hit.source for hit in hits[:3]] == SOURCES
    assert [hit.score for hit in hits[:3]] == pytest.approx([3 / 10**0.5, 1 / 2**0.5, 1 / 6**0.5], rel=1e-5)
    assert {hit.source for hit in library.search("money", mode="bm25")} >= {"/golden/documents/dogs.txt"}


def test_its_memories_are_used_again(library: Library) -> None:
    answer = library.ask("where is the cat?", max_new_tokens=4)
    assert answer.tokens_read == 0
    assert set(answer.documents) >= set(SOURCES)


def test_a_memory_file_is_read(files: Path) -> None:
    header = read_header(files / "memory")
    assert (header["tokens"], header["layers"], header["dtype"]) == (105, [0, 1], "int8")
    bank = MemoryBank.load(files / "memory", verify=True)
    assert list(bank.segments) == [
        source.removeprefix("/golden/") for source in (SOURCES[0], SOURCES[2], SOURCES[1])
    ] + ["documents/lines.jsonl:2"]
    assert bank.metadata("documents/lines.jsonl:1")["title"] == "River"


def test_a_memory_file_is_what_the_model_reads_now(files: Path) -> None:
    from llamory.ingest.encode import read_documents_into

    report = read_documents_into(
        files / "again",
        files / "documents",
        model=files / "tiny_reader",
        mem_layers=[0, 1],
        context_length=16,
        mem_dtype="int8",
        progress=False,
    )
    assert report.added == 4
    old, new = MemoryBank.load(files / "memory"), MemoryBank.load(files / "again")
    assert old.fingerprint == new.fingerprint
    for layer in (0, 1):
        expected, computed = old.keys(layer).float(), new.keys(layer).float()
        assert (computed - expected).abs().max() <= 0.02 * expected.abs().max()  # int8 has 127 steps

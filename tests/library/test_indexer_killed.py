"""A library whose indexing was killed at any moment becomes, with the next run, the same as an undisturbed one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import lancedb
import pytest

from llamory.library import Library

pytestmark = pytest.mark.slow
PROGRAM = Path(__file__).parents[1] / "references" / "killed_indexing.py"
QUERIES = ("cat and dog", "river 3", "the money of the cats", "part 2")


def write_documents(folder: Path) -> None:
    folder.mkdir()
    for i in range(12):
        words = " ".join(word for j, word in enumerate(("cat", "dog", "river", "money")) if i >> j & 1)
        parts = [f"# Part {part}\n\nThe {words} went on, number {part} of {i}." for part in range(1 + i % 3)]
        (folder / f"page {i}.md").write_text("\n\n".join(parts))
    long = "\n\n".join(f"# Part {part}\n\nA cat saw river number {part}." for part in range(10))
    (folder / "a long page.md").write_text(long)
    (folder / "lines.jsonl").write_text("".join(f'{{"text": "a cat, a line {i}"}}\n' for i in range(9)))


def change_documents(folder: Path) -> None:
    (folder / "page 1.md").unlink()
    (folder / "page 2.md").rename(folder / "renamed.md")
    (folder / "page 5.md").write_text("# Part 1\n\nAll about money now.")
    (folder / "page 7.md").write_text((folder / "page 7.md").read_text() + "\n\n# More\n\nA dog came later on.")
    (folder / "lines.jsonl").write_text("".join(f'{{"text": "a dog, a line {i}"}}\n' for i in range(5)))
    (folder / "new.txt").write_text("A new river is found.")


@pytest.fixture(scope="module")
def run(model_folder):
    """Runs jobs in one program, as starting it takes longer than all the rest."""
    program = subprocess.Popen(
        [sys.executable, PROGRAM, model_folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def job(library: Path, docs: Path, *kills: str | float) -> list[str]:
        program.stdin.write(json.dumps({"library": str(library), "docs": str(docs), "kills": kills}) + "\n")
        program.stdin.flush()
        return json.loads(program.stdout.readline())

    yield job
    program.stdin.close()
    program.wait(timeout=60)


def contents(library: Path) -> list[dict]:
    rows = lancedb.connect(library).open_table("passages").to_arrow().to_pylist()
    return sorted(rows, key=lambda row: (row["source"], row["position"]))


def found(library: Path, model: Path) -> list:
    opened = Library(library, model)
    hits = [opened.search(query, top=8, mode=mode) for query in QUERIES for mode in ("dense", "bm25", "fused")]
    return [[(hit.source, hit.text, pytest.approx(hit.score, rel=1e-5)) for hit in some] for some in hits]


def assert_same(library: Path, expected: Path, model: Path) -> None:
    assert contents(library) == contents(expected)
    assert found(library, model) == found(expected, model)


def test_a_killed_first_run(tmp_path, run, model_folder):
    docs = tmp_path / "docs"
    write_documents(docs)
    run(tmp_path / "undisturbed", docs)
    kills = [*(f"e{event}" for event in (0, 1, 2, 3, 5, 7, 9)), 0.02, 0.05, 0.08]
    told = run(tmp_path / "library", docs, *kills)
    assert told.count("killed") >= 6
    assert_same(tmp_path / "library", tmp_path / "undisturbed", model_folder)


def test_a_killed_update(tmp_path, run, model_folder):
    docs = tmp_path / "docs"
    write_documents(docs)
    run(tmp_path / "before", docs)
    change_documents(docs)
    run(tmp_path / "undisturbed", docs)
    killed = 0
    for number, kills in enumerate((["e1", "e3", "e5"], ["e7"], ["e11"], ["e14"], [0.05, 0.1])):
        library = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", library)
        killed += run(library, docs, *kills).count("killed")
        assert_same(library, tmp_path / "undisturbed", model_folder)
    assert killed >= 6

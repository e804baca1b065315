"""The engine's work can be sent elsewhere, and a text that has a vector is never embedded again."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from llamory.library import AddReport, Library
from llamory.library import indexer as engine_module
from llamory.library.indexer import ChunkingConfig, FileTask, process_files


def add(library: Library, *paths: Path, **settings) -> AddReport:
    return library.add(list(paths), progress=False, **settings)


def test_tasks_and_recipes_can_be_sent_to_another_process():
    for thing in (FileTask("/a/b.txt", {"/a/b.txt": "12"}), ChunkingConfig(64, bf16=True)):
        assert pickle.loads(pickle.dumps(thing)) == thing


def test_files_become_batches_of_whole_documents_with_their_vectors(tmp_path, embedder, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNKS_PER_BATCH", 2)
    for name, text in [("a", "cat"), ("b", "# One\n\nthe dog ran off\n\n# Two\n\nthe river ran off"), ("c", "money")]:
        (tmp_path / f"{name}.md").write_text(text)
    tasks = [FileTask(str(tmp_path / f"{name}.md")) for name in "abc"]
    batches = list(process_files(tasks, ChunkingConfig(64), embedder, lambda texts: {}))
    assert [[Path(row["source"]).stem for row in batch.rows] for batch in batches] == [["a", "b", "b"], ["c"]]
    assert [len(batch.completed_files) for batch in batches] == [1, 2]
    unit = np.eye(4, dtype=np.float32)
    np.testing.assert_allclose(batches[0].vectors / batches[0].vectors.sum(1, keepdims=True), unit[:3])


def test_a_renamed_or_copied_file_is_not_embedded_again(tmp_path, docs, model_folder, embedded):
    library = Library(tmp_path / "library", model_folder)
    add(library, docs)
    before = {hit.text: hit.score for hit in library.search("cat dog", top=9, mode="dense")}
    (docs / "cats.txt").rename(docs / "felines.txt")
    (docs / "copy.md").write_text((docs / "pets" / "dogs.md").read_text())
    embedded.clear()
    assert add(library, docs) == AddReport(added=2, unchanged=2, removed=1, passages=2)
    assert embedded == []
    assert {hit.text: hit.score for hit in library.search("cat dog", top=9, mode="dense")} == pytest.approx(before)


def test_a_text_that_a_run_meets_twice_is_embedded_once(tmp_path, model_folder, embedded, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNKS_PER_BATCH", 1)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("the same cat")
    library = Library(tmp_path / "library", model_folder)
    assert add(library, tmp_path).added == 3
    assert embedded == ["the same cat"]

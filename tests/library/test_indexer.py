"""Files become batches of documents; no text is embedded twice; what can't be read is listed and the rest goes in."""

import os
import pickle
import sys
from pathlib import Path

import lancedb
import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from llamory import embedding
from llamory.documents import SkippedFile
from llamory.documents import scan as storage_module
from llamory.errors import LlamoryError
from llamory.library import AddReport, Library
from llamory.library import indexer as indexer_module
from llamory.library.indexer import ChunkingConfig, FileTask, index_files


def add(library: Library, *paths: Path, **settings) -> AddReport:
    return library.add(list(paths), progress=False, **settings)


def test_tasks_and_recipes_can_be_sent_to_another_process():
    for thing in (FileTask("/a/b.txt", {"/a/b.txt": "12"}), ChunkingConfig(64, bf16=True)):
        assert pickle.loads(pickle.dumps(thing)) == thing


def test_files_become_batches_of_whole_documents_with_their_vectors(tmp_path, embedder, monkeypatch):
    monkeypatch.setattr(indexer_module, "CHUNKS_PER_BATCH", 2)
    for name, text in [("a", "cat"), ("b", "# One\n\nthe dog ran off\n\n# Two\n\nthe river ran off"), ("c", "money")]:
        (tmp_path / f"{name}.md").write_text(text)
    tasks = [FileTask(str(tmp_path / f"{name}.md")) for name in "abc"]
    batches = list(index_files(tasks, ChunkingConfig(64), embedder, lambda texts: {}))
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
    monkeypatch.setattr(indexer_module, "CHUNKS_PER_BATCH", 1)
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("the same cat")
    library = Library(tmp_path / "library", model_folder)
    assert add(library, tmp_path).added == 3
    assert embedded == ["the same cat"]


@pytest.fixture
def library(tmp_path, model_folder) -> Library:
    return Library(tmp_path / "library", model_folder)


def names(library: Library) -> set[str]:
    return {Path(hit.source).name for hit in library.search("cat", top=100)}


def reasons(failures: list[SkippedFile], folder: Path) -> dict[str, str]:
    return {str(Path(failure.path).relative_to(folder)): failure.reason for failure in failures}


# ---- files that can't be read ----------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_listed_and_the_rest_goes_in(docs, library):
    (docs / "bytes.txt").write_bytes(b"\x89PNG\r\n\x1a\n\x00\x00\xff\xfe")
    (docs / "zeros.txt").write_bytes(b"cat \0\0 dog")
    (docs / "marked.txt").write_bytes(b"\xff\xfec\0\0\0")
    (docs / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (docs / "broken.pdf").write_bytes(b"%PDF-1.7 and nothing more")
    (docs / "broken.ipynb").write_text("{}")
    (docs / "empty.txt").write_text("")
    (docs / "lines.jsonl").write_text('{"text": "a cat"}\nno json\n{"text": "a dog"}\n')
    report = add(library, docs)
    assert (report.added, report.skipped) == (5, [])
    told = reasons(report.failed, docs)
    assert {name: reason.split(" (")[0] for name, reason in told.items()} == {
        "bytes.txt": "is a binary file, not text; give it the suffix of its kind",
        "zeros.txt": "is a binary file, not text; give it the suffix of its kind",
        "marked.txt": "is a binary file, not text; give it the suffix of its kind",
        "latin.txt": "line 1: the file is not UTF-8 text; save it as UTF-8",
        "broken.pdf": "can't be read as PDF",
        "broken.ipynb": "the file is not a notebook of version 4",
        "lines.jsonl:2": "the line is not valid JSON",
    }
    # It is told again as long as it is so, and only so long.
    assert reasons(add(library, docs).failed, docs) == told
    for name in told:
        (docs / name.partition(":")[0]).unlink()
    assert add(library, docs) == AddReport(unchanged=3, removed=2)


def test_only_broken_files_are_a_report_and_no_library(tmp_path, library):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.txt").write_bytes(b"\xff")
    report = add(library, tmp_path / "docs")
    assert (report.documents, len(report.failed)) == (0, 1)
    with pytest.raises(LlamoryError, match="empty"):
        library.info()


def replace_parser(monkeypatch, suffix: str, error: Exception) -> None:
    from llamory.documents import formats

    def failing(text: str, name: str):
        raise error

    monkeypatch.setitem(formats.FORMATS, suffix, formats.Format(failing))


def test_a_file_nested_too_deep_is_listed_as_unreadable(docs, library, monkeypatch):
    replace_parser(monkeypatch, ".md", RecursionError("too deep"))
    report = add(library, docs)
    assert (report.added, report.failed[0].reason) == (2, "it can't be read (RecursionError: too deep)")
    with pytest.raises(LlamoryError, match=r"dogs\.md can't be read \(RecursionError"):
        add(library, docs, strict=True)


def test_a_bug_of_a_parser_is_logged_and_not_blamed_on_the_file(docs, library, monkeypatch, caplog):
    replace_parser(monkeypatch, ".md", TypeError("a bug"))
    report = add(library, docs)
    assert report.added == 2
    assert report.failed[0].reason == "llamory failed unexpectedly on it (TypeError: a bug); please report this"
    (record,) = [record for record in caplog.records if record.name == "llamory.library.indexer"]
    assert record.levelname == "WARNING" and "dogs.md" in record.getMessage() and record.exc_info[0] is TypeError
    with pytest.raises(TypeError, match="a bug"):
        add(library, docs, strict=True)


def test_a_file_without_permission_is_listed_and_keeps_its_passages(docs, library, monkeypatch):
    add(library, docs)
    opened = os.open

    def refusing(path, *rest, **settings):
        if Path(path).name == "cats.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **settings)

    monkeypatch.setattr(storage_module.os, "open", refusing)
    report = add(library, docs)
    assert reasons(report.failed, docs) == {"cats.txt": "it can't be read (Permission denied)"}
    assert (report.unchanged, report.removed, len(library)) == (2, 0, 3)


def test_a_folder_without_permission_is_listed_and_keeps_its_passages(docs, library, monkeypatch):
    add(library, docs)
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "pets":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    report = add(library, docs)
    assert reasons(report.failed, docs) == {"pets": "the folder can't be read (Permission denied)"}
    assert (report.unchanged, report.removed, len(library)) == (1, 0, 3)


def test_a_file_that_vanishes_meanwhile_is_listed_and_removed(docs, library, monkeypatch):
    add(library, docs)
    content_hash = storage_module.content_hash

    def vanishing(path, *settings):
        (docs / "cats.txt").unlink(missing_ok=True)
        return content_hash(path, *settings)

    monkeypatch.setattr(storage_module, "content_hash", vanishing)
    report = add(library, docs)
    assert reasons(report.failed, docs) == {"cats.txt": "it vanished before it was read"}
    assert (report.unchanged, report.removed) == (2, 1)


def test_a_file_that_changes_while_it_is_read_is_read_again_next_time(docs, library, monkeypatch):
    readers = sys.modules["llamory.documents.readers"]
    read_limited = readers.read_limited

    def changing(path, *settings):
        data = read_limited(path, *settings)
        if path.name == "cats.txt":
            path.write_text("the cat has a river now")
        return data

    with monkeypatch.context() as patch:
        patch.setattr(readers, "read_limited", changing)
        assert reasons(add(library, docs).failed, docs) == {"cats.txt": "changed while it was read; index it again"}
    add(library, docs)
    assert "the cat has a river now" in {hit.text for hit in library.search("river")}


@pytest.fixture
def opened(docs, monkeypatch) -> list[str]:
    """Collects the name of each file that is opened as a document."""
    names: list[str] = []
    open_file = os.open

    def spy(path, *rest):
        if docs in Path(path).parents:
            names.append(Path(path).name)
        return open_file(path, *rest)

    monkeypatch.setattr(storage_module.os, "open", spy)
    return names


def test_a_new_file_is_opened_once_and_its_content_key_is_that_of_its_bytes(docs, library, opened):
    (docs / "lines.jsonl").write_text('{"text": "a cat"}\n\n{"text": "a dog"}')
    add(library, docs)
    names = ["both.txt", "cats.txt", "dogs.md", "lines.jsonl"]
    assert sorted(opened) == names
    opened.clear()
    assert add(library, docs) == AddReport(unchanged=5)  # by the content keys
    assert sorted(opened) == names


def test_a_changed_file_is_hashed_once_and_read_once(docs, library, opened, monkeypatch):
    (docs / "lines.jsonl").write_text('{"text": "a cat"}\n')
    add(library, docs)
    (docs / "cats.txt").write_text("a new cat")
    (docs / "lines.jsonl").write_text('{"text": "a dog"}\n')
    opened.clear()
    assert add(library, docs).updated == 2
    assert sorted(opened) == ["both.txt", "cats.txt", "cats.txt", "dogs.md", "lines.jsonl", "lines.jsonl"]
    opened.clear()
    assert add(library, docs) == AddReport(unchanged=4)


def test_a_long_line_of_json_lines_counts_in_the_content_key(docs, library):
    (docs / "huge.jsonl").write_text('{"text": "a cat"}\n' + '{"text": "' + "a " * 2**12 + '"}\n{"text": "a dog"}\n')
    assert add(library, docs, max_file_size=2**-8).added == 5
    # The long line is listed again: the file isn't marked as indexed.
    assert len(add(library, docs, max_file_size=2**-8).failed) == 1
    assert add(library, docs).added == 1
    assert add(library, docs) == AddReport(unchanged=6)


def test_a_file_over_the_limit_is_refused_without_reading_it(docs, library):
    with (docs / "huge.txt").open("wb") as file:
        file.truncate(2**30)  # takes no disk
    with (docs / "huge.jsonl").open("wb") as file:
        file.write(b'{"text": "a cat"}\n{"text": "' + b"a " * 2**20 + b'"}\n{"text": "a dog"}\n')
    report = add(library, docs, max_file_size=1)
    assert report.added == 5
    assert {name: reason[:16] for name, reason in reasons(report.failed, docs).items()} == {
        "huge.txt": "is too large (1,",
        "huge.jsonl:2": "the line is too ",
    }
    with pytest.raises(LlamoryError, match="more than 0 MiB"):
        add(library, docs, max_file_size=0)


# ---- links and other things ------------------------------------------------------------------------------------------


def test_nothing_outside_the_given_folders_is_read(tmp_path, docs, library, monkeypatch):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("a secret cat")
    (docs / "file link.txt").symlink_to(outside / "secret.txt")
    (docs / "folder link").symlink_to(outside)
    (docs / "twice.txt").symlink_to(docs / "file link.txt")
    (docs / "relative.txt").symlink_to("../outside/secret.txt")
    (docs / "inside.txt").symlink_to("pets/both.txt")
    (docs / "nowhere.txt").symlink_to("gone.txt")
    opened: list[str] = []
    monkeypatch.setattr(
        storage_module.os, "open", lambda path, *rest, _open=os.open: opened.append(str(path)) or _open(path, *rest)
    )
    report = add(library, docs)
    out = "a link that leads out of the given folders"
    assert reasons(report.skipped, docs) == {
        "file link.txt": out,
        "folder link": out,
        "twice.txt": out,
        "relative.txt": out,
        "nowhere.txt": "a link that leads nowhere",
    }
    assert (report.added, report.failed) == (4, [])
    assert any("cats.txt" in path for path in opened)
    assert all(os.path.realpath(path).startswith((str(docs), library.path)) for path in opened)
    assert add(library, docs, outside).added == 4  # the three links and the file: now it was given


def test_a_file_swapped_for_a_link_after_the_survey_is_not_read(tmp_path, docs, library, monkeypatch):
    (tmp_path / "secret.txt").write_text("a secret cat")
    resolve_chunk_size = embedding.resolve_chunk_size

    def swapping(*settings):
        (docs / "cats.txt").unlink(missing_ok=True)
        (docs / "cats.txt").symlink_to(tmp_path / "secret.txt")
        return resolve_chunk_size(*settings)

    monkeypatch.setattr("llamory.embedding.resolve_chunk_size", swapping)
    report = add(library, docs)
    assert reasons(report.failed, docs) == {"cats.txt": "is a link that leads out of the given folders"}
    assert names(library) == {"both.txt", "dogs.md"}


def test_links_in_circles_end(docs, library):
    (docs / "up").symlink_to(docs)
    (docs / "pets" / "up").symlink_to("..")
    (docs / "self.txt").symlink_to("self.txt")
    (docs / "a.txt").symlink_to("b.txt")
    (docs / "b.txt").symlink_to("a.txt")
    report = add(library, docs)
    assert (report.added, report.failed) == (3, [])
    assert set(reasons(report.skipped, docs)) == {"self.txt", "a.txt", "b.txt"}


def test_a_linked_folder_that_is_given_is_read(tmp_path, docs, library):
    (tmp_path / "link").symlink_to(docs)
    assert add(library, tmp_path / "link").added == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_never_blocks(docs, library):
    os.mkfifo(docs / "pipe.txt")
    report = add(library, docs)
    assert reasons(report.skipped, docs) == {"pipe.txt": "not a regular file"}
    with pytest.raises(LlamoryError, match="not a regular file"):
        add(library, docs / "pipe.txt")


def test_names_of_all_scripts_and_shapes(docs, library):
    odd = ["with space.txt", "дом.txt", "書類.txt", 'it\'s "quoted".txt', "100%_[a]*?.txt", "new\nline.txt", "🐈.txt"]
    for name in odd:
        (docs / name).write_text(f"the cat of {odd.index(name)}")
    assert add(library, docs).added == 3 + len(odd)
    assert names(library) >= set(odd)
    assert add(library, docs) == AddReport(unchanged=3 + len(odd))
    assert [Path(hit.source).name for hit in library.search("cat", source="書類.txt")] == ["書類.txt"]
    assert library.remove([docs / name for name in odd]).removed == len(odd)
    assert len(library) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems don't take such names")
def test_a_name_that_is_no_text_is_listed(docs, library):
    (docs / os.fsdecode(b"caf\xe9.txt")).write_text("a cat")
    report = add(library, docs)
    assert (report.added, report.failed[0].reason) == (3, "its name is not valid Unicode; rename it")


# ---- a run that is stopped in a long document ------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path, monkeypatch) -> Path:
    """One document of 12 passages, of which batches of 4 are embedded."""
    monkeypatch.setattr(indexer_module, "CHUNKS_PER_BATCH", 4)
    (tmp_path / "books").mkdir()
    book = tmp_path / "books" / "book.md"
    book.write_text("\n\n".join(f"# Part {i}\n\nthe cat saw river number {i}" for i in range(12)))
    return book


def stop_at(monkeypatch, text: str) -> None:
    """Stop a run, as Ctrl-C would, when a passage with a certain text is to be embedded."""
    encode_document = SentenceTransformer.encode_document

    def stopping(self, inputs, **kwargs):
        if any(text in each for each in inputs):
            raise KeyboardInterrupt
        return encode_document(self, inputs, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode_document", stopping)


def test_vectors_of_a_long_document_survive_a_stopped_run(tmp_path, book, library, monkeypatch, embedded):
    with monkeypatch.context() as patch:
        stop_at(patch, "number 9")
        with pytest.raises(KeyboardInterrupt):
            add(library, book.parent)
    assert len(library) == 0 and len(embedded) == 8
    again = Library(tmp_path / "library", library._model)
    assert add(again, book.parent) == AddReport(added=1, passages=12)
    assert len(embedded) == len(set(embedded)) == 12
    assert "pending" not in lancedb.connect(again.path).list_tables().tables
    undisturbed = Library(tmp_path / "undisturbed", library._model)
    add(undisturbed, book.parent)
    expected = {hit.text: hit.score for hit in undisturbed.search("cat river", top=12, mode="dense")}
    assert {hit.text: hit.score for hit in again.search("cat river", top=12, mode="dense")} == pytest.approx(expected)


def test_another_run_keeps_the_vectors_of_a_stopped_one(docs, book, library, monkeypatch, embedded):
    with monkeypatch.context() as patch:
        stop_at(patch, "number 9")
        with pytest.raises(KeyboardInterrupt):
            add(library, book)
    add(library, docs)
    embedded.clear()
    assert add(library, book).passages == 12
    assert len(embedded) == 4


def test_a_stopped_run_on_another_model_is_forgotten(
    tmp_path, book, library, other_model_folder, monkeypatch, embedded
):
    with monkeypatch.context() as patch:
        stop_at(patch, "number 9")
        with pytest.raises(KeyboardInterrupt):
            add(library, book)
    embedded.clear()
    assert add(Library(tmp_path / "library", other_model_folder), book).passages == 12
    assert len(embedded) == 12


def test_vectors_of_a_document_that_changed_meanwhile_are_cleared(book, library, monkeypatch, embedded):
    with monkeypatch.context() as patch:
        stop_at(patch, "number 9")
        with pytest.raises(KeyboardInterrupt):
            add(library, book.parent)
    book.rename(book.with_name("other.txt"))
    (book.with_name("other.txt")).write_text("money")
    assert add(library, book.parent).passages == 1
    assert "pending" not in lancedb.connect(library.path).list_tables().tables

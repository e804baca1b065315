"""Several processes may use a library at once; what was taken out, damaged or made by another version is told."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llamory.common.locks import lock_path, write_lock
from llamory.embedding import pipeline as retriever_module
from llamory.errors import LlamoryError
from llamory.library import AddReport, Library
from llamory.library import indexer as engine_module
from llamory.library import store as store_module


@pytest.fixture
def library(tmp_path, model_folder) -> Library:
    return Library(tmp_path / "library", model_folder)


def add(library: Library, *paths: Path, **settings) -> AddReport:
    return library.add(list(paths), progress=False, **settings)


def names(library: Library) -> set[str]:
    return {Path(hit.source).name for hit in library.search("cat", top=100)}


# ---- removal ---------------------------------------------------------------------------------------------------------


def test_files_and_folders_can_be_taken_out(tmp_path, docs, library):
    (docs / "lines.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    add(library, docs)
    assert library.remove(docs / "pets").removed == 2
    assert library.remove(f"{docs}/lines.jsonl:1").removed == 1
    assert names(library) == {"cats.txt", "lines.jsonl:2"}
    with pytest.raises(LlamoryError, match=r"nothing of .*pets"):
        library.remove(docs / "pets")
    # What was taken out isn't taken for read.
    assert add(library, docs) == AddReport(added=3, unchanged=2, passages=3)


def test_removal_needs_no_model(tmp_path, docs, library, monkeypatch):
    add(library, docs)
    monkeypatch.setattr(retriever_module, "load_embedder", None)
    (docs / "cats.txt").unlink()
    assert Library(library.path).remove(docs / "cats.txt") == AddReport(removed=1)


def test_a_folder_that_became_empty_takes_all_out(docs, library):
    add(library, docs)
    for file in list(docs.rglob("*.*")):
        file.unlink()
    assert add(library, docs) == AddReport(removed=3)


def test_a_run_without_changes_needs_no_model(docs, library, monkeypatch, model_folder):
    add(library, docs)
    monkeypatch.setattr(retriever_module, "load_embedder", None)
    for model in (None, model_folder):
        assert add(Library(library.path, model), docs) == AddReport(unchanged=3)


def test_files_that_did_not_change_are_not_parsed_again(docs, library, monkeypatch):
    (docs / "lines.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog"}\n')
    add(library, docs)
    (docs / "cats.txt").write_text("a new cat")
    read: list[str] = []
    files = sys.modules["llamory.documents"]
    read_file = files.read_file
    monkeypatch.setattr(
        files, "read_file", lambda path, **settings: read.append(path.name) or read_file(path, **settings)
    )
    assert add(library, docs) == AddReport(updated=1, unchanged=4, passages=1)
    assert read == ["cats.txt"]
    # Another field is another text of the same file.
    (docs / "lines.jsonl").write_text('{"text": "a cat", "body": "money"}\n')
    add(library, docs)
    assert add(library, docs, text_field="body").updated == 1


# ---- more than one process -------------------------------------------------------------------------------------------

HOLDER = """
import sys
from llamory.common.locks import write_lock
with write_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(library):
    """Another process that writes to the library until it is told to stop."""
    command = [sys.executable, "-c", HOLDER, library.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield other
        other.kill()


def test_a_second_process_is_told(docs, library, holder):
    with pytest.raises(LlamoryError, match="Another process is writing"):
        add(library, docs, wait=False)


def test_a_second_process_waits(docs, library, holder, capsys):
    done: list[AddReport] = []
    thread = threading.Thread(target=lambda: done.append(library.add(docs)))
    thread.start()
    thread.join(0.5)
    assert thread.is_alive() and not done
    holder.stdin.write("\n")
    holder.stdin.flush()
    thread.join(60)
    assert done[0].added == 3
    assert "waiting until it is done" in capsys.readouterr().err


def test_a_killed_process_holds_nothing(docs, library, holder):
    holder.kill()
    holder.wait()
    assert add(library, docs, wait=False).added == 3


def test_two_that_make_a_library_at_once_make_one(tmp_path, docs, model_folder, other_model_folder):
    first, second = (Library(tmp_path / "library", model_folder) for _ in range(2))
    third = Library(tmp_path / "library", other_model_folder)
    reports: list[AddReport] = []
    threads = [
        threading.Thread(target=lambda which=which: reports.append(add(which, docs))) for which in (first, second)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((report.added, report.unchanged) for report in reports) == [(0, 3), (3, 0)]
    assert len(Library(tmp_path / "library")) == 3
    with pytest.raises(LlamoryError, match="another model"):
        add(third, docs)


def test_an_object_store_has_its_lock_on_this_machine():
    path = lock_path("s3://shelf/library")
    assert path.parent.is_dir() and path != lock_path("s3://shelf/other")
    with (
        write_lock("s3://shelf/library"),
        pytest.raises(LlamoryError, match="Another process"),
        write_lock("s3://shelf/library", wait=False),
    ):
        pass


def test_reading_goes_on_while_another_writes(tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNKS_PER_BATCH", 2)
    monkeypatch.setattr(store_module, "COMMITS_PER_COMPACTION", 3)
    docs = tmp_path / "docs"
    docs.mkdir()

    def write(version: int) -> None:
        for i in range(12):
            parts = [f"# Part {part}\n\nThe cat of version {version} went on." for part in range(3)]
            (docs / f"{i}.md").write_text("\n\n".join(parts))

    write(0)
    writer = Library(tmp_path / "library", model_folder)
    add(writer, docs)
    reader, stop, errors, seen = Library(tmp_path / "library"), threading.Event(), [], set()

    def read() -> None:
        try:
            while not stop.is_set():
                for mode in ("dense", "bm25", "fused"):
                    by_source: dict[str, list[str]] = {}
                    for hit in reader.search("cat version", top=99, mode=mode):
                        by_source.setdefault(hit.source, []).append(hit.text.split("version ")[1])
                    # Every document is there, whole, and of one version.
                    assert len(by_source) == 12
                    assert all(len(texts) == 3 and len(set(texts)) == 1 for texts in by_source.values())
                    seen.update(text for texts in by_source.values() for text in texts)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    for version in range(1, 4):
        write(version)
        assert add(writer, docs).updated == 12
    stop.set()
    thread.join()
    assert errors == []
    assert len(seen) > 1  # the open library saw what was written


# ---- what lies on the disk -------------------------------------------------------------------------------------------


def test_a_damaged_library_is_named_in_a_sentence(docs, library, model_folder):
    add(library, docs)
    for file in Path(library.path, "passages.lance", "data").iterdir():
        file.unlink()
    damaged = Library(library.path, model_folder)
    for use in (lambda: damaged.search("cat"), damaged.info, lambda: add(damaged, docs)):
        with pytest.raises(LlamoryError, match=f"library at {library.path} can't be read: it is damaged"):
            use()


def test_a_list_of_states_that_is_junk_is_named_too(docs, library):
    add(library, docs)
    for file in Path(library.path, "passages.lance", "_versions").glob("*.manifest"):
        file.write_bytes(b"junk" * 9)
    with pytest.raises(LlamoryError, match="damaged"):
        Library(library.path)


def rewrite_as(library: Library, version: int, without: tuple[str, ...] = ()) -> None:
    """Make a library's table one of another format."""
    import lancedb

    database = lancedb.connect(library.path)
    rows = database.open_table("passages").to_arrow().drop_columns(list(without))
    settings = json.loads(rows.schema.metadata[b"llamory"]) | {"version": version}
    rows = rows.replace_schema_metadata({b"llamory": json.dumps(settings).encode()})
    database.drop_table("passages")
    database.drop_table("files")
    database.create_table("passages", rows)


def test_a_library_of_a_later_format_is_refused(docs, library):
    add(library, docs)
    rewrite_as(library, 99)
    with pytest.raises(LlamoryError, match=r"later llamory \(format 99; this one knows up to 2\)"):
        Library(library.path)


def test_a_library_of_the_first_format_goes_on_working(docs, library):
    add(library, docs)
    rewrite_as(library, 1, without=("key", "page"))
    old = Library(library.path)
    for mode in ("dense", "bm25", "fused"):
        assert Path(old.search("cat", mode=mode)[0].source).name == "cats.txt"
    (docs / "cats.txt").write_text("a cat met a dog\n\n# One\n\nmoney for a cat")
    assert add(old, docs) == AddReport(updated=1, unchanged=2, passages=1)
    assert [Path(hit.source).name for hit in old.search("money", mode="bm25")] == ["cats.txt"]

"""A table that is damaged or of another format is reported as such; older formats keep working."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llamory.errors import LlamoryError
from llamory.library import AddReport, Library, Settings
from llamory.library import store as store_module
from llamory.library.store import PassageStore, PendingVectors


@pytest.fixture
def library(tmp_path, model_folder) -> Library:
    return Library(tmp_path / "library", model_folder)


def add(library: Library, *paths: Path, **settings) -> AddReport:
    return library.add(list(paths), progress=False, **settings)


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
    with pytest.raises(LlamoryError, match=r"later llamory \(format 99; this one reads up to 2\)"):
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


# ---- errors of the disk and of arguments -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("lance error: LanceError(IO): Generic LocalFileSystem error: No space left on device (os error 28)", 28),
        ("lance error: LanceError(IO): Permission denied (os error 13), /root/x.rs:1", 13),
    ],
)
def test_an_error_of_the_disk_is_an_os_error_and_no_damage(message, code):
    with pytest.raises(OSError, match="notes") as raised, store_module._user_errors("notes"):
        raise RuntimeError(message)
    assert raised.value.errno == code


@pytest.mark.parametrize(
    "error", [TypeError("a bug"), ValueError("Invalid input, no such column"), RuntimeError("bug")]
)
def test_a_bug_is_not_taken_for_a_damaged_library(error):
    with pytest.raises(type(error), match=str(error)), store_module._user_errors("notes"):
        raise error


FULL_DISK = """
import resource, sys
from llamory.library.store import PassageStore, Settings
import numpy as np
store = PassageStore.create(sys.argv[1], Settings("m", "0", 512, 9))
row = dict(text="a", source="a", title="", line=1, page=None, position=0, file="a", hash="")
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    store.write([row | dict(source=str(i)) for i in range(500)], np.random.rand(500, 512).astype("float32"), [])
except OSError as error:
    print(error.errno, error.filename)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit of the size of files")
def test_a_write_that_the_disk_refuses_tells_why(tmp_path):
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "library")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output == f"{errno.EFBIG} {tmp_path / 'library'}\n"


# ---- many documents --------------------------------------------------------------------------------------------------


def test_many_sources_are_looked_up_and_removed_in_short_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_SQL_LIST_LENGTH", 3)
    store = PassageStore.create(str(tmp_path / "library"), Settings("m", "0", 2, 9))
    sources = [f"it's {i}" for i in range(10)]
    rows = [
        {"text": f"{source}, {p}", "source": source, "title": "", "line": 1, "page": None, "position": p}
        | {"file": source, "hash": source[::-1]}
        for source in sources
        for p in range(2)
    ]
    vectors = np.arange(40, dtype=np.float32).reshape(20, 2)
    store.write(rows, vectors, [])
    assert (len(store), store.num_documents()) == (20, 10)
    assert store.documents() == {source: (source, source[::-1]) for source in sources}
    passages = store.passages([*sources, "none"])
    assert {source: [p.text for p in some] for source, some in passages.items()} == {
        source: [f"{source}, {p}" for p in range(2)] for source in sources
    }
    found = store.vectors([row["text"] for row in rows] + ["other"])
    np.testing.assert_array_equal(np.stack([found[row["text"]] for row in rows]), vectors)
    store.write(rows[:8], vectors[:8], sources[:4])
    assert len(store) == 20
    store.mark_indexed(dict.fromkeys(sources, "content"))
    store.clear_indexed(sources[:7])
    assert store.file_index().keys() == set(sources[7:])
    store.remove(sources[:7])
    assert store.documents().keys() == set(sources[7:])


# ---- vectors of a killed run -----------------------------------------------------------------------------------------


def pending_row(source: str, text: str) -> dict[str, str]:
    return {"source": source, "text": text, "file": source.partition(":")[0]}


def test_pending_vectors_belong_to_texts_and_to_a_model(tmp_path):
    uri = str(tmp_path / "library")
    vectors = np.arange(6, dtype=np.float32).reshape(3, 2)
    first = PendingVectors(uri, "model")
    first.add([pending_row("a", "one"), pending_row("b:1", "two")], vectors[:2])
    first.add([pending_row("b:2", "three")], vectors[2:])
    assert PassageStore.open(uri) is None, "pending vectors make no library"
    second = PendingVectors(uri, "model")
    found = second.get(["one", "three", "four"])
    assert found.keys() == {"one", "three"}
    np.testing.assert_array_equal(found["three"], vectors[2])
    assert second.files == {"a": "a", "b:1": "b", "b:2": "b"}
    second.clear(["a", "b:1", "c"])
    assert PendingVectors(uri, "model").files == {"b:2": "b"}
    assert PendingVectors(uri, "other", read_only=True).files == {}
    assert PendingVectors(uri, "model").files == {"b:2": "b"}, "a read-only look changes nothing"
    assert PendingVectors(uri, "other").files == {}
    assert PendingVectors(uri, "model").files == {}, "the table of another model is deleted"

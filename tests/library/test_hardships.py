"""Whatever lies in the folders, and whoever writes at the same time: the rest goes in, and nothing else is read."""

import os
import sys
from pathlib import Path

import pytest

from llamory.documents import SkippedFile
from llamory.documents import storage as file_io_module
from llamory.errors import LlamoryError
from llamory.library import AddReport, Library


@pytest.fixture
def library(tmp_path, model_folder) -> Library:
    return Library(tmp_path / "library", model_folder)


def add(library: Library, *paths: Path, **settings) -> AddReport:
    return library.add(list(paths), progress=False, **settings)


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


def test_any_error_of_a_parser_is_one_files_alone(docs, library, monkeypatch):
    from llamory.documents.formats import text as formats

    def failing(text: str, name: str):
        raise RecursionError("too deep")

    monkeypatch.setitem(sys.modules["llamory.documents.readers"]._READERS, ".md", failing)
    assert formats.read_markdown is not failing
    report = add(library, docs)
    assert (report.added, report.failed[0].reason) == (2, "it can't be read (RecursionError: too deep)")
    with pytest.raises(LlamoryError, match=r"dogs\.md can't be read \(RecursionError"):
        add(library, docs, strict=True)


def test_a_file_without_permission_is_listed_and_keeps_its_passages(docs, library, monkeypatch):
    add(library, docs)
    opened = os.open

    def refusing(path, *rest, **settings):
        if Path(path).name == "cats.txt":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *rest, **settings)

    monkeypatch.setattr(file_io_module.os, "open", refusing)
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
    content_hash = file_io_module.content_hash

    def vanishing(path, *settings):
        (docs / "cats.txt").unlink(missing_ok=True)
        return content_hash(path, *settings)

    monkeypatch.setattr(file_io_module, "content_hash", vanishing)
    report = add(library, docs)
    assert reasons(report.failed, docs) == {"cats.txt": "it vanished before it was read"}
    assert (report.unchanged, report.removed) == (2, 1)


def test_a_file_that_changes_while_it_is_read_is_read_again_next_time(docs, library, monkeypatch):
    content_hash = file_io_module.content_hash

    def changing(path, *settings):
        known = content_hash(path, *settings)
        if path.name == "cats.txt":
            path.write_text("the cat has a river now")
        return known

    with monkeypatch.context() as patch:
        patch.setattr(file_io_module, "content_hash", changing)
        assert reasons(add(library, docs).failed, docs) == {"cats.txt": "changed while it was read; index it again"}
    add(library, docs)
    assert "the cat has a river now" in {hit.text for hit in library.search("river")}


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
        file_io_module.os, "open", lambda path, *rest, _open=os.open: opened.append(str(path)) or _open(path, *rest)
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
    resolve_chunk_size = sys.modules["llamory.library.library"].resolve_chunk_size

    def swapping(*settings):
        (docs / "cats.txt").unlink(missing_ok=True)
        (docs / "cats.txt").symlink_to(tmp_path / "secret.txt")
        return resolve_chunk_size(*settings)

    monkeypatch.setattr("llamory.library.library.resolve_chunk_size", swapping)
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

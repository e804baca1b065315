"""Which documents files and folders have, and what is skipped."""

import logging
import os
from pathlib import Path

import pytest

from llamory.documents import find_files, scan_files
from llamory.documents.scan import LINK_OUTSIDE
from llamory.errors import LlamoryError


def test_folders_are_listed_in_order_without_hidden_files_and_unknown_formats(tmp_path):
    for name in ("b.txt", "a.md", "sub/c.py", ".git/d.txt", "sub/.e.txt", "f.png", "sub/G.HTML"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("words")
    found = find_files([tmp_path / "b.txt", tmp_path])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b.txt", "a.md", "sub/G.HTML", "sub/c.py"]


def test_paths_without_documents_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "photo.png").write_bytes(b"\x89PNG")
    with pytest.raises(LlamoryError, match=r"no file or folder .*missing"):
        find_files([tmp_path / "missing.txt"])
    with pytest.raises(LlamoryError, match=r"folder .* has no documents"):
        find_files([tmp_path / "folder"])
    with pytest.raises(LlamoryError, match=r"empty\.txt is empty"):
        find_files([tmp_path / "empty.txt"])
    with pytest.raises(LlamoryError, match=r"photo\.png is not of a kind"):
        find_files([tmp_path / "photo.png"])
    with pytest.raises(LlamoryError, match="has any text"):
        find_files([tmp_path])
    with pytest.raises(LlamoryError, match="No documents were given"):
        find_files([])


@pytest.fixture
def linked(tmp_path):
    """A folder with documents and with links that lead out of it, nowhere, and to a file in it."""
    for name in ("in/a.md", "in/sub/b.md", "outside/secret.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("words")
    for name, target in {
        "todo.txt": "../outside/secret.md",
        "twice.txt": "todo.txt",
        "folder": "../outside",
        "gone.txt": "nothing.txt",
        "inside.txt": "sub/b.md",
    }.items():
        (tmp_path / "in" / name).symlink_to(target)
    return tmp_path / "in"


OUTSIDE = {"todo.txt": LINK_OUTSIDE, "twice.txt": LINK_OUTSIDE, "folder": LINK_OUTSIDE}


def test_links_that_lead_out_of_the_given_folders_are_skipped(linked):
    scan = scan_files([linked])
    assert [str(path.relative_to(linked)) for path in scan.files] == ["a.md", "inside.txt", "sub/b.md"]
    reasons = {os.path.relpath(each.path, linked): each.reason for each in scan.skipped}
    assert reasons == OUTSIDE | {"gone.txt": "a link that leads nowhere"}
    assert scan_files([linked / "todo.txt"]).files == [linked / "todo.txt"]  # given by name
    assert len(scan_files([linked, linked.parent / "outside"]).files) == 6  # the target is given too


def test_finding_files_skips_the_same_and_says_so(linked, caplog):
    with caplog.at_level(logging.WARNING):
        files = find_files(linked)
    assert files == scan_files([linked]).files
    assert all(f"Skipped {linked / name}: {reason}." in caplog.text for name, reason in OUTSIDE.items())
    caplog.clear()
    find_files(linked, log_skipped=False)
    assert not caplog.text


def test_a_folder_that_cannot_be_read_is_reported(linked, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    [failed] = scan_files([linked]).failed
    assert (failed.path, failed.reason) == (str(linked / "sub"), "the folder can't be read (Permission denied)")

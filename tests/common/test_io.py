"""Files are replaced whole or not at all, and one process at a time holds a library's lock."""

import pytest

from llamory.common.io import atomic_file, atomic_path, lock_path, write_lock
from llamory.errors import LlamoryError


def test_a_large_file_replaces_the_old_one_when_it_is_complete(tmp_path):
    path = tmp_path / "folder" / "file"
    with atomic_file(path) as file:
        file.write(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:  # noqa: PT012
        file.write(b"new")
        raise RuntimeError
    assert path.read_bytes() == b"old"
    with atomic_file(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert [each.name for each in path.parent.iterdir()] == ["file"]


def test_the_rest_of_a_killed_run_is_overwritten(tmp_path):
    (tmp_path / ".file.partial").write_bytes(b"a longer rest")
    with atomic_file(tmp_path / "file") as file:
        file.write(b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_failed_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:  # noqa: PT012
        temporary.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["file.txt"]


def test_an_object_store_has_its_lock_on_this_machine():
    path = lock_path("s3://shelf/library")
    assert path.parent.is_dir() and path != lock_path("s3://shelf/other")
    with (
        write_lock("s3://shelf/library"),
        pytest.raises(LlamoryError, match="Another process"),
        write_lock("s3://shelf/library", wait=False),
    ):
        pass

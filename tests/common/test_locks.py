"""One process at a time holds a library's lock."""

import pytest

from llamory.common.locks import lock_path, write_lock
from llamory.errors import LlamoryError


def test_an_object_store_has_its_lock_on_this_machine():
    path = lock_path("s3://shelf/library")
    assert path.parent.is_dir() and path != lock_path("s3://shelf/other")
    with (
        write_lock("s3://shelf/library"),
        pytest.raises(LlamoryError, match="Another process"),
        write_lock("s3://shelf/library", wait=False),
    ):
        pass

"""A lock that lets one process at a time write to a library."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llamory.errors import LlamoryError

logger = logging.getLogger(__name__)

_LOCK_NAME = ".writing.lock"


@contextmanager
def write_lock(uri: str, *, wait: bool = True, notify: Callable[[str], None] = logger.info) -> Iterator[None]:
    """Hold a library's lock; the system releases it when the process ends, however it ends.

    The lock of a folder is a file in it, so it holds for all machines that share the disk. The lock of an object store
    is a file in the temporary folder of this machine, so it holds for the processes of this machine only.

    Args:
        uri: folder or object-store URI of the library.
        wait: wait until the other process is done.
        notify: called with a sentence if another process holds the lock.

    Raises:
        LlamoryError: another process holds the lock, and `wait` is off.
    """
    from filelock import FileLock, Timeout

    path = lock_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise LlamoryError(
                f"Another process is writing to the library at {uri}; try again when it is done, or wait for it."
            ) from None
        notify(f"Another process is writing to the library at {uri}; waiting until it is done.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_path(uri: str) -> Path:
    """Path of a library's lock file."""
    folder = local_folder(uri)
    if folder is not None:
        return folder / _LOCK_NAME
    return Path(tempfile.gettempdir(), f"llamory-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock")


def local_folder(uri: str) -> Path | None:
    """The folder of a library on a file system; None for an object store."""
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None

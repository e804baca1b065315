"""One writer at a time: a second process waits until the first is done, or is told."""

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

_NAME = ".writing.lock"


@contextmanager
def writing(uri: str, *, wait: bool = True, say: Callable[[str], None] = logger.info) -> Iterator[None]:
    """Hold a library's lock; the system lets go of it when the process ends, however it ends.

    In a folder the lock lies in the library, so it holds for all who share the disk. For an object store it lies in
    this machine's folder for temporary files: it holds for the processes of this machine.

    Args:
        uri: folder or object-store URI of the library.
        wait: wait until another process is done.
        say: is told once if there is another process.

    Raises:
        LlamoryError: another process writes, and `wait` is off.
    """
    from filelock import FileLock, Timeout

    place = lock_path(uri)
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise LlamoryError(
                f"Another process is writing to the library at {uri}; try again when it is done, or wait for it."
            ) from None
        say(f"Another process is writing to the library at {uri}; waiting until it is done.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_path(uri: str) -> Path:
    """Where the lock of a library lies."""
    folder = local_folder(uri)
    if folder is not None:
        return folder / _NAME
    return Path(tempfile.gettempdir(), f"llamory-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock")


def local_folder(uri: str) -> Path | None:
    """The folder of a library that lies in one; None for an object store."""
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None

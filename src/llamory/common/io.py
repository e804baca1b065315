"""Files that are written whole or not at all, digests, and the lock of a library."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from llamory.errors import LlamoryError

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes that write the same file at once are not kept apart
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """A temporary path with the same suffix; it replaces the file or folder `path` if the block ends without error."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}-{secrets.token_hex(4)}{target.suffix}")
    try:
        yield temporary
        temporary.replace(target)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_file(path: PathLike) -> Iterator[BinaryIO]:
    """Open a large file for writing; it replaces `path`, flushed to the disk, if the block ends without an error.

    The temporary file is locked and has a fixed name: killed runs leave one at most, and writers take turns. An
    OSError has `path` as its `filename`.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    try:
        with _open_exclusive(temporary) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                temporary.replace(target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        with suppress(OSError):  # the file is in its place; some systems can't flush a folder
            descriptor = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(target), None
        raise


@contextmanager
def _open_exclusive(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write anew, once no other process writes it."""
    while True:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            renamed = True
            with suppress(FileNotFoundError):  # the process that had the lock may have renamed the file meanwhile
                renamed = not os.path.samestat(path.stat(), os.fstat(file.fileno()))
            if not renamed:
                file.truncate()
                yield file
                return


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
    """Write a JSON file atomically, indented by one space."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_json_lines(path: PathLike, entries: Iterable[Any]) -> None:
    """Write a JSON lines file atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def file_digest(path: PathLike) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any, digits: int = 32) -> str:
    """The first hexadecimal digits of the SHA-256 of a value as JSON with sorted keys; other types count as `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]


@contextmanager
def write_lock(uri: str, *, wait: bool = True, notify: Callable[[str], None] = logger.info) -> Iterator[None]:
    """Hold a library's lock; the system releases it when the process ends, however it ends.

    The lock of a folder holds for all machines that share the disk, that of an object store for this machine only.

    Args:
        uri: folder or object-store URI of the library.
        wait: wait for another process that holds the lock, after a call of `notify`; else raise LlamoryError.
    """
    from filelock import FileLock, Timeout

    path = lock_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        message = f"Another process is writing to the library at {uri}"
        if not wait:
            raise LlamoryError(f"{message}; try again when it is done, or wait for it.") from None
        notify(f"{message}; waiting until it is done.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def lock_path(uri: str) -> Path:
    """Path of a library's lock file, for an object store in the temporary folder of this machine."""
    if (folder := local_folder(uri)) is not None:
        return folder / ".writing.lock"
    return Path(tempfile.gettempdir(), f"llamory-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock")


def local_folder(uri: str) -> Path | None:
    """The folder of a library on a file system; None for an object store."""
    if "://" not in uri:
        return Path(uri)
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None

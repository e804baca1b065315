"""Open files that others may change, break or swap while they are read."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import os
import stat
import tokenize
from dataclasses import dataclass
from pathlib import Path

from llamory.errors import LlamoryError

# Byte order marks and the encodings they announce; UTF-32's begins as UTF-16's does, so it stands first.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class SkippedFile:
    """A file that isn't in, and why.

    Attributes:
        path: the file or folder.
        reason: what is wrong with it, in a few words.
    """

    path: str
    reason: str


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading; a pipe or a device never blocks.

    Raises:
        LlamoryError: it isn't a regular file.
        OSError: it can't be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LlamoryError(f"{path} is not a regular file; give a file that holds text.")
    return open(descriptor, "rb")  # noqa: PTH123 -- a descriptor has no path


def read_limited(path: Path, max_bytes: int | None) -> bytes:
    """The bytes of a file.

    Raises:
        LlamoryError: there are more than `max_bytes`, or it isn't a regular file.
        OSError: it can't be read.
    """
    with open_regular(path) as file:
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)
        data = file.read() if max_bytes is None else file.read(max_bytes + 1)
    _check_size(path, len(data), max_bytes)  # some files have no size until they are read
    return data


def _check_size(path: Path, size: int, max_bytes: int | None) -> None:
    if max_bytes is not None and size > max_bytes:
        raise LlamoryError(f"{path} {too_large_message(size, max_bytes)}.")


def too_large_message(size: int, max_bytes: int) -> str:
    """What is said of a file that is too large."""
    return (
        f"is too large ({size / 2**20:,.0f} MiB; the limit is {max_bytes / 2**20:,.0f} MiB); split it, or raise the "
        "largest file size"
    )


def decode(path: Path, data: bytes) -> str:
    """Text with plain newlines; UTF-8, or what a byte order mark or (in Python files) a declaration announces.

    Raises:
        LlamoryError: the bytes are no text, or text in another encoding.
    """
    encoding = next((name for mark, name in _BYTE_ORDER_MARKS if data.startswith(mark)), "utf-8-sig")
    if encoding == "utf-8-sig" and path.suffix.lower() == ".py":
        with contextlib.suppress(SyntaxError):  # an unknown encoding is named: UTF-8 is the best guess left
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    binary = LlamoryError(f"{path} is a binary file, not text; give it the suffix of its kind.")
    if b"\0" in data and not encoding.startswith(("utf-16", "utf-32")):
        raise binary
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        expected = encoding.upper().removesuffix("-SIG")
        raise LlamoryError(f"{path}:{line}: the file is not {expected} text; save it as UTF-8.") from error
    if "\0" in text:
        raise binary
    return text.replace("\r\n", "\n").replace("\r", "\n")


def content_hash(path: Path, max_bytes: int | None = None) -> tuple[str, tuple[int, ...]]:
    """Hash of a file's bytes, and what the system says of it: the latter is other once the file was written to.

    Raises:
        LlamoryError: there are more than `max_bytes`, or it isn't a regular file.
        OSError: it can't be read.
    """
    with open_regular(path) as file:
        state = _stat_key(os.fstat(file.fileno()))
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)
        return hashlib.file_digest(file, "sha256").hexdigest()[:32], state


def file_state(path: Path) -> tuple[int, ...]:
    """What the system says of a file, as `content_hash` gives it."""
    return _stat_key(path.stat())


def unchanged_since(path: Path, state: tuple[int, ...]) -> bool:
    """Whether a file is as `content_hash` or `file_state` found it."""
    return file_state(path) == state


def _stat_key(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

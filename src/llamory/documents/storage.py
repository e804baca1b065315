"""Read files that other processes may change meanwhile, and decode their text."""

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

# Byte order marks (BOM) and their encodings; UTF-32's begins like UTF-16's, so it is first.
_BOM_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder that was skipped, and why, in a few words."""

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
    """The end of the error message for a file that is too large."""
    return (
        f"is too large ({size / 2**20:,.0f} MiB; the limit is {max_bytes / 2**20:,.0f} MiB); split it, or raise the "
        "largest file size"
    )


def decode(path: Path, data: bytes) -> str:
    """Text with plain newlines; in UTF-8, or the encoding of a byte order mark or (in Python files) a declaration.

    Raises:
        LlamoryError: the bytes are no text, or text in another encoding.
    """
    encoding = next((name for bom, name in _BOM_ENCODINGS if data.startswith(bom)), "utf-8-sig")
    if encoding == "utf-8-sig" and path.suffix.lower() == ".py":
        with contextlib.suppress(SyntaxError):  # for an unknown encoding UTF-8 is the best guess
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
    """Hash of a file's bytes, and its state, which changes when the file is written.

    Raises:
        LlamoryError: there are more than `max_bytes`, or it isn't a regular file.
        OSError: it can't be read.
    """
    with open_regular(path) as file:
        state = _stat_key(os.fstat(file.fileno()))
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)
        return hashlib.file_digest(file, "sha256").hexdigest()[:32], state


def file_state(path: Path) -> tuple[int, ...]:
    """The state of a file, as `content_hash` returns it."""
    return _stat_key(path.stat())


def unchanged_since(path: Path, state: tuple[int, ...]) -> bool:
    """Whether a file still has a state."""
    return file_state(path) == state


def _stat_key(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

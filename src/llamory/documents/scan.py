"""Find the documents in files and folders, and read files that may change meanwhile; no link leads out of them."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamory.common.io import PathLike
from llamory.documents.formats import SUFFIXES, supported_suffixes
from llamory.errors import LlamoryError

LINK_OUTSIDE = "a link that leads out of the given folders"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SkippedFile:
    """A file or folder that was skipped, and why, in a few words."""

    path: str
    reason: str


@dataclass
class FileScan:
    """The documents in some paths."""

    files: list[Path] = field(default_factory=list)  # each once, sorted within each folder
    skipped: list[SkippedFile] = field(default_factory=list)  # links outside or to nowhere, and irregular files
    failed: list[SkippedFile] = field(default_factory=list)  # unreadable folders, and names that aren't Unicode


def real_roots(paths: Iterable[Path]) -> tuple[str, ...]:
    """The real paths of the given paths: nothing outside of them may be read."""
    return tuple(os.path.realpath(path) for path in paths)


def is_within(path: PathLike, roots: Sequence[str]) -> bool:
    """Whether a path, with all links followed, is one of the real roots or inside one."""
    real = os.path.realpath(path)
    return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def scan_files(paths: Sequence[Path], *, log_skipped: bool = False) -> FileScan:
    """List the documents in files and folders, without hidden ones and without links that lead out of the folders.

    `log_skipped`: log a warning for everything that is skipped or can't be read. Raises LlamoryError if a path doesn't
    exist, is no file or folder, or is of an unknown format.
    """
    if not paths:
        raise LlamoryError("No documents were given; name at least one file or folder.")
    roots = real_roots(paths)
    files: dict[Path, None] = {}
    scan = FileScan()
    for path in paths:
        if path.is_dir():
            files.update(dict.fromkeys(_scan_folder(path, roots, scan)))
        elif not path.exists():
            raise LlamoryError(f"There is no file or folder {path}; check the path.")
        elif path.suffix.lower() not in SUFFIXES:
            raise LlamoryError(f"{path} is not of a kind that can be read; it should be one of {supported_suffixes()}.")
        elif not path.is_file():
            raise LlamoryError(f"{path} is not a regular file; give a file that holds text.")
        else:
            files[path] = None
    for path in files:
        try:
            str(path).encode()
            scan.files.append(path)
        except UnicodeEncodeError:
            scan.failed.append(SkippedFile(str(path), "its name is not valid Unicode; rename it"))
    for each in (*scan.skipped, *scan.failed) if log_skipped else ():
        logger.warning("Skipped %s: %s.", each.path, each.reason)
    return scan


def find_files(
    paths: PathLike | Iterable[PathLike], *, log_skipped: bool = True, skipped: list[SkippedFile] | None = None
) -> list[Path]:
    """List documents as `scan_files`; LlamoryError if a folder has none, a given file is empty, or none has text.

    `skipped` collects what is skipped or can't be read, instead of the log.
    """
    roots = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    scan = scan_files(roots, log_skipped=log_skipped and skipped is None)
    if skipped is not None:
        skipped += [*scan.skipped, *scan.failed]
    for path in roots:
        if path.is_dir() and not any(path in file.parents for file in scan.files):
            raise LlamoryError(f"The folder {path} has no documents; it should hold files of {supported_suffixes()}.")
        if path.is_file() and not has_text(path):
            raise LlamoryError(f"The file {path} is empty; it should have text.")
    if not any(map(has_text, scan.files)):
        raise LlamoryError(f"None of the {len(scan.files)} files in {', '.join(map(str, roots))} has any text.")
    return scan.files


def has_text(path: Path) -> bool:
    """Whether a file has anything but white space and a byte order mark."""
    with open_regular(path) as file:
        return any(chunk.removeprefix(b"\xef\xbb\xbf").strip() for chunk in iter(lambda: file.read(1 << 16), b""))


def _scan_folder(folder: Path, roots: Sequence[str], scan: FileScan) -> list[Path]:
    def add_failed(error: OSError) -> None:
        scan.failed.append(SkippedFile(str(error.filename), f"the folder can't be read ({error.strerror})"))

    files = []
    for directory, folders, names in os.walk(folder, onerror=add_failed):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            path = Path(directory, name)
            if path.is_symlink() and not is_within(path, roots):
                scan.skipped.append(SkippedFile(str(path), LINK_OUTSIDE))
        for name in sorted(names):
            path = Path(directory, name)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if reason := _skip_reason(path, roots):
                scan.skipped.append(SkippedFile(str(path), reason))
            else:
                files.append(path)
    return sorted(files)


def _skip_reason(path: Path, roots: Sequence[str]) -> str:
    """Why a directory entry is skipped; "" if it isn't."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if path.is_symlink() else ""  # deleted meanwhile: reading it will fail
    except OSError as error:  # links in a circle, folders without permission
        return f"can't be reached ({error.strerror})"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    return LINK_OUTSIDE if path.is_symlink() and not is_within(path, roots) else ""


def open_regular(path: Path) -> io.BufferedReader:
    """Open a regular file for reading, without ever blocking; LlamoryError if it is something else."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise LlamoryError(f"{path} is not a regular file; give a file that holds text.")
    return open(descriptor, "rb")  # noqa: PTH123 -- a descriptor has no path


def read_limited(path: Path, max_bytes: int | None) -> bytes:
    """The bytes of a regular file; LlamoryError if there are more than `max_bytes`."""
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
    sizes = f"{size / 2**20:,.0f} MiB; the limit is {max_bytes / 2**20:,.0f} MiB"
    return f"is too large ({sizes}); split it, or raise the largest file size"


def content_hash(path: Path, max_bytes: int | None = None) -> tuple[str, tuple[int, ...]]:
    """Hash of a file's bytes, and its state; errors as `read_limited`."""
    with open_regular(path) as file:
        state = _stat_key(os.fstat(file.fileno()))
        _check_size(path, os.fstat(file.fileno()).st_size, max_bytes)
        return hashlib.file_digest(file, "sha256").hexdigest()[:32], state


def file_state(path: Path) -> tuple[int, ...]:
    """The state of a file, which changes when the file is written."""
    return _stat_key(path.stat())


def _stat_key(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

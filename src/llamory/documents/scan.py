"""FileScan folders for an index: what can be read, and what is passed over and why. Nothing outside them is touched."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llamory.documents.readers import SUFFIXES, supported_suffixes
from llamory.documents.storage import SkippedFile
from llamory.errors import LlamoryError

LINK_OUTSIDE = "a link that leads out of the given folders"


@dataclass
class FileScan:
    """What some paths hold.

    Attributes:
        files: the files to read, each once, sorted within each folder.
        skipped: links that lead outside or nowhere, and things that aren't files.
        failed: folders that can't be looked into, and files whose name is no text.
    """

    files: list[Path] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)
    failed: list[SkippedFile] = field(default_factory=list)


def real_roots(paths: Iterable[Path]) -> tuple[str, ...]:
    """Where the given paths really are: the only places that may be read."""
    return tuple(os.path.realpath(path) for path in paths)


def is_within(path: str | os.PathLike[str], roots: Sequence[str]) -> bool:
    """Whether a path, all its links followed, is one of the real roots or inside one."""
    real = os.path.realpath(path)
    return any(real == root or real.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def scan_files(paths: Sequence[Path]) -> FileScan:
    """List what can be read in files and folders; hidden files and folders are left out.

    Links to folders aren't followed (what they lead to inside the given folders is found anyway); links to files are,
    as long as they lead to a directory inside the given folders.

    Raises:
        LlamoryError: a path doesn't exist, is no file or folder, or a file of a kind that can't be read.
    """
    if not paths:
        raise LlamoryError("No documents were given; name at least one file or folder.")
    roots = real_roots(paths)
    found: dict[Path, None] = {}
    result = FileScan()
    for path in paths:
        if path.is_dir():
            found.update(dict.fromkeys(_scan_folder(path, roots, result)))
        elif not path.exists():
            raise LlamoryError(
                f"There is no file or folder {path}; check the path (`llamory index --remove` takes out what is gone)."
            )
        elif path.suffix.lower() not in SUFFIXES:
            raise LlamoryError(f"{path} is not of a kind that can be read; it should be one of {supported_suffixes()}.")
        elif not path.is_file():
            raise LlamoryError(f"{path} is not a regular file; give a file that holds text.")
        else:
            found[path] = None
    result.files = [path for path in found if _has_valid_name(path, result)]
    return result


def _scan_folder(folder: Path, roots: Sequence[str], result: FileScan) -> list[Path]:
    def unreadable(error: OSError) -> None:
        result.failed.append(SkippedFile(str(error.filename), f"the folder can't be read ({error.strerror})"))

    files = []
    for directory, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            path = Path(directory, name)
            if path.is_symlink() and not is_within(path, roots):
                result.skipped.append(SkippedFile(str(path), LINK_OUTSIDE))
        for name in sorted(names):
            path = Path(directory, name)
            if name.startswith(".") or path.suffix.lower() not in SUFFIXES:
                continue
            if reason := _skip_reason(path, roots):
                result.skipped.append(SkippedFile(str(path), reason))
            else:
                files.append(path)
    return sorted(files)


def _skip_reason(path: Path, roots: Sequence[str]) -> str:
    """Why a directory entry is passed over; empty if it isn't."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "a link that leads nowhere" if path.is_symlink() else ""  # gone meanwhile: reading it will tell
    except OSError as error:  # links in a circle, folders without permission
        return f"can't be reached ({error.strerror})"
    if not stat.S_ISREG(mode):
        return "not a regular file"
    return LINK_OUTSIDE if path.is_symlink() and not is_within(path, roots) else ""


def _has_valid_name(path: Path, result: FileScan) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        result.failed.append(SkippedFile(str(path), "its name is not valid Unicode; rename it"))
        return False
    return True

"""Files that are written whole or not at all, and digests."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


@contextmanager
def atomic_path(path: PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`, which replaces it if the block ends without an error.

    A kill at any moment leaves the old file (or folder) or the new one. The temporary path has the suffix of `path`,
    since some libraries choose a format by it; the folder of `path` is made if it doesn't exist.

    Raises:
        OSError: the file can't be written; the temporary file is removed and the old one stays.
    """
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


def write_text(path: PathLike, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: PathLike, value: Any) -> None:
    """Write a JSON file atomically, indented by one space."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def file_digest(path: PathLike) -> str:
    """SHA-256 of a file's bytes, as hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Any, digits: int = 32) -> str:
    """The first hexadecimal digits of the SHA-256 of a value as JSON with sorted keys; other types count as `str`."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:digits]

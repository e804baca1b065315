"""LRU disk cache of document memories."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llamory.common.io import local_folder
from llamory.errors import LlamoryError
from llamory.models.base import cache_folder

if TYPE_CHECKING:
    from llamory.memory import MemoryBank

logger = logging.getLogger(__name__)

DEFAULT_BUDGET = 10_000_000_000
STALE_FILE_SECONDS = 3600.0  # age at which temporary files of killed runs are deleted
CALLS_PER_USAGE_SCAN = 64  # of `evict`, between two scans of the folder: other processes may write too
_FOLDER = "memory"
_SUFFIX = ".safetensors"
_PAGES_SUFFIX = ".pages"  # page index of a memory, deleted with it


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `10GB`, `500 MB`, `1.5T` or a plain number; LlamoryError if it isn't valid."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(size).upper())
    if match is None or (match[3] and not match[2]):
        raise LlamoryError(f"A size is given as 10GB, 500MB or a number of bytes, not as {size!r}.")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2] or " "))


def memory_folder(library: str) -> Path:
    """The folder of a library's memories: in the library, or in the local cache if that is an object store."""
    folder = local_folder(library)
    if folder is not None:
        return folder / _FOLDER
    return cache_folder() / _FOLDER / hashlib.sha256(library.encode()).hexdigest()[:16]


def memory_key(digest: str, reader: str) -> str:
    """The key of a document's memory, from the document's digest and what identifies a reader's memories."""
    return hashlib.sha256(f"{digest} {reader}".encode()).hexdigest()[:32]


class MemoryCache:
    """Memories by key, each in a file of `folder`, with at most `budget` bytes together.

    The modification time of a file is the time of its last use, so processes can share a cache. Deleting a file that
    is mapped is safe.
    """

    def __init__(self, folder: Path, budget: int = DEFAULT_BUDGET):
        self.folder, self.budget = folder, budget
        self._used, self._trusted_calls = 0, 0

    def path(self, key: str) -> Path:
        """Path of a memory."""
        return self.folder / f"{key}{_SUFFIX}"

    def pages_path(self, key: str) -> Path:
        """Path of a memory's page index."""
        return self.folder / f"{key}{_PAGES_SUFFIX}"

    def has(self, key: str) -> bool:
        """Whether a memory is stored."""
        return self.path(key).exists()

    def stored_keys(self) -> list[str]:
        """The keys of all memories, the least recently used first."""
        return [path.name.removesuffix(_SUFFIX) for _, path, _ in self._files()]

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(size for _, _, size in self._files())

    def get(self, key: str, *, fingerprint: str, layers: Iterable[int], dtype: str) -> MemoryBank | None:
        """Map a memory and mark it as used, if there is one; a damaged or another model's is deleted with a warning."""
        from llamory.memory import MemoryBank

        path = self.path(key)
        if not path.exists():
            return None
        try:
            # Only the header is checked: checksums would read the whole file.
            bank = MemoryBank.load(path, fingerprint=fingerprint, layers=list(layers), dtype=dtype, verify=False)
        except LlamoryError as error:
            if path.exists():
                logger.warning("%s It is removed and read again.", error)
                self.delete([key])
            return None
        self.mark_used(key)
        return bank

    def mark_used(self, key: str) -> None:
        """Set a memory's time of last use to now."""
        with suppress(OSError):  # deleted meanwhile, or a read-only disk
            os.utime(self.path(key))

    def put(self, key: str, bank: MemoryBank, *, protected: Collection[str] = ()) -> bool:
        """Write a memory if the budget allows, evicting others but `protected` ones; returns whether it did."""
        if bank.nbytes > self.budget:
            return False
        self.evict(bank.nbytes, protected=protected)
        bank.save(self.path(key))
        if not self.register_file(self.path(key), protected=[*protected, key]):  # the file is larger by its header
            self.delete([key])
        return self.has(key)

    def evict(self, size: int, *, protected: Collection[str] = ()) -> bool:
        """Delete the least recently used memories, not `protected` ones, until `size` bytes fit; returns if they do."""
        if self._trusted_calls > 0 and self._used + size <= self.budget:
            self._trusted_calls -= 1
            return True
        self._remove_stale_files()
        files = self._files()
        used = sum(each for _, _, each in files)
        for _, path, each in files:
            if used + size <= self.budget:
                break
            if (key := path.name.removesuffix(_SUFFIX)) not in protected:
                self.delete([key])
                used -= each
        self._used, self._trusted_calls = used, CALLS_PER_USAGE_SCAN
        return used + size <= self.budget

    def register_file(self, path: Path, *, protected: Collection[str] = ()) -> bool:
        """Count a file that was written, and evict others if necessary; returns whether all fit now."""
        self._used += path.stat().st_size
        return self.evict(0, protected=protected)

    def delete(self, keys: Iterable[str]) -> None:
        """Delete memories."""
        for key in keys:
            self.path(key).unlink(missing_ok=True)
            self.pages_path(key).unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, Path, int]]:
        """Last use, path and size (with pages) of each memory, the least recently used first."""
        entries = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):  # another process deleted it
                status, pages = path.stat(), self.pages_path(path.name.removesuffix(_SUFFIX))
                size = pages.stat().st_size if pages.exists() else 0
                entries.append((status.st_mtime_ns, path, status.st_size + size))
        return sorted(entries)

    def _remove_stale_files(self) -> None:
        for path in self.folder.glob(".*.partial"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_FILE_SECONDS:
                    path.unlink()

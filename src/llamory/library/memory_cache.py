"""Memory files of documents in a folder, within a budget: the least recently used goes first."""

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

from llamory.common.locks import local_folder
from llamory.errors import LlamoryError
from llamory.models.base import cache_folder

if TYPE_CHECKING:
    from llamory.memory import MemoryBank

logger = logging.getLogger(__name__)

DEFAULT_BUDGET = 10_000_000_000
# A file that is being written is replaced within minutes; what a killed run left behind goes after an hour.
STALE_FILE_SECONDS = 3600.0
# How often room is given on what is known of the files, before they are looked at again; others may write, too.
CALLS_PER_USAGE_SCAN = 64
_FOLDER = "memory"
_SUFFIX = ".safetensors"
# What a way of searching wants to find ready beside a memory; it comes and goes with it.
_PAGES_SUFFIX = ".pages"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def parse_size(size: int | str) -> int:
    """Bytes of a size such as `10GB`, `500 MB`, `1.5T` or a plain number.

    Raises:
        LlamoryError: it is no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B?\s*", str(size).upper())
    if match is None or (match[3] and not match[2]):
        raise LlamoryError(f"A size is given as 10GB, 500MB or a number of bytes, not as {size!r}.")
    unit = 1024 ** "KMGT".index(match[2]) * 1024 if match[3] else _UNITS[match[2]]
    return int(float(match[1]) * unit)


def memory_folder(library: str) -> Path:
    """The folder of a library's memories: in the library, or in the local cache if that is an object store."""
    folder = local_folder(library)
    if folder is not None:
        return folder / _FOLDER
    return cache_folder() / _FOLDER / hashlib.sha256(library.encode()).hexdigest()[:16]


def memory_key(digest: str, reader: str) -> str:
    """The key of a document's memory.

    Args:
        digest: of the document's content.
        reader: identifies a reader whose memories differ from another's.
    """
    return hashlib.sha256(f"{digest} {reader}".encode()).hexdigest()[:32]


class MemoryCache:
    """Memories by key, each a file of its own that is written whole or not at all.

    When a file was last used is its time of modification, so processes that share a shelf agree on it. Taking a file
    away harms nobody who has it mapped.

    Args:
        folder: where the files are; made with the first one.
        budget: bytes that they may take together.
    """

    def __init__(self, folder: Path, budget: int = DEFAULT_BUDGET):
        self.folder, self.budget = folder, budget
        self._used, self._trusted_calls = 0, 0

    def path(self, key: str) -> Path:
        """Where a memory is, or would be."""
        return self.folder / f"{key}{_SUFFIX}"

    def pages_path(self, key: str) -> Path:
        """Where a memory's pages are, or would be."""
        return self.folder / f"{key}{_PAGES_SUFFIX}"

    def has(self, key: str) -> bool:
        """Whether there is a memory."""
        return self.path(key).exists()

    def stored_keys(self) -> list[str]:
        """The keys of all memories, the least recently used first."""
        return [path.name.removesuffix(_SUFFIX) for _, path, _ in self._files()]

    @property
    def nbytes(self) -> int:
        """Bytes that all files take."""
        return sum(size for _, _, size in self._files())

    def get(self, key: str, *, fingerprint: str, layers: Iterable[int], dtype: str) -> MemoryBank | None:
        """Map a memory and note that it was used; None if there is none.

        A file that is damaged or of another model is removed, as if it had never been there.
        """
        from llamory.memory import MemoryBank

        path = self.path(key)
        if not path.exists():
            return None
        try:
            # The header is always checked; a sum over all data would cost as much as reading it all.
            bank = MemoryBank.load(path, fingerprint=fingerprint, layers=list(layers), dtype=dtype, verify=False)
        except LlamoryError as error:
            if path.exists():
                logger.warning("%s It is removed and read again.", error)
                self.delete([key])
            return None
        self.mark_used(key)
        return bank

    def mark_used(self, key: str) -> None:
        """Note that a memory was used."""
        with suppress(OSError):  # it is gone, or the shelf can only be read from
            os.utime(self.path(key))

    def put(self, key: str, bank: MemoryBank, *, protected: Collection[str] = ()) -> bool:
        """Write a memory, and take away as many others as the budget asks for.

        Args:
            key: what it is filed under.
            bank: the memory.
            protected: keys that stay whatever happens.

        Returns:
            Whether it is there now; it isn't if it alone is larger than the budget.

        Raises:
            OSError: the file can't be written; nothing of it is left then.
        """
        if bank.nbytes > self.budget:
            return False
        self.evict(bank.nbytes, protected=protected)
        bank.save(self.path(key))
        if not self.register_file(
            self.path(key), protected=[*protected, key]
        ):  # by its header, whose size shows only now
            self.delete([key])
        return self.has(key)

    def evict(self, size: int, *, protected: Collection[str] = ()) -> bool:
        """Take files away, the least recently used first, until so many bytes more fit the budget.

        Args:
            size: bytes.
            protected: keys that stay whatever happens.

        Returns:
            Whether so many fit now.
        """
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
        """Count a file that was written, and take others away if the budget asks for it; gives whether all fit now."""
        self._used += path.stat().st_size
        return self.evict(0, protected=protected)

    def delete(self, keys: Iterable[str]) -> None:
        """Take memories away."""
        for key in keys:
            self.path(key).unlink(missing_ok=True)
            self.pages_path(key).unlink(missing_ok=True)

    def _files(self) -> list[tuple[int, Path, int]]:
        """When each memory was last used, its path and its size with its pages; the least recently used first."""
        entries = []
        for path in self.folder.glob(f"*{_SUFFIX}"):
            with suppress(OSError):  # another process took it away just now
                status, pages = path.stat(), self.pages_path(path.name.removesuffix(_SUFFIX))
                size = pages.stat().st_size if pages.exists() else 0
                entries.append((status.st_mtime_ns, path, status.st_size + size))
        return sorted(entries)

    def _remove_stale_files(self) -> None:
        for path in self.folder.glob(".*.partial"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > STALE_FILE_SECONDS:
                    path.unlink()

"""Bring a library up to date with files: what changed is written, what is gone is taken out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llamory.library.indexer import Batch, ChunkingConfig, FileTask, is_unchanged

if TYPE_CHECKING:
    from llamory.documents import SkippedFile
    from llamory.library.store import PassageStore

# Batches after which the files that were read so far are noted: what a killed run has to parse again.
_BATCHES_PER_INDEX_UPDATE = 64


@dataclass
class AddReport:
    """What `Library.add` or `Library.remove` did.

    Attributes:
        added: documents that were new.
        unchanged: documents that were there already.
        updated: documents whose old passages were replaced.
        removed: documents that are no longer in their file, or whose file is gone.
        passages: passages that were written.
        failed: files, folders and JSON lines that couldn't be read; what the library has of such files stays.
        skipped: links that lead out of the given folders or nowhere, and things that aren't files.
    """

    added: int = 0
    unchanged: int = 0
    updated: int = 0
    removed: int = 0
    passages: int = 0
    failed: list[SkippedFile] = field(default_factory=list)
    skipped: list[SkippedFile] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Documents of the given files that the library has now."""
        return self.added + self.unchanged + self.updated


class Update:
    """One run over some files and folders.

    Args:
        store: the library's table; None if it has none yet.
        create: makes the table once the length of the vectors is known.
        roots: absolute paths of what was given.
    """

    def __init__(
        self, store: PassageStore | None, create: Callable[[int], PassageStore], roots: Sequence[Path]
    ) -> None:
        self.report = AddReport()
        self.stored_documents = {} if store is None else store.documents()
        self._store = store
        self._create = create
        self._roots = roots
        self._file_index = {} if store is None else store.file_index()
        self._seen: set[str] = set()  # sources that have passages now
        self._completed_files: dict[str, str] = {}
        self._pending_index: dict[str, str] = {}  # contents of finished files that aren't noted yet
        self._batches = 0
        self._has_written = False  # whether this run has written

    def tasks(self, files: Iterable[Path], config: ChunkingConfig) -> list[FileTask]:
        """The units of work: all files but those whose content is as it was when they were last read."""
        documents_by_file: dict[str, dict[str, str]] = {}
        for source, (file, digest) in self.stored_documents.items():
            documents_by_file.setdefault(file, {})[source] = digest
        tasks = []
        for file in map(str, files):
            if is_unchanged(file, self._file_index.get(file, ""), config):
                sources = documents_by_file.get(file, {})
                self._seen.update(sources)
                self.report.unchanged += len(sources)
            else:
                tasks.append(FileTask(file, documents_by_file.get(file, {})))
        return tasks

    def write_batch(self, batch: Batch) -> None:
        """Write one batch."""
        written = {row["source"] for row in batch.rows}
        replaced = written & self.stored_documents.keys()
        if batch.vectors is not None:
            if self._store is None:
                self._store = self._create(batch.vectors.shape[1])
            self._start_write()
            self._store.clear_indexed({row["file"] for row in batch.rows} & self._file_index.keys())
            self._store.write(batch.rows, batch.vectors, replaced)
        self._seen |= written
        self._seen.update(batch.unchanged)
        self._completed_files |= batch.completed_files
        self._pending_index |= {
            f: content for f, content in batch.completed_files.items() if content and self._file_index.get(f) != content
        }
        self.report.unchanged += len(batch.unchanged)
        self.report.passages += len(batch.rows)
        self.report.updated += len(replaced)
        self.report.added += len(written) - len(replaced)
        self.report.failed += batch.failed
        self._batches += 1
        if self._batches % _BATCHES_PER_INDEX_UPDATE == 0:
            self._update_index()

    def complete(self) -> AddReport:
        """Take out what is gone, and put the table in order."""
        if self._store is not None:
            removed = _removed_sources(self.stored_documents, self._seen, self._completed_files, self._roots)
            if removed:
                self._start_write()
                remove_sources(self._store, removed, self.stored_documents)
            self._update_index()
            if self._has_written or self._store.unfinished:
                self._store.finish_write()
            self.report.removed = len(removed)
        return self.report

    def _start_write(self) -> None:
        if self._store is not None and not self._has_written:
            self._store.start_write()
            self._has_written = True

    def _update_index(self) -> None:
        # A file that lost documents may be noted before these are taken out: the removal takes the note back.
        if self._store is not None:
            self._store.mark_indexed(self._pending_index)
            self._file_index |= self._pending_index
            self._pending_index = {}


def remove_sources(
    store: PassageStore, sources: Collection[str], stored_documents: Mapping[str, tuple[str, str]]
) -> None:
    """Take sources out of the table."""
    if sources:
        store.clear_indexed({stored_documents[source][0] for source in sources})
        store.remove(sources)


def is_under(file: str, roots: Iterable[Path]) -> bool:
    """Whether a file is one of some paths, or in one of them."""
    return any(Path(file).is_relative_to(root) for root in roots)


def _removed_sources(
    stored_documents: Mapping[str, tuple[str, str]],
    seen_sources: Collection[str],
    completed_files: Collection[str],
    roots: Sequence[Path],
) -> list[str]:
    """Sources that are no longer in a file that was read, or whose file under one of the roots doesn't exist."""

    @cache
    def is_deleted(file: str) -> bool:
        return is_under(file, roots) and not _exists(file)

    return [
        source
        for source, (file, _) in stored_documents.items()
        if source not in seen_sources and (file in completed_files or is_deleted(file))
    ]


def _exists(file: str) -> bool:
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # out of reach is not gone
        return True
    return True

"""Memories ahead of any question, as far as the budget goes, and the end of those whose documents are gone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamory.common import ram
from llamory.errors import LlamoryError
from llamory.ingest.stored_documents import StoredDocument
from llamory.library.memory_cache import MemoryCache
from llamory.library.qa import DocumentStore, QASession
from llamory.library.reader import SEGMENT
from llamory.memory import read_header

# Documents whose texts are held at once.
_BATCH_DOCUMENTS = 64

_OOM_ADVICE = "keep the memory as int8, choose fewer memory layers or a smaller model; what was read is kept"


@dataclass
class MemoryReport:
    """What `Library.precompute_memory` did.

    Attributes:
        read: documents that were read now.
        existing: documents whose memory was there already, or is that of another document with the same text.
        remaining: documents that the budget has no room for; they are read when they are asked.
        tokens: tokens that were read now.
        seconds: how long it took, without loading the model.
        bytes: what all memories take on the disk.
        budget: what they may take.
        reader: the model's name.
    """

    read: int = 0
    existing: int = 0
    remaining: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0
    budget: int = 0
    reader: str = ""


def precompute_memory(
    qa_session: QASession, *, progress: bool = True, engine: str = "local", ray_address: str | None = None
) -> MemoryReport:
    """Read all of a library's documents that have no memory yet, as many as fit the budget.

    Each memory is kept as soon as it is there, so a run that was stopped goes on where it was. What makes room is what
    belongs to no document as it is now; nothing that was read ahead has to go for something else.

    Raises:
        LlamoryError: the reader can't be loaded, or memory is short.
        OSError: a memory can't be written.
    """
    reader = qa_session.reader
    qa_session.save_reader_config(change=True)
    started = time.perf_counter()
    report = MemoryReport(reader=reader.name, budget=reader.memory_cache.budget)
    reader.memory_cache.evict(0)  # the budget may have become smaller
    sources = qa_session.library.sources()
    pending: dict[str, str] = {}
    keys: set[str] = set()
    for documents in _document_batches(qa_session, sources):
        for document in documents:
            key = reader.key(document)
            if key not in keys and not reader.memory_cache.has(key):
                pending[key] = document.source
            else:
                report.existing += 1
            keys.add(key)
    with (
        _open_encoder(qa_session, engine, ray_address) as read,
        _ProgressBar(len(pending), shown=progress) as bar,
        ram.translate_oom(_OOM_ADVICE),
    ):
        for documents in _document_batches(qa_session, list(pending.values())):
            batch, batch_bytes = [], 0  # what is read together must fit together
            for document in documents:
                batch_bytes += reader.size(reader.tokenize(document))
                if not reader.memory_cache.evict(batch_bytes, protected=keys):
                    break
                batch.append(document)
            for document, bank in read(batch, bar.advance):
                report.tokens += bank.length(segment=SEGMENT)
                reader.store(document, bank, keys)
                report.read += 1
                bar.document_done()
            if len(batch) < len(documents):
                break
    report.remaining = len(pending) - report.read
    report.seconds, report.bytes = time.perf_counter() - started, reader.memory_cache.nbytes
    return report


@contextmanager
def _open_encoder(qa_session: QASession, engine: str, address: str | None) -> Iterator[Callable[..., Any]]:
    """Who reads: this process, or workers of a Ray cluster."""
    if engine == "local":
        yield qa_session.reader.read
        return
    from llamory.library.ray import MemoryWriters

    on_gpu = qa_session.reader.model.device.type == "cuda"
    with MemoryWriters(qa_session.reader_factory(), address, on_gpu=on_gpu) as writers:
        yield writers.read


def delete_stale_memories(library: DocumentStore, folder: Path, sources: Collection[str] | None = None) -> int:
    """Remove memories whose document has changed or is gone from the library; gives how many.

    Only documents of `sources` are checked, if they are given.

    They would never be used, but what a user has removed shouldn't lie about.
    """
    memory_cache = MemoryCache(folder)
    metadata = {key: _read_metadata(memory_cache.path(key)) for key in memory_cache.stored_keys()}
    if sources is not None:
        metadata = {key: each for key, each in metadata.items() if not each or each["source"] in sources}
    existing = library.passages_of({each["source"] for each in metadata.values() if each})
    digests = {source: StoredDocument(source, tuple(passages)).digest for source, passages in existing.items()}
    stale = [key for key, each in metadata.items() if not each or digests.get(each["source"]) != each["text"]]
    memory_cache.delete(stale)
    return len(stale)


def _read_metadata(path: Path) -> dict[str, Any] | None:
    """What a memory file says of its document; None if it is damaged, or gone just now."""
    try:
        metadata: dict[str, Any] = read_header(path)["segments"][0]["metadata"]
    except (LlamoryError, IndexError):
        return None
    return metadata


def _document_batches(qa_session: QASession, sources: Sequence[str]) -> Iterator[list[StoredDocument]]:
    for start in range(0, len(sources), _BATCH_DOCUMENTS):
        yield qa_session.documents(sources[start : start + _BATCH_DOCUMENTS])


class _ProgressBar:
    """Documents read ahead, on standard error."""

    def __init__(self, documents: int, *, shown: bool):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("Reading ahead"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("documents, {task.fields[tokens]:,} tokens"),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            disable=not shown or not documents,
        )
        self._tokens = 0
        self._task = self._progress.add_task("", total=documents, tokens=0)

    def __enter__(self) -> _ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, _: str, tokens: int) -> None:
        self._tokens += tokens
        self._progress.update(self._task, tokens=self._tokens)

    def document_done(self) -> None:
        self._progress.advance(self._task)

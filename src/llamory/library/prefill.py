"""Precompute document memories within a disk budget; delete stale ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamory.common import ram
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.ingest.documents import StoredDocument
from llamory.library.memory_cache import MemoryCache
from llamory.library.qa import DocumentStore, LibrarySource
from llamory.memory import read_header

_BATCH_DOCUMENTS = 64  # to load at a time

_OOM_ADVICE = "keep the memory as int8, choose fewer memory layers or a smaller model; what was read is kept."


@dataclass
class MemoryReport:
    """Result of `Library.precompute_memory`."""

    read: int = 0  # documents encoded by this run
    existing: int = 0  # documents whose memory exists, as their own or of the same content
    remaining: int = 0  # documents that exceed the budget; a question that needs them encodes them
    tokens: int = 0  # encoded by this run
    seconds: float = 0.0  # without loading the model
    bytes: int = 0  # of all memories
    budget: int = 0  # maximum of `bytes`
    reader: str = ""  # the model's name


def precompute_memory(
    source: LibrarySource, *, progress: bool = True, engine: str = "local", ray_address: str | None = None
) -> MemoryReport:
    """Encode the documents of a library that have no memory, as many as fit the budget; a stopped run resumes.

    Only memories of no current document are evicted.

    Raises:
        LlamoryError: the reader can't be loaded, or there is too little RAM.
        OSError: a memory can't be written.
    """
    reader, cache = source.reader, source.reader.memory_cache
    source.save_reader_config(change=True)
    started = time.perf_counter()
    report = MemoryReport(reader=reader.name, budget=cache.budget)
    cache.evict(0)  # the budget may have become smaller
    pending: dict[str, str] = {}
    keys: set[str] = set()
    for documents in _document_batches(source, source.library.sources()):
        for document in documents:
            key = reader.key(document)
            if key not in keys and not cache.has(key):
                pending[key] = document.source
            else:
                report.existing += 1
            keys.add(key)
    with (
        _open_encoder(source, engine, ray_address) as read,
        ProgressBar("Reading documents", len(pending), unit="documents", shown=progress) as bar,
        ram.translate_oom(_OOM_ADVICE),
    ):

        def on_tokens(_: str, tokens: int) -> None:
            report.tokens += tokens
            bar.advance(0, detail=f"{report.tokens:,} tokens")

        for documents in _document_batches(source, list(pending.values())):
            batch, batch_bytes = [], 0  # the memories of a batch must fit together
            for tokenized in map(reader.tokenize, documents):
                batch_bytes += reader.size(tokenized)
                if not cache.evict(batch_bytes, protected=keys):
                    break
                batch.append(tokenized)
            for tokenized, bank in read(batch, on_tokens):
                reader.store(tokenized, bank, keys)
                report.read += 1
                bar.advance()
            if len(batch) < len(documents):
                break
    report.remaining = len(pending) - report.read
    report.seconds, report.bytes = time.perf_counter() - started, cache.nbytes
    return report


@contextmanager
def _open_encoder(source: LibrarySource, engine: str, address: str | None) -> Iterator[Callable[..., Any]]:
    """The function that encodes: in this process, or on workers of a Ray cluster."""
    if engine == "local":
        yield source.reader.read
        return
    from llamory.library.ray import MemoryWriters

    on_gpu = source.reader.model.device.type == "cuda"
    with MemoryWriters(source.reader_factory(), address, on_gpu=on_gpu) as writers:
        yield writers.read


def delete_stale_memories(library: DocumentStore, folder: Path, sources: Collection[str] | None = None) -> int:
    """Delete memories in `folder` whose document (of `sources`, or any) changed or is gone; returns their number."""
    cache = MemoryCache(folder)
    metadata = {key: _read_metadata(cache.path(key)) for key in cache.stored_keys()}
    if sources is not None:
        metadata = {key: each for key, each in metadata.items() if not each or each["source"] in sources}
    existing = library.passages_of({each["source"] for each in metadata.values() if each})
    digests = {source: StoredDocument(source, tuple(passages)).digest for source, passages in existing.items()}
    stale = [key for key, each in metadata.items() if not each or digests.get(each["source"]) != each["text"]]
    cache.delete(stale)
    return len(stale)


def _read_metadata(path: Path) -> dict[str, Any] | None:
    """Metadata of a memory's document; None if the file is damaged or was deleted meanwhile."""
    try:
        return dict(read_header(path)["segments"][0]["metadata"])
    except (LlamoryError, IndexError):
        return None


def _document_batches(source: LibrarySource, sources: Sequence[str]) -> Iterator[list[StoredDocument]]:
    for start in range(0, len(sources), _BATCH_DOCUMENTS):
        yield source.documents(sources[start : start + _BATCH_DOCUMENTS])

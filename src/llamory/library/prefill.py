"""Memories ahead of any question, as far as the budget goes, and the end of those whose documents are gone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common import ram
from llamory.errors import LlamoryError
from llamory.ingest.stored_documents import StoredDocument
from llamory.library.memory_cache import Shelf
from llamory.library.qa import Desk
from llamory.library.reader import SEGMENT
from llamory.memory import read_header

if TYPE_CHECKING:
    from llamory.library.readable import Readable

# Documents whose texts are held at once.
_TOGETHER = 64

_ADVICE = "keep the memory as int8, choose fewer memory layers or a smaller model; what was read is kept"


@dataclass
class MemoryReport:
    """What `Library.read_ahead` did.

    Attributes:
        read: documents that were read now.
        there: documents whose memory was there already, or is that of another document with the same text.
        left: documents that the budget has no room for; they are read when they are asked.
        tokens: tokens that were read now.
        seconds: how long it took, without loading the model.
        bytes: what all memories take on the disk.
        budget: what they may take.
        reader: the model's name.
    """

    read: int = 0
    there: int = 0
    left: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes: int = 0
    budget: int = 0
    reader: str = ""


def read_ahead(
    desk: Desk, *, progress: bool = True, engine: str = "local", ray_address: str | None = None
) -> MemoryReport:
    """Read all of a library's documents that have no memory yet, as many as fit the budget.

    Each memory is kept as soon as it is there, so a run that was stopped goes on where it was. What makes room is what
    belongs to no document as it is now; nothing that was read ahead has to go for something else.

    Raises:
        LlamoryError: the reader can't be loaded, or memory is short.
        OSError: a memory can't be written.
    """
    reader = desk.reader
    desk.note_reader(change=True)
    started = time.perf_counter()
    report = MemoryReport(reader=reader.name, budget=reader.shelf.budget)
    reader.shelf.make_room(0)  # the budget may have become smaller
    sources = desk.library.sources()
    waiting: dict[str, str] = {}
    keys: set[str] = set()
    for documents in _some(desk, sources):
        for document in documents:
            key = reader.key(document)
            if key not in keys and not reader.shelf.has(key):
                waiting[key] = document.source
            else:
                report.there += 1
            keys.add(key)
    with (
        _reading(desk, engine, ray_address) as read,
        _Bar(len(waiting), shown=progress) as bar,
        ram.translate_oom(_ADVICE),
    ):
        for documents in _some(desk, list(waiting.values())):
            chosen, held = [], 0  # what is read together must fit together
            for document in documents:
                held += reader.size(reader.tokenize(document))
                if not reader.shelf.make_room(held, keep=keys):
                    break
                chosen.append(document)
            for document, bank in read(chosen, bar.advance):
                report.tokens += bank.length(segment=SEGMENT)
                reader.keep(document, bank, keys)
                report.read += 1
                bar.document_done()
            if len(chosen) < len(documents):
                break
    report.left = len(waiting) - report.read
    report.seconds, report.bytes = time.perf_counter() - started, reader.shelf.nbytes
    return report


@contextmanager
def _reading(desk: Desk, engine: str, address: str | None) -> Iterator[Callable[..., Any]]:
    """Who reads: this process, or workers of a Ray cluster."""
    if engine == "local":
        yield desk.reader.read
        return
    from llamory.library.ray_memory import MemoryWriters

    on_gpu = desk.reader.model.device.type == "cuda"
    with MemoryWriters(desk.reader_maker(), address, on_gpu=on_gpu) as writers:
        yield writers.read


def drop_stale(library: Readable, folder: Path) -> int:
    """Remove memories whose document has changed or is gone from the library; gives how many.

    They would never be used, but what a user has removed shouldn't lie about.
    """
    shelf = Shelf(folder)
    facts = {key: _facts(shelf.path(key)) for key in shelf.names()}
    there = library.passages_of({each["source"] for each in facts.values() if each})
    digests = {source: StoredDocument(source, tuple(passages)).digest for source, passages in there.items()}
    stale = [key for key, each in facts.items() if not each or digests.get(each["source"]) != each["text"]]
    shelf.drop(stale)
    return len(stale)


def _facts(path: Path) -> dict[str, Any] | None:
    """What a memory file says of its document; None if it is damaged, or gone just now."""
    try:
        facts: dict[str, Any] = read_header(path)["segments"][0]["metadata"]
    except (LlamoryError, IndexError):
        return None
    return facts


def _some(desk: Desk, sources: Sequence[str]) -> Iterator[list[StoredDocument]]:
    for start in range(0, len(sources), _TOGETHER):
        yield desk.documents(sources[start : start + _TOGETHER])


class _Bar:
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

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, _: str, tokens: int) -> None:
        self._tokens += tokens
        self._progress.update(self._task, tokens=self._tokens)

    def document_done(self) -> None:
        self._progress.advance(self._task)

"""Documents read into memory by actors on a Ray cluster.

A writer is an actor that loads a reader once, reads documents and sends their memories back as files; the process that
asked puts them on its shelf. A writer that dies is started again and reads what it had in hand again: nothing that is
on the shelf was written by a process that could die halfway.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.memory import MemoryBank

# Documents that a writer takes at once: a reader reads short ones together.
DOCUMENTS_PER_CALL = 8
# How often a writer may die before it is given up, as it would always die of the same document.
RESTARTS = 4

D = TypeVar("D")


class DocumentReader(Protocol[D]):
    """Reads documents into memory."""

    def read(self, documents: Iterable[D], advance: Callable[[str, int], None]) -> Iterator[tuple[D, MemoryBank]]:
        """Each of the documents with its memory, in any order; `advance` is told (source, tokens) on the way."""
        ...


class MemoryWriters:
    """Writers on a cluster, with their models loaded until the `with` block ends.

    Args:
        make_reader: makes a reader on a worker; it is pickled.
        address: of a running cluster; None for one of our own on this machine.
        on_gpu: one writer per GPU instead of one per core.

    Raises:
        LlamoryError: Ray isn't installed, or there is no such cluster.
    """

    def __init__(
        self, make_reader: Callable[[], DocumentReader[Any]], address: str | None = None, *, on_gpu: bool = False
    ):
        self._make_reader, self._address, self._on_gpu = make_reader, address, on_gpu
        self._stack = ExitStack()
        self._writers: list[Any] = []

    def __enter__(self) -> MemoryWriters:
        from llamory.library.ray import check_ray, cluster

        check_ray(self._address)
        self._stack.enter_context(cluster(self._address))
        return self

    def __exit__(self, *_: object) -> None:
        import ray

        for writer in self._writers:
            ray.kill(writer)
        self._writers = []
        self._stack.close()

    def read(
        self, documents: Iterable[D], advance: Callable[[str, int], None] = lambda *_: None
    ) -> Iterator[tuple[D, MemoryBank]]:
        """Read documents, and give each with its memory as soon as it is there.

        Args:
            documents: anything that the readers read; each is pickled.
            advance: is told a document's source and tokens when its memory has come.

        Raises:
            LlamoryError: a document can't be read, or a writer died again and again.
        """
        import ray
        from ray.util import ActorPool

        documents = list(documents)
        calls = [documents[i : i + DOCUMENTS_PER_CALL] for i in range(0, len(documents), DOCUMENTS_PER_CALL)]
        pool = ActorPool(self._start_writers(len(calls)))
        results = pool.map_unordered(lambda writer, call: writer.read.remote(call[0], call[1]), list(enumerate(calls)))
        while pool.has_next():
            try:
                number, memories, error = next(results)
            except ray.exceptions.RayActorError as actor_error:
                raise LlamoryError(
                    "A worker that reads documents into memory died again and again, probably for want of memory; use "
                    "fewer workers or a smaller reader. What was read is kept."
                ) from actor_error
            if error:
                raise LlamoryError(error)
            for index, progress_events, data in memories:
                for source, tokens in progress_events:
                    advance(source, tokens)
                yield calls[number][index], _from_bytes(data)

    def _start_writers(self, max_writers: int) -> list[Any]:
        """Writers, as many as there is work and room for."""
        import ray

        resources = ray.cluster_resources()
        num_slots = max(1, int(resources.get("GPU" if self._on_gpu else "CPU", 1)))
        actor_resources: dict[str, Any] = {"num_gpus": 1} if self._on_gpu else {"num_cpus": 1}
        actor = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, **actor_resources)(MemoryWriter)
        while len(self._writers) < min(max_writers, num_slots):
            self._writers.append(actor.remote(self._make_reader))
        return list(self._writers)


class MemoryWriter:
    """An actor: documents in, memory files out."""

    def __init__(self, make_reader: Callable[[], DocumentReader[Any]]) -> None:
        self._make_reader = make_reader
        self._reader: DocumentReader | None = None

    def read(
        self, number: int, documents: list[Any]
    ) -> tuple[int, list[tuple[int, list[tuple[str, int]], bytes]], str]:
        """The memories of some documents.

        Returns:
            The number as given; per document its place in the list, what `advance` was told, and its memory's file; a
            sentence for the user if something can't be read.
        """
        progress_events: list[tuple[str, int]] = []
        memories = []
        indices = {id(document): index for index, document in enumerate(documents)}
        try:
            if self._reader is None:
                self._reader = self._make_reader()
            for document, bank in self._reader.read(
                documents, lambda source, tokens: progress_events.append((source, tokens))
            ):
                memories.append((indices[id(document)], progress_events.copy(), _to_bytes(bank)))
                progress_events.clear()
        except (LlamoryError, OSError) as error:
            return number, [], str(error)
        return number, memories, ""


def _to_bytes(bank: MemoryBank) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        bank.save(path)
        return path.read_bytes()


def _from_bytes(data: bytes) -> MemoryBank:
    from llamory.memory import MemoryBank

    # The file stays mapped when its name is gone.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        path.write_bytes(data)
        return MemoryBank.load(path)

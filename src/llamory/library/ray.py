"""Run a library's work on Ray, on this machine or a cluster: `RayIndexer` embeds, `MemoryWriters` encode into memory.

A worker that dies is started again and repeats its work, so a result may arrive twice; it is written once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import re
import socket
import tempfile
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llamory.common.extras import import_extra
from llamory.common.io import local_folder
from llamory.errors import LlamoryError
from llamory.library.indexer import Batch, ChunkingConfig, FileTask, chunk_files, embed_batch, find_vectors

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

    from llamory.library.indexer import SaveVectors
    from llamory.memory import MemoryBank

FILES_PER_CALL = 16  # of a file reader: what is read again when its worker dies
EMBEDDERS_PER_READER = 8  # chunking takes far less time than embedding
DOCUMENTS_PER_CALL = 8  # of a memory writer: it encodes short ones together
MAX_RESTARTS = 4  # of a memory writer until the run fails, as the same document may kill it every time
_BLOCK_BYTES = 2**18  # of passages: small, so that one large file keeps all embedders busy
_STORE_BYTES = 2**28  # object store of a cluster started here: for passages, and a model given as an object
_CONNECT_TIMEOUT = 10.0  # seconds

D = TypeVar("D")


def check_ray(address: str | None = None) -> None:
    """Raise LlamoryError if Ray isn't installed, or nothing listens at an address `host:port`."""
    import_extra("ray.data")
    if match := re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d+)", address or ""):
        try:  # Ray itself would try for minutes
            socket.create_connection((match[1], int(match[2])), _CONNECT_TIMEOUT).close()
        except (OSError, OverflowError) as error:
            raise _cluster_error(address, error) from error


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connect to a Ray cluster: the one this process is connected to, the one at an address, or a new one here."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"object_store_memory": _STORE_BYTES, "include_dashboard": False}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # LanceDB warns about the forks that start Ray's programs; none of them uses a table.
            warnings.simplefilter("ignore", RuntimeWarning)
            ray.init(address=address or "local", **options)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _cluster_error(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _actors(on_gpu: bool) -> tuple[int, dict[str, Any]]:
    """How many actors the cluster holds, one per GPU or per core, and the resources of each."""
    import ray

    number = max(1, int(ray.cluster_resources().get("GPU" if on_gpu else "CPU", 1)))
    return number, {"num_gpus": 1} if on_gpu else {"num_cpus": 1}


def _cluster_error(address: str | None, error: Exception) -> LlamoryError:
    where = "on this machine" if address is None else f"at {address}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return LlamoryError(f"There is no Ray cluster {where} ({reason}); check that it runs, and its RAY_AUTH_MODE.")


@dataclass
class BatchMessage:
    """A batch on its way between workers."""

    batch: Batch = field(default_factory=Batch)
    read_ids: dict[str, str] = field(default_factory=dict)  # by file: id of the call that read it
    new_rows: Sequence[Mapping[str, Any]] = ()  # instead of a batch, rows of an unfinished one
    new_vectors: np.ndarray | None = None  # and their vectors
    embedded: int = 0  # passages that were embedded since the last message
    error: str = ""  # instead of a batch, a sentence for the user


@dataclass
class RayIndexer:
    """Chunks and embeds files on a Ray cluster."""

    config: ChunkingConfig
    embedder: SentenceTransformer  # the library's model, as this process loaded it
    model: str  # where workers load it from: a hub id, or a folder that they see; empty: they are sent this one
    library: str  # path or URI; workers that see it don't embed what it holds
    address: str | None = None  # of a running cluster; None: start one on this machine
    save_vectors: SaveVectors = lambda *_: None  # as for `index_files`
    advance: Callable[[int], None] = lambda _: None  # as for `index_files`

    def run(self, tasks: Collection[FileTask]) -> Iterator[Batch]:
        """Batches of all files, in order; raises LlamoryError where a worker does."""
        check_ray(self.address)
        deduplicator = _Deduplicator()
        with cluster(self.address):
            for message in self._messages(list(tasks)):
                if message.error:
                    raise LlamoryError(message.error)
                self.advance(message.embedded)
                if message.new_vectors is not None:
                    self.save_vectors(message.new_rows, message.new_vectors)
                else:
                    yield deduplicator.deduplicate(message)

    def _messages(self, tasks: list[FileTask]) -> Iterator[BatchMessage]:
        import ray

        from llamory.embedding.encoder import chunk_tokenizer, fingerprint

        folder = local_folder(self.library)
        on_gpu = ray.cluster_resources().get("GPU", 0) >= 1 and self.embedder.device.type == "cuda"
        embedders, actor_resources = _actors(on_gpu)
        readers = max(1, embedders // EMBEDDERS_PER_READER)
        items = [{"tasks": pickle.dumps(tasks[i : i + FILES_PER_CALL])} for i in range(0, len(tasks), FILES_PER_CALL)]
        data = ray.data.from_items(items, override_num_blocks=len(items))
        # A file's last batch must arrive after all others: the file is then marked as indexed.
        data.context.execution_options.preserve_order = True
        data.context.target_max_block_size = _BLOCK_BYTES
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        chunked = data.map_batches(
            FileReader,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(readers, len(items))),
            num_cpus=0,  # it shares a core with the embedders, for which it waits most of the time
            fn_constructor_kwargs={"config": self.config, "tokenizer": chunk_tokenizer(self.embedder)},
        )
        embedded = chunked.map_batches(
            Embedder,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(embedders, len(items))),
            **actor_resources,
            fn_constructor_kwargs={
                "config": self.config,
                "model": self.model or ray.put(self.embedder),
                "fingerprint": fingerprint(self.embedder),
                "library": self.library if folder is None else str(folder.absolute()),
                "device": None if on_gpu else "cpu",
            },
        )
        for row in embedded.iter_rows():
            yield pickle.loads(row["message"])


class FileReader:
    """An actor that reads and chunks files."""

    def __init__(self, config: ChunkingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config, self._tokenizer = config, tokenizer

    def __call__(self, rows: Mapping[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        """Messages with the batches of some lists of files, without vectors."""
        for row in rows["tasks"]:
            tasks, read_id = pickle.loads(row), uuid.uuid4().hex
            try:
                for batch in chunk_files(tasks, self._config, self._tokenizer):
                    files = {row["file"] for row in batch.rows} | set(batch.completed_files)
                    yield _pack(BatchMessage(batch, dict.fromkeys(files, read_id)))
            except (LlamoryError, OSError) as error:
                yield _pack(BatchMessage(error=str(error)))


class Embedder:
    """An actor that loads the model once and gives batches their vectors."""

    def __init__(self, config: ChunkingConfig, model: Any, fingerprint: str, library: str, device: str | None) -> None:
        self._config, self._model, self._fingerprint = config, model, fingerprint
        self._library, self._device = library, device

    def __call__(self, rows: Mapping[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        """The same messages with vectors, and before each the vectors of a large batch as they are computed."""
        for row in rows["message"]:
            message: BatchMessage = pickle.loads(row)
            batch, counts = message.batch, list[int]()
            try:
                if batch.rows:  # the model is loaded only then
                    parts = embed_batch(batch, self._config, self._embedder, self._find_vectors, counts.append)
                    for new_rows, new_vectors in parts:
                        yield _pack(BatchMessage(new_rows=new_rows, new_vectors=new_vectors, embedded=sum(counts)))
                        counts.clear()
                    message.embedded = sum(counts)
            except (LlamoryError, OSError) as error:
                message = BatchMessage(error=str(error))
            yield _pack(message)

    @cached_property
    def _embedder(self) -> SentenceTransformer:
        from llamory.embedding.encoder import fingerprint

        if isinstance(self._model, str):
            from llamory.embedding.pipeline import load_embedder

            embedder = load_embedder(self._model, device=self._device)
        else:
            import ray

            embedder = ray.get(self._model)
        if fingerprint(embedder) != self._fingerprint:
            raise LlamoryError(f"A worker finds another model at {self._model}; give one that is the same everywhere.")
        return embedder

    @cached_property
    def _find_vectors(self) -> Callable[[Collection[str]], Mapping[str, np.ndarray]]:
        """Looks up what the library held when this actor started; nothing where the library can't be seen."""
        from llamory.library.store import PassageStore, PendingVectors

        try:
            store = PassageStore.open(self._library)
            if store is not None and store.settings.fingerprint != self._fingerprint:
                store = None
            pending = PendingVectors(self._library, self._fingerprint, read_only=True)
        except (LlamoryError, OSError):
            store = pending = None
        return lambda texts: find_vectors(store, pending, texts)


class _Deduplicator:
    """Takes messages in order and passes each document once."""

    def __init__(self) -> None:
        self._seen_sources: set[str] = set()
        self._read_ids: dict[str, str] = {}

    def deduplicate(self, message: BatchMessage) -> Batch:
        batch = message.batch
        new_rows = [i for i, row in enumerate(batch.rows) if row["source"] not in self._seen_sources]
        unchanged = [source for source in batch.unchanged if source not in self._seen_sources]
        # A file that was read twice may have changed in between: it isn't marked as indexed.
        read_ids = message.read_ids.items()
        inconsistent = [file for file, each in read_ids if self._read_ids.setdefault(file, each) != each]
        self._seen_sources.update(batch.unchanged, (row["source"] for row in batch.rows))
        return dataclasses.replace(
            batch,
            rows=[batch.rows[i] for i in new_rows],
            vectors=batch.vectors[new_rows] if batch.vectors is not None and new_rows else None,
            unchanged=unchanged,
            completed_files=batch.completed_files | dict.fromkeys(batch.completed_files.keys() & inconsistent, ""),
        )


def _pack(message: BatchMessage) -> dict[str, list[bytes]]:
    return {"message": [pickle.dumps(message)]}


class MemoryWriters:
    """Actors that encode documents into memory; their models stay loaded until the `with` block ends.

    Args:
        make_reader: pickled; makes on a worker an object whose `read` is as that of `llamory.library.reader.Reader`.
        address: address of a running cluster; None to start one on this machine.
        on_gpu: one writer per GPU instead of one per core.
    """

    def __init__(self, make_reader: Callable[[], Any], address: str | None = None, *, on_gpu: bool = False):
        self._make_reader, self._address, self._on_gpu = make_reader, address, on_gpu
        self._stack, self._writers = ExitStack(), list[Any]()

    def __enter__(self) -> MemoryWriters:
        check_ray(self._address)
        self._stack.enter_context(cluster(self._address))
        return self

    def __exit__(self, *_: object) -> None:
        self._writers = []
        self._stack.close()

    def read(
        self, documents: Iterable[D], advance: Callable[[str, int], None] = lambda *_: None
    ) -> Iterator[tuple[D, MemoryBank]]:
        """Encode documents, and yield each with its memory when it arrives; `advance` gets (source, tokens) of it."""
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
                cause = "A worker that encodes documents died several times, probably because memory ran out"
                raise LlamoryError(f"{cause}; use fewer workers or a smaller reader.") from actor_error
            if error:
                raise LlamoryError(error)
            for index, token_counts, data in memories:
                for source, tokens in token_counts:
                    advance(source, tokens)
                yield calls[number][index], _from_bytes(data)

    def _start_writers(self, max_writers: int) -> list[Any]:
        import ray

        max_actors, actor_resources = _actors(self._on_gpu)
        actor = ray.remote(max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, **actor_resources)(MemoryWriter)
        while len(self._writers) < min(max_writers, max_actors):
            self._writers.append(actor.remote(self._make_reader))
            self._stack.callback(ray.kill, self._writers[-1])
        return list(self._writers)


class MemoryWriter:
    """An actor that turns documents into memory files."""

    def __init__(self, make_reader: Callable[[], Any]) -> None:
        self._reader = cache(make_reader)

    def read(self, number: int, documents: list[Any]) -> tuple[int, list[tuple[int, list[Any], bytes]], str]:
        """The given number; per document its index, (source, tokens) counts and memory file; and an error message."""
        token_counts: list[Any] = []
        memories = []
        indices = {id(document): index for index, document in enumerate(documents)}
        try:
            for document, bank in self._reader().read(documents, lambda *counts: token_counts.append(counts)):
                memories.append((indices[id(document)], token_counts.copy(), _to_bytes(bank)))
                token_counts.clear()
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

    # The file stays mapped after its name is deleted.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.safetensors"
        path.write_bytes(data)
        return MemoryBank.load(path)

"""Indexing on Ray Data: actors that read and cut files, and actors that embed, on this machine or on a cluster.

Only the process that called `Library.add` writes: what comes back goes through the same commits as without Ray. A
worker that dies is started again and its files are read again; should a document arrive twice, it is written once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import re
import socket
import uuid
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llamory.common.extras import import_extra
from llamory.errors import LlamoryError
from llamory.library.indexer import Batch, ChunkingConfig, FileTask, chunk_files, embed_batch

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

# Files that one call of a reader takes: what is read again when its worker dies.
FILES_PER_CALL = 16
# Embedders that one reader can feed: cutting a passage takes far less time than embedding it.
EMBEDDERS_PER_READER = 8
# What a block of passages may weigh, so that one large file still keeps all embedders busy.
_BLOCK_BYTES = 2**18
# Object store of a cluster of our own: passages pass through it, and a model that was given as an object lies in it.
_STORE_BYTES = 2**28

_CONNECTING_SECONDS = 10.0

logger = logging.getLogger(__name__)


def check_ray(address: str | None = None) -> None:
    """Make sure that Ray is there, and that something listens at a cluster's address.

    Args:
        address: `host:port` of a running cluster, or another address that `ray.init` takes, which isn't tried.

    Raises:
        LlamoryError: it isn't installed, or there is nothing at the address.
    """
    import_extra("ray.data")
    match = re.fullmatch(r"\[?([\w.:-]+?)\]?:(\d+)", address or "")
    if match is not None:
        # Ray itself would try for minutes.
        try:
            socket.create_connection((match[1], int(match[2])), _CONNECTING_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _cluster_error(address, error) from error


def _cluster_error(address: str | None, error: Exception) -> LlamoryError:
    where = "on this machine" if address is None else f"at {address}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return LlamoryError(
        f"There is no Ray cluster {where} ({reason}); check that it runs, and that RAY_AUTH_MODE is as it "
        "was started with."
    )


@dataclass
class BatchMessage:
    """A batch on its way between workers.

    Attributes:
        batch: the batch.
        read_ids: the files that its documents are from, each with a name of this one reading of it.
        embedded: passages that were embedded for it.
        error: a sentence for the user, in place of a batch.
    """

    batch: Batch = field(default_factory=Batch)
    read_ids: dict[str, str] = field(default_factory=dict)
    embedded: int = 0
    error: str = ""


@dataclass
class RayEngine:
    """Runs the files on a Ray cluster.

    Attributes:
        config: how files become passages.
        embedder: the library's model, as this process loaded it.
        model: where the workers find it (a folder, which they must see too, or a hub id); empty to send them this one.
        fingerprint: hash of the model, which theirs must have.
        library: the library's path or address; workers that see it don't embed what it holds.
        address: of a running cluster; None for one of our own on this machine.
        advance: is told how many passages were embedded.
    """

    config: ChunkingConfig
    embedder: SentenceTransformer
    model: str
    fingerprint: str
    library: str
    address: str | None = None
    advance: Callable[[int], None] = lambda _: None

    def run(self, tasks: Collection[FileTask]) -> Iterator[Batch]:
        """Batches of all files, in order.

        Raises:
            LlamoryError: there is no such cluster, a worker can't load the model, or a file can't be read and the
                recipe is strict.
        """
        if not tasks:
            return
        check_ray(self.address)
        with cluster(self.address):
            yield from _Deduplicator(self.advance).batches(self._messages(list(tasks)))

    def _messages(self, tasks: list[FileTask]) -> Iterator[BatchMessage]:
        import ray

        from llamory.embedding.library_encoder import chunk_tokenizer

        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), max(1, int(resources.get("CPU", 1)))
        on_gpu = gpus > 0 and self.embedder.device.type == "cuda"
        embedders = gpus if on_gpu else cpus
        actor_resources: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
        items = [{"tasks": pickle.dumps(tasks[i : i + FILES_PER_CALL])} for i in range(0, len(tasks), FILES_PER_CALL)]
        data = ray.data.from_items(items, override_num_blocks=len(items))
        # The end of a file must come after all of it: the library notes then that it has the file.
        data.context.execution_options.preserve_order = True
        data.context.target_max_block_size = _BLOCK_BYTES
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        read = data.map_batches(
            FileReader,
            batch_size=1,
            compute=_actor_pool(max(1, embedders // EMBEDDERS_PER_READER), len(items)),
            num_cpus=0,  # beside the embedders, which it only waits for
            fn_constructor_kwargs={"config": self.config, "tokenizer": chunk_tokenizer(self.embedder)},
        )
        source = self.model or ray.put(self.embedder)
        embedded = read.map_batches(
            Embedder,
            batch_size=1,
            compute=_actor_pool(embedders, len(items)),
            **actor_resources,
            fn_constructor_kwargs={
                "config": self.config,
                "model": source,
                "fingerprint": self.fingerprint,
                "library": _absolute_uri(self.library),
                "device": None if on_gpu else "cpu",
            },
        )
        for row in embedded.iter_rows():
            yield pickle.loads(row["message"])


class FileReader:
    """An actor that reads and cuts files."""

    def __init__(self, config: ChunkingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self._config = config
        self._tokenizer = tokenizer

    def __call__(self, rows: Mapping[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        """Parcels without vectors of some lists of files."""
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
        self._config = config
        self._source = model
        self._fingerprint = fingerprint
        self._library = library
        self._device = device

    def __call__(self, rows: Mapping[str, Any]) -> Iterator[dict[str, list[bytes]]]:
        """The same messages with vectors."""
        for row in rows["message"]:
            message: BatchMessage = pickle.loads(row)
            embedded: list[int] = []
            try:
                if message.batch.rows:
                    embed_batch(message.batch, self._config, self._embedder, self._cached_vectors, embedded.append)
                    message.embedded = sum(embedded)
            except (LlamoryError, OSError) as error:
                message = BatchMessage(error=str(error))
            yield _pack(message)

    @cached_property
    def _embedder(self) -> SentenceTransformer:
        from llamory.embedding.library_encoder import fingerprint

        if isinstance(self._source, str):
            from llamory.embedding.pipeline import load_embedder

            embedder = load_embedder(self._source, device=self._device)
        else:
            import ray

            embedder = ray.get(self._source)
        if fingerprint(embedder) != self._fingerprint:
            raise LlamoryError(
                f"A worker finds another model at {self._source} than this process; give a path that is the same model "
                "on all machines."
            )
        return embedder

    @cached_property
    def _cached_vectors(self) -> Callable[[Collection[str]], Mapping[str, np.ndarray]]:
        """What the library held when this actor began; nothing where it can't be seen from here."""
        from llamory.library.store import PassageStore

        try:
            store = PassageStore.open(self._library)
        except LlamoryError:
            store = None
        if store is None or store.settings.fingerprint != self._fingerprint:
            return lambda _: {}
        return store.vectors


class _Deduplicator:
    """Takes messages in order and lets each document through once."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance
        self._seen_sources: set[str] = set()
        self._read_ids: dict[str, str] = {}

    def batches(self, messages: Iterator[BatchMessage]) -> Iterator[Batch]:
        for message in messages:
            if message.error:
                raise LlamoryError(message.error)
            self._advance(message.embedded)
            yield self._deduplicate(message)

    def _deduplicate(self, message: BatchMessage) -> Batch:
        batch = message.batch
        new_rows = [i for i, row in enumerate(batch.rows) if row["source"] not in self._seen_sources]
        unchanged = [source for source in batch.unchanged if source not in self._seen_sources]
        # Of a file that was read twice, some documents may be from before a change and some from after it: it isn't
        # noted as read, so that the next run reads it again.
        inconsistent = {
            f for f, read_id in message.read_ids.items() if self._read_ids.setdefault(f, read_id) != read_id
        }
        self._seen_sources.update(batch.unchanged, (row["source"] for row in batch.rows))
        return dataclasses.replace(
            batch,
            rows=[batch.rows[i] for i in new_rows],
            vectors=batch.vectors[new_rows] if batch.vectors is not None and new_rows else None,
            unchanged=unchanged,
            completed_files={
                file: "" if file in inconsistent else content for file, content in batch.completed_files.items()
            },
        )


def _absolute_uri(library: str) -> str:
    """A library's address, or its absolute path."""
    from llamory.library.store import local_folder

    folder = local_folder(library)
    return library if folder is None else os.path.abspath(folder)  # noqa: PTH100


def _pack(message: BatchMessage) -> dict[str, list[bytes]]:
    return {"message": [pickle.dumps(message)]}


def _actor_pool(max_actors: int, tasks: int) -> Any:
    """Between one actor and so many, as there is work."""
    from ray.data import ActorPoolStrategy

    return ActorPoolStrategy(min_size=1, max_size=max(1, min(max_actors, tasks)))


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """A connection to a Ray cluster: the one that this process has, the one at an address, or one of our own."""
    import ray

    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "include_dashboard": False}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # LanceDB warns of the forks with which Ray starts its programs; none of them uses a table.
            warnings.simplefilter("ignore", RuntimeWarning)
            if address is None:
                ray.init(address="local", object_store_memory=_STORE_BYTES, **quiet)
            else:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise _cluster_error(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()

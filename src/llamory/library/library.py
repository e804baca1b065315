"""`Library`: index files, search their passages, and answer questions from their memory."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from llamory import embedding
from llamory.common.io import PathLike, write_lock
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.library.indexer import AddReport, ChunkingConfig, FileTask, Update, index_files, is_under, remove_sources
from llamory.library.memory_cache import MemoryCache, memory_folder
from llamory.library.reader import ReaderConfig
from llamory.library.search import Hit, SearchMode, check_search, check_unicode
from llamory.library.store import PassageStore, PendingVectors, Settings
from llamory.models.base import canonical_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from llamory.documents import Chunk
    from llamory.library.prefill import MemoryReport
    from llamory.library.qa import LibrarySource
    from llamory.longllama import LongLlamaForCausalLM
    from llamory.qa.chat import QASession
    from llamory.qa.generation import Answer

# Reading a text file takes about twelve times its size in RAM.
MAX_FILE_MIB = 64

EngineName = Literal["local", "ray"]


class Library:
    """A folder (or object-store URI) of passages with their vectors.

    Args:
        path: the library's folder or URI; it is created when something is added.
        model: the embedding model: "default" (packaged), a LLARA checkpoint, a Sentence Transformers folder, a hub id
            or a loaded model. Default: the model that the library was made with.
        device: torch device. Default: the best one there is.
        bf16: compute in bfloat16.
        reader: the LongLLaMA that encodes documents and answers: a folder, a `.gguf` file, a hub id, "default" or a
            loaded model. Default: the one recorded in the library, else "default".
        reader_settings: the other fields of `llamory.library.reader.ReaderConfig`, such as `mem_layers`,
            `context_length`, `mem_dtype` ("int8", "bfloat16") and `memory_budget` ("10GB").

    Raises:
        LlamoryError: `path` is empty, or there is no library there and no model to make one with.
    """

    def __init__(
        self,
        path: PathLike,
        model: PathLike | SentenceTransformer | None = None,
        *,
        device: str | None = None,
        bf16: bool = False,
        reader: PathLike | LongLlamaForCausalLM | None = None,
        **reader_settings: Any,
    ) -> None:
        self.path = os.fspath(path)
        self._model = os.fspath(model) if isinstance(model, str | os.PathLike) else model
        self._device, self._bf16 = device, bf16
        self._loaded: SentenceTransformer | None = None
        self._merged = False  # whether the model has weights of its own instead of sharing the reader's base model
        self._checked = False  # whether the model's fingerprint is known to be the library's
        self._qa_source: LibrarySource | None = None
        self._new_chunk_size = 0  # of a library that is being created
        reader = os.fspath(reader) if isinstance(reader, os.PathLike) else reader
        self._reader_config = ReaderConfig(reader, **reader_settings)
        self._store = PassageStore.open(self.path)
        if self._store is None and model is None:
            raise LlamoryError(f"There is no library at {self.path}; name another, or give a model to make one with.")

    def __len__(self) -> int:
        """Number of passages."""
        return 0 if self._store is None else len(self._store)

    def sources(self) -> list[str]:
        """The documents' sources, sorted."""
        return [] if self._store is None else sorted(self._store.documents())

    def passages(self, source: str) -> list[Chunk]:
        """A document's passages, in order; empty for an unknown document."""
        return self.passages_of([source]).get(source, [])

    def passages_of(self, sources: Iterable[str]) -> dict[str, list[Chunk]]:
        """The passages of several documents, by source; unknown documents are left out."""
        return {} if self._store is None else self._store.passages(set(sources))

    def info(self) -> dict[str, Any]:
        """The library's settings, its numbers of documents and passages, and the size of its memories."""
        store, memory = self._require_store(), self.memory_info()
        numbers = {"path": self.path, "documents": store.num_documents(), "passages": len(store)}
        return numbers | asdict(store.settings) | ({"memory": memory} if memory else {})

    def add(
        self,
        paths: PathLike | Iterable[PathLike],
        *,
        chunk_size: int | None = None,
        text_field: str = "text",
        max_file_size: float = MAX_FILE_MIB,
        strict: bool = False,
        allow_empty: bool = False,
        wait: bool = True,
        engine: EngineName = "local",
        ray_address: str | None = None,
        progress: bool = True,
    ) -> AddReport:
        """Index files and folders: embed what is new or changed, remove what no longer exists in them.

        A run after a killed one goes on from there. What can't be read is listed in the report, and the library keeps
        what it holds of it. Links that lead out of the given paths are skipped.

        Args:
            paths: files and folders; their absolute paths become the sources.
            chunk_size: maximum tokens of a passage, for a new library. Default: 256, or what fits the model.
            text_field: entry of a JSON line that holds the text.
            max_file_size: MiB; larger files, and longer lines of JSON lines, are not read. `math.inf`: no limit.
            strict: raise an error at the first thing that can't be read.
            allow_empty: remove the documents of folders that are empty now. By default that is an error for a given
                folder, and one below it keeps them, as its disk may not be mounted.
            wait: wait while another process writes to the library.
            engine: `local` works in this process, `ray` on the workers of a Ray cluster.
            ray_address: address of a running Ray cluster. Default: start Ray on this machine for the run.
            progress: show a progress bar on standard error.

        Raises:
            LlamoryError: a path can't be read, there is nothing to index, a folder lost all of its documents, the model
                or chunk size isn't the library's, another process writes and `wait` is off, or Ray can't be used.
        """
        from llamory.documents import scan_files, supported_suffixes
        from llamory.documents.scan import real_roots

        if not max_file_size > 0:
            raise LlamoryError(f"The largest file size must be more than 0 MiB, not {max_file_size}.")
        check_unicode(text_field, "text field")
        _check_engine(engine, ray_address)
        roots = _absolute(paths)
        scan = scan_files(roots)
        failure = LlamoryError(f"{scan.failed[0].path}: {scan.failed[0].reason}.") if scan.failed else None
        if strict and failure:
            raise failure
        self._check_chunk_size(chunk_size)  # before a new library's folder is created, and before waiting
        with self._write_lock(wait=wait, progress=progress):
            update = Update(self._store, self._create, roots, allow_empty=allow_empty)
            update.check_roots(scan.files)
            if not scan.files and not any(is_under(file, roots) for file, _ in update.stored_documents.values()):
                where = f"There are no documents in {', '.join(map(str, roots))}"
                raise failure or LlamoryError(f"{where}; there should be files of {supported_suffixes()}.")
            config = ChunkingConfig(
                chunk_size=self._check_chunk_size(chunk_size),
                text_field=text_field,
                roots=real_roots(roots),
                max_bytes=None if max_file_size == math.inf else int(max_file_size * 2**20),
                strict=strict,
                bf16=self._bf16,
            )
            self._new_chunk_size = config.chunk_size
            if tasks := update.tasks(scan.files, config):
                self._index(update, tasks, config, engine, ray_address, progress)
            report = update.complete()
        if update.resumed or update.changed_sources:
            self._delete_stale_memories(None if update.resumed else update.changed_sources)
        report.failed = scan.failed + report.failed
        report.skipped = scan.skipped
        if self._store is None and not report.failed:
            where = ", ".join(map(str, roots))
            raise LlamoryError(f"None of the {len(scan.files)} files in {where} has any text.")
        return report

    def _index(
        self,
        update: Update,
        tasks: list[FileTask],
        config: ChunkingConfig,
        engine: str,
        address: str | None,
        progress: bool,
    ) -> None:
        """Read, embed and write the files of an update."""
        embedder = self._embedder(merged=True)
        update.pending = pending = PendingVectors(self.path, embedding.fingerprint(embedder))
        embedded = 0
        with ProgressBar("Indexing", len(tasks), unit="files", shown=progress) as bar:

            def advance(passages: int) -> None:
                nonlocal embedded
                embedded += passages
                bar.advance(0, detail=f"{embedded:,} passages embedded")

            if engine == "ray":
                from llamory.library.ray import RayIndexer

                model = self._require_store().settings.model if self._model is None else self._model
                name = canonical_name(model) if isinstance(model, str) else ""
                indexer = RayIndexer(config, embedder, name, self.path, address, pending.add, advance)
                batches = indexer.run(tasks)
            else:
                batches = index_files(tasks, config, embedder, update.find_vectors, pending.add, advance)
            for batch in batches:
                update.write_batch(batch)
                bar.advance(batch.files)

    def remove(self, paths: PathLike | Iterable[PathLike], *, wait: bool = True) -> AddReport:
        """Remove all documents of some files and folders, whether these still exist or not.

        Args:
            paths: files and folders as they were given to `add`; a source (`path:line`) removes one JSON line.
            wait: wait while another process writes to the library.

        Raises:
            LlamoryError: the library has nothing of one of the paths, or another process writes and `wait` is off.
        """
        roots = _absolute(paths)
        with self._write_lock(wait=wait):
            store = self._require_store()
            stored = store.documents()
            removed: set[str] = set()
            for root in roots:
                found = {each for each, (file, _) in stored.items() if each == str(root) or is_under(file, [root])}
                if not found:
                    raise LlamoryError(f"The library at {self.path} has nothing of {root}; check the path.")
                removed |= found
            store.file_index()
            store.start_write()
            remove_sources(store, removed, stored)
            store.finish_write()
        self._delete_stale_memories(removed)
        return AddReport(removed=len(removed))

    @contextmanager
    def _write_lock(self, *, wait: bool, progress: bool = True) -> Iterator[None]:
        """Hold the library's lock, and see what the process before has written."""

        def notify(sentence: str) -> None:
            if progress:
                sys.stderr.write(sentence + "\n")

        with write_lock(self.path, wait=wait, notify=notify):
            if self._store is None:
                self._store = PassageStore.open(self.path)
            else:
                self._store.refresh()
            yield

    def _create(self, dimension: int) -> PassageStore:
        model = canonical_name(self._model) if isinstance(self._model, str) else ""
        settings = Settings(model, embedding.fingerprint(self._embedder(merged=True)), dimension, self._new_chunk_size)
        self._store = PassageStore.create(self.path, settings)
        return self._store

    def search(
        self, query: str, top: int = 10, *, source: str | Iterable[str] | None = None, mode: SearchMode = "fused"
    ) -> list[Hit]:
        """Find the passages that match a query, best first.

        Args:
            query: a question or any text.
            top: maximum number of passages.
            source: only passages whose source starts with one of these texts, or matches it if it has a `*` or `?`
                (both match `/` too); a text that doesn't start with `/` may match after any folder.
            mode: `dense` (cosine of the vectors), `bm25` (words), or `fused` (the sum of both reciprocal ranks).

        Raises:
            LlamoryError: the library is empty, the model isn't the library's, or the query is blank or not Unicode.
        """
        check_search(query, top, mode)
        store = self._require_store(nonempty=True)
        vector = None
        if mode != "bm25":
            vector = embedding.embed_query(self._embedder(), query, dtype="bfloat16" if self._bf16 else None)
        return store.search(vector, top, source, text=query, mode=mode)

    def ask(self, question: str, *, progress: bool = False, **settings: Any) -> Answer:
        """Find documents for a question and answer it from their memories, which are encoded and stored if necessary.

            answer = Library("notes.lib").ask("Who built the bridge?")
            print(answer.text)
            for citation in answer.citations:
                print(citation.location, citation.share)

        Args:
            progress: show a progress bar on standard error when documents are encoded.
            settings: those of `chat`, and fields of `llamory.qa.generation.GenerationSettings`.

        Raises:
            LlamoryError: the library is empty, no document was found, the reader can't be loaded, the question is blank
                or too long, or there is too little RAM.
        """
        from llamory.library.qa import SESSION_SETTINGS

        session_settings = {name: settings.pop(name) for name in SESSION_SETTINGS & settings.keys()}
        return self.chat(progress=progress, **session_settings).ask(question, **settings)

    def chat(self, *, progress: bool = False, **settings: Any) -> QASession:
        """A conversation: each question finds documents, which stay attached.

        Args:
            progress: as for `ask`.
            settings: `documents` (names of the documents, instead of finding them), `top_documents` (documents to
                find per question, 5), `source` and `mode` (as for `search`), `citations` (passages to cite, 5).

        Raises:
            LlamoryError: the library is empty, or there is no document of such a name.
        """
        return self.qa_source(progress=progress).session(**settings)

    def precompute_memory(
        self, *, engine: EngineName = "local", ray_address: str | None = None, progress: bool = True
    ) -> MemoryReport:
        """Encode the documents that have no memory, as many as fit the budget; arguments as for `Library.add`."""
        from llamory.library.prefill import precompute_memory

        return precompute_memory(self.qa_source(), progress=progress, engine=engine, ray_address=ray_address)

    def qa_source(self, *, progress: bool = False) -> LibrarySource:
        """The library as a source of documents for questions, with its reader."""
        from llamory.library.qa import LibrarySource

        self._require_store()
        if self._merged:  # the embedder is loaded again so that it shares the base model with the reader
            self._loaded, self._merged = None, False
        if self._qa_source is None:
            self._qa_source = LibrarySource(self, self._reader_config, device=self._device, bf16=self._bf16)
        self._qa_source.progress = progress
        return self._qa_source

    def memory_info(self) -> dict[str, Any]:
        """What memories take: their number, `bytes` and `reader` (None for the default); empty if there are none."""
        cache = MemoryCache(memory_folder(self.path))
        keys, reader = cache.stored_keys(), (ReaderConfig.load(cache.folder) or ReaderConfig()).reader
        return {"memories": len(keys), "bytes": cache.nbytes, "reader": reader} if keys else {}

    def _delete_stale_memories(self, sources: Collection[str] | None) -> None:
        folder = memory_folder(self.path)
        if folder.is_dir():
            from llamory.library.prefill import delete_stale_memories

            delete_stale_memories(self, folder, sources)

    def _require_store(self, *, nonempty: bool = False) -> PassageStore:
        if self._store is None or (nonempty and not len(self._store)):
            raise LlamoryError(f"The library at {self.path} is empty; add documents to it first.")
        return self._store

    def _embedder(self, *, merged: bool = False) -> SentenceTransformer:
        """The model. With `merged` it is loaded as it embeds fastest, unless a reader shares its base model."""
        if self._loaded is None:
            from llamory.embedding.pipeline import load_embedder

            model = self._require_store().settings.model if self._model is None else self._model
            if model == "":
                raise LlamoryError(f"The library at {self.path} doesn't know where its model is; give the model too.")
            if isinstance(model, str):
                self._merged = merged and self._qa_source is None
                model = load_embedder(model, device=self._device, shared=not self._merged)
            self._loaded = model
        if self._store is not None and not self._checked:
            if embedding.fingerprint(self._loaded) != self._store.settings.fingerprint:
                self._loaded = None
                maker = self._store.settings.model or "a loaded model"
                found = f"The library at {self.path} was made by another model than the one given (by {maker}, whose"
                raise LlamoryError(f"{found} weights may have changed since); give that model, or make a new library.")
            self._checked = True
        return self._loaded

    def _check_chunk_size(self, chunk_size: int | None) -> int:
        """Check the model and the chunk size, and return the latter. Loads the model only if it must."""
        if chunk_size is not None and chunk_size < 1:
            raise LlamoryError(f"A passage must have at least 1 token, not {chunk_size}.")
        if self._store is None:
            return embedding.resolve_chunk_size(self._embedder(merged=True), chunk_size)
        settings = self._store.settings
        name = canonical_name(self._model) if isinstance(self._model, str) else None
        if self._model is not None and name != settings.model:
            self._embedder(merged=True)
        if chunk_size not in (None, settings.chunk_size):
            found = f"The library at {self.path} has passages of {settings.chunk_size} tokens, not {chunk_size}"
            raise LlamoryError(f"{found}; make a new library for another size.")
        return settings.chunk_size


def _check_engine(name: str, address: str | None) -> None:
    if name not in get_args(EngineName):
        raise LlamoryError(f"An engine is one of {', '.join(get_args(EngineName))}, not {name!r}.")
    if name == "ray":
        from llamory.library.ray import check_ray

        check_ray(address)
    elif address is not None:
        raise LlamoryError("A Ray address needs the engine `ray`; choose it, or leave the address out.")


def _absolute(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    return [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 -- resolve() would follow links

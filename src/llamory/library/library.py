"""The library: index files by the meaning of their passages, and search them."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from llamory.common.locks import write_lock
from llamory.embedding.library_encoder import embed_query, fingerprint, resolve_chunk_size
from llamory.errors import LlamoryError
from llamory.library.indexer import ChunkingConfig, Engine, LocalEngine
from llamory.library.paths import memory_folder
from llamory.library.reader import ReaderSettings
from llamory.library.search import Hit, SearchMode, check_mode
from llamory.library.store import PassageStore, Settings
from llamory.library.update import AddReport, Update, is_under, remove_sources

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

    from llamory.documents import Chunk, FileScan
    from llamory.library.prefill import MemoryReport
    from llamory.library.qa import CitedAnswer, LibraryChat, QASession
    from llamory.longllama import LongLlamaForCausalLM

# Reading a text file takes some twelve times its size in memory.
MAX_FILE_MIB = 64

PathLike = str | os.PathLike[str]
EngineName = Literal["local", "ray"]


class Library:
    """A folder (or object-store URI) of passages with their vectors.

    Args:
        path: where the library is, or will be once something is added.
        model: the embedding model: "default" for the packaged one, a LLARA checkpoint, a Sentence Transformers folder,
            a hub id, or a loaded model. An existing library knows its own.
        device: a torch device for the model; by default the best there is.
        bf16: compute in bfloat16, which is faster and a little less exact.
        reader: the LongLLaMA that reads documents and answers (`ask`, `chat`, `precompute_memory`): a folder, `.gguf` file,
            hub id, "default" or a loaded model. By default the one that was noted when the library was first asked,
            else "default".
        reader_settings: how it reads: `mem_layers`, `context_length`, `mem_dtype` ("int8", "bfloat16"), `memory_budget`
            ("10GB"), `mem_search`, `mem_top_k`, `last_context_length`, and a loaded reader's `tokenizer`; see
            `llamory.library.reader.ReaderSettings`.

    Raises:
        LlamoryError: there is no library at `path`, and no model to make one with.
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
        self._device = device
        self._bf16 = bf16
        self._loaded: SentenceTransformer | None = None
        self._merged = False  # whether its weights are its own, not the base model's that a reader has too
        self._checked = False  # whether the model was seen to be the library's
        self._qa_session: QASession | None = None
        self._new_chunk_size = 0  # passage length of a library that is being made
        self._reader_settings = ReaderSettings(
            os.fspath(reader) if isinstance(reader, os.PathLike) else reader, **reader_settings
        )
        self._store = PassageStore.open(self.path)
        if self._store is None and model is None:
            raise LlamoryError(
                f"There is no library at {self.path}; name an existing one, or give a model to make one with."
            )

    def __len__(self) -> int:
        """Number of passages."""
        return 0 if self._store is None else len(self._store)

    def sources(self) -> list[str]:
        """The documents' sources, sorted."""
        return [] if self._store is None else sorted(self._store.documents())

    def passages(self, source: str) -> list[Chunk]:
        """A document's passages, in order; none if there is no such document."""
        return self.passages_of([source]).get(source, [])

    def passages_of(self, sources: Iterable[str]) -> dict[str, list[Chunk]]:
        """The passages of several documents, by source; one that isn't there is left out."""
        return {} if self._store is None else self._store.passages(set(sources))

    def info(self) -> dict[str, Any]:
        """The library's settings and its numbers of documents and passages; with memories, what they take.

        Raises:
            LlamoryError: nothing was added yet.
        """
        store = self._require_store()
        return {
            "path": self.path,
            "documents": len(store.documents()),
            "passages": len(store),
            **asdict(store.settings),
            **({"memory": memory} if (memory := self.memory_info()) else {}),
        }

    # ---- adding and removing -----------------------------------------------------------------------------------------

    def add(
        self,
        paths: PathLike | Iterable[PathLike],
        *,
        chunk_size: int | None = None,
        text_field: str = "text",
        max_file_size: float = MAX_FILE_MIB,
        strict: bool = False,
        wait: bool = True,
        engine: EngineName = "local",
        ray_address: str | None = None,
        progress: bool = True,
    ) -> AddReport:
        """Index files and folders. Only what is new or changed is embedded; what is gone from them is removed.

        A document is written with all of its passages at once, so a run that is killed or fails leaves whole
        documents, and the next run goes on where it stopped. What can't be read is told in the report, and what the
        library has of it stays. Nothing outside the given paths is read: links that lead out are passed over.

        Args:
            paths: files and folders; their absolute paths become the sources.
            chunk_size: tokens that a passage may have, for a new library; by default 256, or what the model has
                room for. A library keeps the length it was made with.
            text_field: entry of a JSON line that holds the text.
            max_file_size: MiB; larger files aren't read. JSON lines are read one by one, so there it holds for a line.
            strict: stop at the first thing that can't be read.
            wait: wait while another process writes to the library.
            engine: `local` reads and embeds in this process, `ray` on the workers of a Ray cluster.
            ray_address: of a running Ray cluster; by default Ray is started on this machine for the run.
            progress: show a progress bar on standard error.

        Raises:
            LlamoryError: a path doesn't exist or is of an unknown kind, there is nothing to index, the model is not
                the library's, the passage length doesn't fit, or another process writes and `wait` is off; Ray is
                asked for and isn't there.
        """
        from llamory.documents import scan_files
        from llamory.documents.scan import real_roots

        if max_file_size <= 0:
            raise LlamoryError(f"The largest file size must be more than 0 MiB, not {max_file_size}.")
        _check_engine(engine, ray_address)
        roots = _absolute(paths)
        scan = scan_files(roots)
        if strict and scan.failed:
            raise LlamoryError(f"{scan.failed[0].path}: {scan.failed[0].reason}.")
        self._check_chunk_size(chunk_size)  # before the folder of a new library is made, and before waiting
        with self._writing(wait=wait, progress=progress):
            update = Update(self._store, self._create, roots)
            if not scan.files and not any(is_under(file, roots) for file, _ in update.stored_documents.values()):
                raise LlamoryError(_nothing_found_message(roots, scan))
            config = ChunkingConfig(
                chunk_size=self._check_chunk_size(chunk_size),
                text_field=text_field,
                roots=real_roots(roots),
                max_bytes=int(max_file_size * 2**20),
                strict=strict,
                bf16=self._bf16,
            )
            self._new_chunk_size = config.chunk_size
            tasks = update.tasks(scan.files, config)
            with _ProgressBar(len(tasks), shown=progress) as bar:
                if tasks:
                    indexer = self._engine(engine, config, self._embedder(merged=True), bar, ray_address)
                    for batch in indexer.run(tasks):
                        update.write_batch(batch)
                        bar.files_done(batch.files)
                report = update.complete()
        if report.updated or report.removed:
            self._delete_stale_memories()
        report.failed = scan.failed + report.failed
        report.skipped = scan.skipped
        if self._store is None and not report.failed:
            raise LlamoryError(f"None of the {len(scan.files)} files in {_join_paths(roots)} has any text.")
        return report

    def remove(self, paths: PathLike | Iterable[PathLike], *, wait: bool = True) -> AddReport:
        """Take out all documents of some files and folders, whether these still exist or not.

        Args:
            paths: files and folders as they were given to `add`; a source (`path:line`) takes out one JSON line.
            wait: wait while another process writes to the library.

        Raises:
            LlamoryError: there is nothing of one of the paths in the library, or another process writes and `wait` is
                off.
        """
        roots = _absolute(paths)
        with self._writing(wait=wait):
            store = self._require_store()
            stored_documents = store.documents()
            removed_sources: set[str] = set()
            for root in roots:
                matching = {
                    source
                    for source, (file, _) in stored_documents.items()
                    if source == str(root) or is_under(file, [root])
                }
                if not matching:
                    raise LlamoryError(f"The library at {self.path} has nothing of {root}; check the path.")
                removed_sources |= matching
            store.file_index()
            store.start_write()
            remove_sources(store, removed_sources, stored_documents)
            store.finish_write()
        self._delete_stale_memories()
        return AddReport(removed=len(removed_sources))

    @contextmanager
    def _writing(self, *, wait: bool, progress: bool = True) -> Iterator[None]:
        """Be the only writer, on the library as the one before left it."""

        def notify(sentence: str) -> None:
            if progress:
                sys.stderr.write(sentence + "\n")

        with write_lock(self.path, wait=wait, notify=notify):
            if self._store is None:
                self._store = PassageStore.open(self.path)
            else:
                self._store.refresh()
            yield

    def _engine(
        self,
        name: EngineName,
        config: ChunkingConfig,
        embedder: SentenceTransformer,
        bar: _ProgressBar,
        address: str | None,
    ) -> Engine:
        if name == "local":
            return LocalEngine(config, embedder, self._cached_vectors, bar.chunks_embedded)
        from llamory.library.ray import RayEngine

        model = self._require_store().settings.model if self._model is None else self._model
        model = _canonical_model_name(model) if isinstance(model, str) else ""
        return RayEngine(config, embedder, model, fingerprint(embedder), self.path, address, bar.chunks_embedded)

    def _cached_vectors(self, texts: Collection[str]) -> Mapping[str, np.ndarray]:
        return {} if self._store is None else self._store.vectors(texts)

    def _create(self, dimension: int) -> PassageStore:
        model = _canonical_model_name(self._model) if isinstance(self._model, str) else ""
        settings = Settings(model, fingerprint(self._embedder(merged=True)), dimension, self._new_chunk_size)
        self._store = PassageStore.create(self.path, settings)
        return self._store

    # ---- searching ---------------------------------------------------------------------------------------------------

    def search(
        self, query: str, top: int = 10, *, source: str | Iterable[str] | None = None, mode: SearchMode = "fused"
    ) -> list[Hit]:
        """Find the passages that answer a query.

        Args:
            query: a question or any text.
            top: how many passages to give at most.
            source: only passages whose source begins so, or matches if there is a `*` or `?` in it (both match `/`
                too); one that doesn't begin with `/` may begin after any folder of the source. Of several, any.
            mode: `dense` finds by meaning (the greatest cosine of the vectors), `bm25` by words, `fused` by both: the
                sum of reciprocal ranks.

        Returns:
            Hits, best first.

        Raises:
            LlamoryError: the library is empty, the model is not the library's, or the query is blank.
        """
        if not query.strip():
            raise LlamoryError("The query is blank; give at least one word to search for.")
        if top < 1:
            raise LlamoryError(f"A search must be for at least 1 passage, not {top}.")
        check_mode(mode)
        store = self._require_store()
        if not len(store):
            raise LlamoryError(f"The library at {self.path} is empty; add documents to it first.")
        vector = None if mode == "bm25" else embed_query(self._embedder(), query)
        return store.search(vector, top, source, text=query, mode=mode)

    # ---- answers -----------------------------------------------------------------------------------------------------

    def ask(self, question: str, *, progress: bool = False, **settings: Any) -> CitedAnswer:
        """Find documents, attach their memory, and answer from it.

        A document whose memory isn't there yet is read first; the next question has it. Nothing else of the documents
        is read.

            answer = Library("notes.lib").ask("Who built the bridge?")
            print(answer.text)
            for citation in answer.citations:
                print(citation.location, citation.share)

        Args:
            question: the question.
            progress: show on standard error how far reading documents has come.
            settings: `documents` (names, instead of finding them), `top_documents` (documents to find, 5), `source` and
                `mode` (as for `search`), `citations` (the most passages to cite, 5), `max_new_tokens`, `temperature`,
                `seed`, `max_question_tokens`, `on_text` (called with each piece of the answer as it comes) and `evidence_ratio`
                (what in memory is left out, as for `llamory.qa.open_memory.OpenMemory.ask`).

        Raises:
            LlamoryError: the library is empty, nothing was found, the reader can't be used, or the question is blank.
        """
        return self.qa_session(progress=progress).ask(question, **settings)

    def chat(self, *, progress: bool = False, **settings: Any) -> LibraryChat:
        """A conversation: each question's documents are mounted, and what was said stays in memory.

        Args:
            progress: as for `ask`.
            settings: `documents`, `top_documents`, `source`, `mode` and `citations`, as for `ask`.
        """
        from llamory.library.qa import LibraryChat

        return LibraryChat(self.qa_session(progress=progress), **settings)

    def precompute_memory(
        self, *, engine: str = "local", ray_address: str | None = None, progress: bool = True
    ) -> MemoryReport:
        """Read the documents that have no memory yet, as many as the budget has room for.

        Args:
            engine: `local` reads in this process, `ray` on the workers of a Ray cluster.
            ray_address: as for `Library.add`.
            progress: show a progress bar on standard error.

        Raises:
            LlamoryError: the library is empty, or the reader can't be used.
        """
        from llamory.library.prefill import precompute_memory

        return precompute_memory(self.qa_session(), progress=progress, engine=engine, ray_address=ray_address)

    def qa_session(self, *, progress: bool = False) -> QASession:
        """Where memories are mounted and questions answered.

        Args:
            progress: show on standard error how far reading has come.
        """
        from llamory.library.qa import QASession

        self._require_store()
        if self._merged:  # the embedder is loaded again so that it shares the base model with the reader
            self._loaded, self._merged = None, False
        if self._qa_session is None:
            self._qa_session = QASession(self, self._reader_settings, device=self._device, bf16=self._bf16)
        self._qa_session.progress = progress
        return self._qa_session

    def memory_info(self) -> dict[str, Any]:
        """What memories take: their number, `bytes` and `reader` (None for the default); empty if there are none."""
        from llamory.library.memory_cache import MemoryCache
        from llamory.library.reader import saved_reader_name

        memory_cache = MemoryCache(memory_folder(self.path))
        names = memory_cache.stored_keys()
        return (
            {"memories": len(names), "bytes": memory_cache.nbytes, "reader": saved_reader_name(memory_cache.folder)}
            if names
            else {}
        )

    def _delete_stale_memories(self) -> None:
        folder = memory_folder(self.path)
        if folder.is_dir():
            from llamory.library.prefill import delete_stale_memories

            delete_stale_memories(self, folder)

    # ---- the library's model -----------------------------------------------------------------------------------------

    def _require_store(self) -> PassageStore:
        if self._store is None:
            raise LlamoryError(f"The library at {self.path} is empty; add documents to it first.")
        return self._store

    def _embedder(self, *, merged: bool = False) -> SentenceTransformer:
        """The model; if it isn't loaded yet and nothing reads, `merged` loads it as it embeds fastest."""
        if self._loaded is None:
            from llamory.embedding.pipeline import load_embedder

            model = self._model
            if model is None:
                model = self._require_store().settings.model
            if model == "":
                raise LlamoryError(f"The library at {self.path} doesn't know where its model is; give the model too.")
            if isinstance(model, str):
                self._merged = merged and self._qa_session is None
                model = load_embedder(model, device=self._device, shared=not self._merged)
            self._loaded = model
        if self._store is not None and not self._checked:
            if fingerprint(self._loaded) != self._store.settings.fingerprint:
                made_by = self._store.settings.model or "another model"
                self._loaded = None
                raise LlamoryError(
                    f"The library at {self.path} was made by another model than the one given (it was {made_by} as it "
                    "was then); give that model, or make a new library."
                )
            self._checked = True
        return self._loaded

    def _check_chunk_size(self, chunk_size: int | None) -> int:
        """Check the model and the passage length for adding; gives the length. Loads the model only if it must."""
        if self._store is None:
            return resolve_chunk_size(self._embedder(merged=True), chunk_size)
        settings = self._store.settings
        if self._model is not None and (
            not isinstance(self._model, str) or _canonical_model_name(self._model) != settings.model
        ):
            self._embedder(merged=True)
        if chunk_size not in (None, settings.chunk_size):
            raise LlamoryError(
                f"The library at {self.path} has passages of {settings.chunk_size} tokens, not {chunk_size}; "
                "make a new library for another length."
            )
        return settings.chunk_size


class _ProgressBar:
    """A progress bar on standard error: files read, passages embedded."""

    def __init__(self, files: int, *, shown: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._progress = Progress(
            TextColumn("Indexing"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("files, {task.fields[passages]} passages embedded"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._passages = 0
        self._task = self._progress.add_task("", total=files, passages=0)

    def __enter__(self) -> _ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def files_done(self, files: int) -> None:
        self._progress.advance(self._task, files)

    def chunks_embedded(self, passages: int) -> None:
        self._passages += passages
        self._progress.update(self._task, passages=self._passages)


def _check_engine(name: str, address: str | None) -> None:
    if name not in get_args(EngineName):
        raise LlamoryError(f"An engine is one of {', '.join(get_args(EngineName))}, not {name!r}.")
    if name == "ray":
        from llamory.library.ray import check_ray

        check_ray(address)
    elif address is not None:
        raise LlamoryError("A Ray address is of use only with the engine `ray`; choose it, or leave the address out.")


def _absolute(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    paths = [paths] if isinstance(paths, str | os.PathLike) else paths
    return [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 -- resolve() would follow links


def _canonical_model_name(model: str) -> str:
    """A model as settings name it: a folder's absolute path, or a hub id."""
    return os.path.abspath(model) if Path(model).is_dir() else model  # noqa: PTH100


def _join_paths(paths: Iterable[Path]) -> str:
    return ", ".join(map(str, paths))


def _nothing_found_message(roots: Sequence[Path], scan: FileScan) -> str:
    from llamory.documents.readers import supported_suffixes

    if scan.failed:
        return f"{scan.failed[0].path}: {scan.failed[0].reason}."
    return f"There are no documents in {_join_paths(roots)}; there should be files of {supported_suffixes()}."

"""Index files into a library: chunk and embed what is new or changed, write it, delete what no longer exists.

A run may stop at any moment: nothing is lost or doubled.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.documents.formats import JSON_LINES
from llamory.errors import LlamoryError
from llamory.library.store import PassageStore, PendingVectors

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

    from llamory.documents import Document, SkippedFile

    FindVectors = Callable[[Collection[str]], Mapping[str, np.ndarray]]
    CreateStore = Callable[[int], PassageStore]
    SaveVectors = Callable[[Sequence[Mapping[str, Any]], np.ndarray], None]

CHUNKS_PER_BATCH = 64  # embedded before they are written: what a killed run computes again
_BATCHES_PER_INDEX_UPDATE = 64  # files of the last batches are parsed again after a kill
# Raise it when files are parsed in another way than before, so that unchanged files are parsed again.
READERS_VERSION = 1

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileTask:
    """A file to index, by absolute path."""

    file: str
    stored: Mapping[str, str] = field(default_factory=dict)  # hash of each of its documents in the library
    content: str = ""  # the file's content key, if known; valid while the file has this `state`
    state: tuple[int, ...] = ()  # as `llamory.documents.scan.file_state` gives it


@dataclass(frozen=True)
class ChunkingConfig:
    """How files become passages."""

    chunk_size: int  # maximum tokens of a passage
    text_field: str = "text"  # entry of a JSON line
    roots: tuple[str, ...] = ()  # real paths of the given files and folders: nothing outside is read; empty: no limit
    max_bytes: int | None = None  # larger files, and longer lines of JSON lines, are skipped
    strict: bool = False  # raise an error for what can't be read, instead of listing it
    bf16: bool = False


@dataclass
class Batch:
    """Some whole documents, and the outcome of the files that were read for them."""

    rows: list[dict[str, Any]] = field(default_factory=list)  # all columns but vector and key
    vectors: np.ndarray | None = None  # float32 (passages, dimension); None if there are no passages
    unchanged: list[str] = field(default_factory=list)  # sources of documents that the library holds as they are
    completed_files: dict[str, str] = field(default_factory=dict)  # content keys of files; empty: broken
    failed: list[SkippedFile] = field(default_factory=list)  # what couldn't be read
    files: int = 0  # that are done, read or not


@dataclass
class AddReport:
    """What `Library.add` or `Library.remove` did."""

    added: int = 0  # documents, as the next three
    unchanged: int = 0
    updated: int = 0
    removed: int = 0
    passages: int = 0  # that were written
    failed: list[SkippedFile] = field(default_factory=list)  # what is broken; the library keeps its passages
    skipped: list[SkippedFile] = field(default_factory=list)  # links out of the folders, other things

    @property
    def documents(self) -> int:
        """Documents of the given files that the library holds now."""
        return self.added + self.unchanged + self.updated


def index_files(
    tasks: Iterable[FileTask],
    config: ChunkingConfig,
    embedder: SentenceTransformer,
    find_vectors: FindVectors,
    save_vectors: SaveVectors = lambda *_: None,
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Batch]:
    """Read, chunk and embed files in this process, as batches of about `CHUNKS_PER_BATCH` passages of whole documents.

    Args:
        find_vectors: gives the vectors of those of some texts that need not be embedded again.
        save_vectors: called with rows and vectors while a document with many passages is embedded.
        advance: called with the number of passages that were embedded.

    Raises:
        LlamoryError: a file can't be read, and the config is strict.
    """
    from llamory.embedding.encoder import chunk_tokenizer

    for batch in chunk_files(tasks, config, chunk_tokenizer(embedder)):
        for rows, vectors in embed_batch(batch, config, embedder, find_vectors, advance):
            save_vectors(rows, vectors)
        yield batch


def chunk_files(
    tasks: Iterable[FileTask], config: ChunkingConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Batch]:
    """Read and chunk files, as batches without vectors."""
    chunker = _FileChunker(config, tokenizer)
    for task in tasks:
        for _ in chunker.chunk(task):
            if len(chunker.batch.rows) >= CHUNKS_PER_BATCH:
                yield chunker.batch
                chunker.batch = Batch()
        chunker.batch.files += 1
    yield chunker.batch


class _FileChunker:
    """Adds the passages of files to the current batch."""

    def __init__(self, config: ChunkingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer, self.batch = config, tokenizer, Batch()

    def chunk(self, task: FileTask) -> Iterator[None]:
        """Read and chunk one file, pausing after each document; an error in it must not stop the others."""
        from llamory.documents import SkippedFile

        try:
            yield from self._chunk(task)
        except Exception as error:
            if self.config.strict and isinstance(error, RecursionError):
                raise LlamoryError(f"{task.file} can't be read ({_name_error(error)}).") from error
            if self.config.strict:
                raise
            reason = _failure_reason(error, task.file)
            if not isinstance(error, LlamoryError | OSError | RecursionError):
                logger.warning("An error of llamory in reading %s", task.file, exc_info=True)
                reason = f"llamory failed unexpectedly on it ({_name_error(error)}); please report this"
            self.batch.failed.append(SkippedFile(task.file, reason))

    def _chunk(self, task: FileTask) -> Iterator[None]:
        from llamory.documents import SkippedFile, chunk_document, read_file
        from llamory.documents.scan import file_state

        path, config, broken_locations = Path(task.file), self.config, list[str]()
        _check_within(path, config)
        state = file_state(path)
        hasher = None if task.content and state == task.state else hashlib.sha256()

        def on_error(location: str, reason: str) -> None:
            broken_locations.append(location)
            self.batch.failed.append(SkippedFile(location, reason))

        broken = None if config.strict else on_error
        for document in read_file(
            path, text_field=config.text_field, broken=broken, max_bytes=config.max_bytes, hasher=hasher
        ):
            digest = document_hash(document, config.chunk_size)
            if task.stored.get(document.source) == digest:
                self.batch.unchanged.append(document.source)
            else:
                chunks = chunk_document(document, self.tokenizer, config.chunk_size)
                common = {"file": task.file, "hash": digest}
                self.batch.rows += [asdict(each) | common | {"position": i} for i, each in enumerate(chunks)]
            yield
        if file_state(path) != state:
            raise LlamoryError(f"{path} changed while it was read; index it again.")
        content = task.content if hasher is None else _content_key(path, hasher.hexdigest()[:32], config)
        # A file with broken parts is read again by the next run, which lists them again.
        self.batch.completed_files[task.file] = "" if broken_locations else content


def embed_batch(
    batch: Batch,
    config: ChunkingConfig,
    embedder: SentenceTransformer,
    find_vectors: FindVectors,
    advance: Callable[[int], None],
) -> Iterator[tuple[list[dict[str, Any]], np.ndarray]]:
    """Give a batch its vectors, and yield those of a batch with more than `CHUNKS_PER_BATCH` new texts at once."""
    import numpy as np

    from llamory.embedding.encoder import embed_passages

    if not batch.rows:
        return
    rows = {row["text"]: row for row in batch.rows}
    vectors = dict(find_vectors(list(rows)))
    new = [text for text in rows if text not in vectors]
    for start in range(0, len(new), CHUNKS_PER_BATCH):
        texts = new[start : start + CHUNKS_PER_BATCH]
        computed = embed_passages(embedder, texts, advance, dtype="bfloat16" if config.bf16 else None)
        vectors |= dict(zip(texts, computed, strict=True))
        if len(new) > CHUNKS_PER_BATCH:
            yield [rows[text] for text in texts], computed
    batch.vectors = np.stack([vectors[row["text"]] for row in batch.rows])


def document_hash(document: Document, chunk_size: int) -> str:
    """Hash of everything that a document's passages are made from."""
    return hashlib.sha256(f"{chunk_size}\0{document.title}\0{document.text}".encode()).hexdigest()[:32]


def _check_within(path: Path, config: ChunkingConfig) -> None:
    # Checked again just before reading: a folder may have become a link since the scan.
    from llamory.documents.scan import LINK_OUTSIDE, is_within

    if config.roots and not is_within(path, config.roots):
        raise LlamoryError(f"{path} is {LINK_OUTSIDE}.")


def _content_key(path: Path, digest: str, config: ChunkingConfig) -> str:
    """What the file index holds of a file: equal keys give equal documents."""
    return f"{READERS_VERSION}:{digest}:{config.text_field if path.suffix.lower() == JSON_LINES else ''}"


def _failure_reason(error: Exception, file: str) -> str:
    """What is wrong with a file, without its name and the final full stop."""
    if isinstance(error, FileNotFoundError):
        return "it vanished before it was read"
    if isinstance(error, OSError):
        return f"it can't be read ({error.strerror})"
    if not isinstance(error, LlamoryError):
        return f"it can't be read ({_name_error(error)})"
    text = str(error).removeprefix(file).strip().rstrip(".")
    return re.sub(r"^:(\d+): ", r"line \1: ", text).removeprefix(": ")


def _name_error(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


class Update:
    """One run over some files and folders: selects the files to read, writes batches, deletes what is gone.

    Args:
        store: the library's table; None if there is none yet.
        create: creates the table once the dimension of the vectors is known.
        roots: absolute paths of the given files and folders.
        allow_empty: delete the documents of folders that are empty now, instead of taking the disk for unmounted.
    """

    def __init__(
        self, store: PassageStore | None, create: CreateStore, roots: Sequence[Path], *, allow_empty: bool = False
    ) -> None:
        self.report = AddReport()
        self.stored_documents = {} if store is None else store.documents()
        self.pending: PendingVectors | None = None
        self.changed_sources: set[str] = set()  # documents that were replaced or removed
        self._store, self._create, self._roots, self._allow_empty = store, create, roots, allow_empty
        self._file_index = {} if store is None else store.file_index()
        self.resumed = store is not None and store.unfinished  # whether an earlier run was killed
        self._seen_sources: set[str] = set()  # that have passages now
        self._completed_files: dict[str, str] = {}
        self._is_deleted = cache(self._check_deleted)
        self._pending_index: dict[str, str] = {}  # content keys of completed files that aren't in the index yet
        self._batches, self._has_written = 0, False

    def check_roots(self, files: Collection[Path]) -> None:
        """Raise LlamoryError if a given folder held documents and holds none now, unless that is allowed."""
        if self._allow_empty:
            return
        missing = {file for file, _ in self.stored_documents.values()} - set(map(str, files))
        for root in self._roots:
            count = sum(is_under(file, [root]) and not _exists(file) for file in missing)
            if count and not any(file.is_relative_to(root) for file in files):
                advice = "check that its disk is mounted, or remove them with `--allow-empty` (allow_empty=True)"
                found = f"{root} holds no documents now, but the library has {count} of its files"
                raise LlamoryError(f"{found}; {advice}.")

    def tasks(self, files: Iterable[Path], config: ChunkingConfig) -> list[FileTask]:
        """The files that must be read: all but those whose content is as the file index has it."""
        documents_by_file: dict[str, dict[str, str]] = {}
        for source, (file, digest) in self.stored_documents.items():
            documents_by_file.setdefault(file, {})[source] = digest
        tasks = []
        for file in map(str, files):
            sources = documents_by_file.get(file, {})
            indexed = self._file_index.get(file)
            content, state = _read_content_key(file, config) if indexed else ("", ())
            if content and content == indexed:
                self._seen_sources.update(sources)
                self.report.unchanged += len(sources)
            else:
                tasks.append(FileTask(file, sources, content, state))
        return tasks

    def find_vectors(self, texts: Collection[str]) -> Mapping[str, np.ndarray]:
        """The vectors of those of some texts that the library holds or a killed run computed."""
        return find_vectors(self._store, self.pending, texts)

    def write_batch(self, batch: Batch) -> None:
        """Write the documents of one batch."""
        written = {row["source"] for row in batch.rows}
        replaced = written & self.stored_documents.keys()
        if batch.vectors is not None:
            if self._store is None:
                self._store = self._create(batch.vectors.shape[1])
            self._start_write()
            self._store.clear_indexed({row["file"] for row in batch.rows} & self._file_index.keys())
            self._store.write(batch.rows, batch.vectors, replaced)
            if self.pending is not None:
                self.pending.clear(written)
        self._seen_sources |= written
        self._seen_sources.update(batch.unchanged)
        self.changed_sources |= replaced
        self._completed_files |= batch.completed_files
        contents = batch.completed_files.items()
        self._pending_index |= {file: key for file, key in contents if key and self._file_index.get(file) != key}
        self.report.unchanged += len(batch.unchanged)
        self.report.passages += len(batch.rows)
        self.report.updated += len(replaced)
        self.report.added += len(written) - len(replaced)
        self.report.failed += batch.failed
        self._batches += 1
        if self._batches % _BATCHES_PER_INDEX_UPDATE == 0:
            self._update_index()

    def complete(self) -> AddReport:
        """Delete documents that no longer exist, and compact the table."""
        if self._store is not None:
            removed = [source for source, (file, _) in self.stored_documents.items() if self._is_gone(source, file)]
            if removed:
                self._start_write()
                remove_sources(self._store, removed, self.stored_documents)
            self._update_index()
            if self._has_written or self._store.unfinished:
                self._store.finish_write()
            self.report.removed = len(removed)
            self.changed_sources.update(removed)
        if self.pending is not None:  # of documents that changed or vanished before they were written
            files = self.pending.files
            self.pending.clear([source for source, file in files.items() if is_under(file, self._roots)])
        return self.report

    def _is_gone(self, source: str, file: str) -> bool:
        """Whether a stored source is no longer in its file, which was read, or its file no longer exists."""
        return source not in self._seen_sources and (file in self._completed_files or self._is_deleted(file))

    def _check_deleted(self, file: str) -> bool:
        """Whether a file of the roots was deleted. The files of a folder that is empty count as kept; it is listed."""
        from llamory.documents import SkippedFile

        if not is_under(file, self._roots) or _exists(file):
            return False
        folder = next(folder for folder in Path(file).parents if _exists(folder))
        if self._allow_empty or (is_under(str(folder), self._roots) and not _is_empty(folder)):
            return True
        if str(folder) not in {failure.path for failure in self.report.failed}:
            reason = "the folder is empty: check that its disk is mounted, or remove its documents with `--allow-empty`"
            self.report.failed.append(SkippedFile(str(folder), reason))
        return False

    def _start_write(self) -> None:
        if self._store is not None and not self._has_written:
            self._store.start_write()
            self._has_written = True

    def _update_index(self) -> None:
        # A file that lost documents may enter the index before these are deleted: deleting them takes it out again.
        if self._store is not None:
            self._store.mark_indexed(self._pending_index)
            self._file_index |= self._pending_index
            self._pending_index = {}


def find_vectors(
    store: PassageStore | None, pending: PendingVectors | None, texts: Collection[str]
) -> Mapping[str, np.ndarray]:
    """The vectors of those of some texts that a library has, or that a killed run computed for it."""
    return ({} if pending is None else pending.get(texts)) | ({} if store is None else store.vectors(texts))


def remove_sources(store: PassageStore, sources: Collection[str], stored: Mapping[str, tuple[str, str]]) -> None:
    """Delete sources from the table, given the stored documents."""
    store.clear_indexed({stored[source][0] for source in sources})
    store.remove(sources)


def is_under(file: str, roots: Iterable[Path]) -> bool:
    """Whether a file is one of some paths, or in one of them."""
    return any(Path(file).is_relative_to(root) for root in roots)


def _read_content_key(file: str, config: ChunkingConfig) -> tuple[str, tuple[int, ...]]:
    """The content key and the state of a file; empty if it can't be read."""
    from llamory.documents.scan import content_hash

    path = Path(file)
    try:
        _check_within(path, config)
        digest, state = content_hash(path, None if path.suffix.lower() == JSON_LINES else config.max_bytes)
    except (LlamoryError, OSError):
        return "", ()
    return _content_key(path, digest, config), state


def _exists(file: str | Path) -> bool:
    try:
        os.lstat(file)
    except OSError as error:  # a file out of reach isn't gone
        return not isinstance(error, FileNotFoundError | NotADirectoryError)
    return True


def _is_empty(folder: Path) -> bool:
    try:
        return not any(folder.iterdir())
    except OSError:
        return False

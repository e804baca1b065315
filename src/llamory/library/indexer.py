"""The work of indexing: files that may have changed become batches of whole documents, ready to be written.

An engine runs `process_files` over the files, here or on other machines; the library alone decides which files those are, and
alone writes what comes back. So an engine can run a file twice, or stop at any moment, and nothing is lost or doubled.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llamory.errors import LlamoryError

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

    from llamory.documents import Document, SkippedFile

# Passages that are embedded before they are written: what is lost when a run is killed.
CHUNKS_PER_BATCH = 64
# To be raised when files are read in another way than before, so that files that didn't change are read again.
READERS_VERSION = 1

logger = logging.getLogger(__name__)

Vectors = Mapping[str, "np.ndarray"]


@dataclass(frozen=True)
class FileTask:
    """A unit of work: one file. It can be pickled.

    Attributes:
        file: absolute path.
        document_hashes: the hash of each document (by source) that the library holds of it.
    """

    file: str
    document_hashes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ChunkingConfig:
    """How files become passages. It can be pickled.

    Attributes:
        chunk_size: tokens that a passage has at most.
        text_field: entry of a JSON line that holds the text.
        roots: the real paths of what was given: nothing outside is read. Empty: anything is.
        max_bytes: larger files, and longer lines of JSON lines, are passed over.
        strict: stop at what can't be read, instead of telling in the end.
        bf16: embed in bfloat16.
    """

    chunk_size: int
    text_field: str = "text"
    roots: tuple[str, ...] = ()
    max_bytes: int | None = None
    strict: bool = False
    bf16: bool = False


@dataclass
class Batch:
    """Some whole documents, and what became of the files that were read meanwhile.

    Attributes:
        rows: the passages of the documents: all columns of the library's table but the vector.
        vectors: float32 (passages, dimension); None if there are no passages.
        unchanged: sources of documents that the library has as they are.
        completed_files: files that were read to their end, each with its content (empty if some of it was broken).
        failed: what couldn't be read; the library keeps what it has of it.
        files: files that are done with, read or not.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    vectors: np.ndarray | None = None
    unchanged: list[str] = field(default_factory=list)
    completed_files: dict[str, str] = field(default_factory=dict)
    failed: list[SkippedFile] = field(default_factory=list)
    files: int = 0


class Engine(Protocol):
    """Runs `process_files` over the files."""

    def run(self, tasks: Collection[FileTask]) -> Iterator[Batch]:
        """Batches of all files; each batch is written before the next is asked for."""
        ...


@dataclass
class LocalEngine:
    """Runs the files one after the other in this process.

    Attributes:
        config: how files become passages.
        embedder: the library's model.
        cached_vectors: gives the vectors of those of some texts that the library holds already.
        advance: is told how many passages were embedded.
    """

    config: ChunkingConfig
    embedder: SentenceTransformer
    cached_vectors: Callable[[Collection[str]], Vectors]
    advance: Callable[[int], None] = lambda _: None

    def run(self, tasks: Collection[FileTask]) -> Iterator[Batch]:
        """Batches of all files, in order."""
        return process_files(tasks, self.config, self.embedder, self.cached_vectors, self.advance)


def process_files(
    tasks: Iterable[FileTask],
    config: ChunkingConfig,
    embedder: SentenceTransformer,
    cached_vectors: Callable[[Collection[str]], Vectors],
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Batch]:
    """Read, cut and embed files, as batches of about `CHUNKS_PER_BATCH` passages of whole documents.

    Args:
        tasks: the files.
        config: how files become passages.
        embedder: the library's model.
        cached_vectors: gives the vectors of those of some texts that need not be embedded again.
        advance: is told how many passages were embedded.

    Raises:
        LlamoryError: a file can't be read, if the recipe is strict.
    """
    from llamory.embedding.library_encoder import chunk_tokenizer

    for batch in chunk_files(tasks, config, chunk_tokenizer(embedder)):
        yield embed_batch(batch, config, embedder, cached_vectors, advance)


def chunk_files(
    tasks: Iterable[FileTask], config: ChunkingConfig, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Batch]:
    """The first half of `process_files`: read and cut files, as batches without vectors."""
    chunker = _FileChunker(config, tokenizer)
    for task in tasks:
        for _ in chunker.chunk(task):
            if len(chunker.batch.rows) >= CHUNKS_PER_BATCH:
                yield chunker.batch
                chunker.batch = Batch()
        chunker.batch.files += 1
    yield chunker.batch


class _FileChunker:
    """Puts the passages of files into the batch at hand."""

    def __init__(self, config: ChunkingConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.batch = Batch()

    def chunk(self, task: FileTask) -> Iterator[None]:
        """Read and cut one file, pausing after each document; what is wrong with it must not stop the others."""
        from llamory.documents import SkippedFile

        try:
            yield from self._chunk_file(task)
        except Exception as error:
            if self.config.strict:
                if isinstance(error, LlamoryError | OSError):
                    raise
                raise LlamoryError(f"{task.file} can't be read ({type(error).__name__}: {error}).") from error
            logger.debug("%s can't be read", task.file, exc_info=True)
            self.batch.failed.append(SkippedFile(task.file, _reason(error, task.file)))

    def _chunk_file(self, task: FileTask) -> Iterator[None]:
        from llamory.documents import SkippedFile, read_file
        from llamory.documents.storage import unchanged_since

        path, config, broken = Path(task.file), self.config, list[str]()
        content, state = _content_key(path, config)

        def record_error(location: str, reason: str) -> None:
            broken.append(location)
            self.batch.failed.append(SkippedFile(location, reason))

        on_error = None if config.strict else record_error
        for document in read_file(path, text_field=config.text_field, broken=on_error, max_bytes=config.max_bytes):
            digest = document_hash(document, config.chunk_size)
            if task.document_hashes.get(document.source) == digest:
                self.batch.unchanged.append(document.source)
            else:
                self.batch.rows += _rows(document, self.tokenizer, config.chunk_size, task.file, digest)
            yield
        if not unchanged_since(path, state):
            raise LlamoryError(f"{path} changed while it was read; index it again.")
        self.batch.completed_files[task.file] = "" if broken else content  # what is broken is told again next time


def is_unchanged(file: str, content: str, config: ChunkingConfig) -> bool:
    """Whether a file has the content that `Batch.finished` told of it; a file that can't be read has not."""
    try:
        return bool(content) and _content_key(Path(file), config)[0] == content
    except (LlamoryError, OSError):
        return False


def _content_key(path: Path, config: ChunkingConfig) -> tuple[str, tuple[int, ...]]:
    """A short name for what would be read of a file, and its state as `unchanged_since` takes it."""
    from llamory.documents.scan import LINK_OUTSIDE, is_within
    from llamory.documents.storage import content_hash

    # Asked again just before reading: the folders may have changed since they were looked through.
    if config.roots and not is_within(path, config.roots):
        raise LlamoryError(f"{path} is {LINK_OUTSIDE}.")
    is_json_lines = path.suffix.lower() == ".jsonl"
    digest, state = content_hash(path, None if is_json_lines else config.max_bytes)
    return f"{READERS_VERSION}:{digest}:{config.text_field if is_json_lines else ''}", state


def _reason(error: Exception, file: str) -> str:
    """What is wrong with a file, without its name and without the end of the sentence."""
    if isinstance(error, FileNotFoundError):
        return "it vanished before it was read"
    if isinstance(error, OSError):
        return f"it can't be read ({error.strerror})"
    text = str(error).removeprefix(file).strip().rstrip(".")
    text = re.sub(r"^:(\d+): ", r"line \1: ", text).removeprefix(": ")
    return text if isinstance(error, LlamoryError) else f"it can't be read ({type(error).__name__}: {text})"


def document_hash(document: Document, chunk_size: int) -> str:
    """Hash of all that a document's passages are made from."""
    hashed_text = "\0".join([str(chunk_size), document.title, document.text])
    return hashlib.sha256(hashed_text.encode()).hexdigest()[:32]


def _rows(
    document: Document, tokenizer: PreTrainedTokenizerBase, length: int, file: str, digest: str
) -> list[dict[str, Any]]:
    from llamory.documents import chunk_document

    return [
        {
            "text": chunk.text,
            "source": chunk.source,
            "title": chunk.title,
            "line": chunk.line,
            "page": chunk.page,
            "position": position,
            "file": file,
            "hash": digest,
        }
        for position, chunk in enumerate(chunk_document(document, tokenizer, length))
    ]


def embed_batch(
    batch: Batch,
    config: ChunkingConfig,
    embedder: SentenceTransformer,
    cached_vectors: Callable[[Collection[str]], Vectors],
    advance: Callable[[int], None],
) -> Batch:
    """The second half of `process_files`: give a batch its vectors; those of texts that are held are used again."""
    import numpy as np

    from llamory.embedding.library_encoder import embed_passages

    if batch.rows:
        texts = list(dict.fromkeys(row["text"] for row in batch.rows))
        vectors = dict(cached_vectors(texts))
        if new := [text for text in texts if text not in vectors]:
            vectors |= dict(zip(new, embed_passages(embedder, new, advance, bf16=config.bf16), strict=True))
        batch.vectors = np.stack([vectors[row["text"]] for row in batch.rows])
    return batch

"""The work of indexing: files that may have changed become batches of whole documents, ready to be written.

An engine runs `prepare` over the files, here or on other machines; the library alone decides which files those are, and
alone writes what comes back. So an engine can run a file twice, or stop at any moment, and nothing is lost or doubled.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

    from llamory.documents import Document

# Passages that are embedded before they are written: what is lost when a run is killed.
PASSAGES_PER_BATCH = 64

Vectors = Mapping[str, "np.ndarray"]


@dataclass(frozen=True)
class FileTask:
    """A unit of work: one file. It can be pickled.

    Attributes:
        file: absolute path.
        known: the hash of each document (by source) that the library holds of it.
    """

    file: str
    known: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """How files become passages. It can be pickled.

    Attributes:
        passage_length: tokens that a passage has at most.
        text_field: entry of a JSON line that holds the text.
        skip_broken: pass over what can't be parsed.
        bf16: embed in bfloat16.
    """

    passage_length: int
    text_field: str = "text"
    skip_broken: bool = False
    bf16: bool = False


@dataclass
class Batch:
    """Some whole documents, and what became of the files that were read meanwhile.

    Attributes:
        rows: the passages of the documents: all columns of the library's table but the vector.
        vectors: float32 (passages, dimension); None if there are no passages.
        unchanged: sources of documents that the library has as they are.
        finished: files that were read to their end.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    vectors: np.ndarray | None = None
    unchanged: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)


class Engine(Protocol):
    """Runs `prepare` over the files."""

    def run(self, tasks: Collection[FileTask]) -> Iterator[Batch]:
        """Batches of all files; each batch is written before the next is asked for."""
        ...


@dataclass
class LocalEngine:
    """Runs the files one after the other in this process.

    Attributes:
        recipe: how files become passages.
        embedder: the library's model.
        held: gives the vectors of those of some texts that the library holds already.
        advance: is told how many passages were embedded.
    """

    recipe: Recipe
    embedder: SentenceTransformer
    held: Callable[[Collection[str]], Vectors]
    advance: Callable[[int], None] = lambda _: None

    def run(self, tasks: Collection[FileTask]) -> Iterator[Batch]:
        """Batches of all files, in order."""
        return prepare(tasks, self.recipe, self.embedder, self.held, self.advance)


def prepare(
    tasks: Iterable[FileTask],
    recipe: Recipe,
    embedder: SentenceTransformer,
    held: Callable[[Collection[str]], Vectors],
    advance: Callable[[int], None] = lambda _: None,
) -> Iterator[Batch]:
    """Read, cut and embed files, as batches of about `PASSAGES_PER_BATCH` passages of whole documents.

    Args:
        tasks: the files.
        recipe: how files become passages.
        embedder: the library's model.
        held: gives the vectors of those of some texts that need not be embedded again.
        advance: is told how many passages were embedded.

    Raises:
        LlamoryError: a file can't be parsed, unless the recipe says to pass over such.
    """
    from llamory.documents import read_file
    from llamory.library.embedding import passage_tokenizer

    tokenizer = passage_tokenizer(embedder)
    batch = Batch()
    for task in tasks:
        for document in read_file(Path(task.file), text_field=recipe.text_field, skip_broken=recipe.skip_broken):
            digest = document_hash(document, recipe.passage_length)
            if task.known.get(document.source) == digest:
                batch.unchanged.append(document.source)
                continue
            batch.rows += _rows(document, tokenizer, recipe.passage_length, task.file, digest)
            if len(batch.rows) >= PASSAGES_PER_BATCH:
                yield _embedded(batch, recipe, embedder, held, advance)
                batch = Batch()
        batch.finished.append(task.file)
    yield _embedded(batch, recipe, embedder, held, advance)


def document_hash(document: Document, passage_length: int) -> str:
    """Hash of all that a document's passages are made from."""
    whole = "\0".join([str(passage_length), document.title, document.text])
    return hashlib.sha256(whole.encode()).hexdigest()[:32]


def _rows(
    document: Document, tokenizer: PreTrainedTokenizerBase, length: int, file: str, digest: str
) -> list[dict[str, Any]]:
    from llamory.documents import split_passages

    return [
        {
            "text": passage.text,
            "source": passage.source,
            "title": passage.title,
            "line": passage.line,
            "position": position,
            "file": file,
            "hash": digest,
        }
        for position, passage in enumerate(split_passages(document, tokenizer, length))
    ]


def _embedded(
    batch: Batch,
    recipe: Recipe,
    embedder: SentenceTransformer,
    held: Callable[[Collection[str]], Vectors],
    advance: Callable[[int], None],
) -> Batch:
    """Give a batch its vectors; those of texts that are held are used again."""
    import numpy as np

    from llamory.library.embedding import embed_passages

    if batch.rows:
        texts = list(dict.fromkeys(row["text"] for row in batch.rows))
        vectors = dict(held(texts))
        if new := [text for text in texts if text not in vectors]:
            vectors |= dict(zip(new, embed_passages(embedder, new, advance, bf16=recipe.bf16), strict=True))
        batch.vectors = np.stack([vectors[row["text"]] for row in batch.rows])
    return batch

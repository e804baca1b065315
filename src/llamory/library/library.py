"""The library: index files by the meaning of their passages, and search them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError
from llamory.library.embedding import (
    embed_passages,
    embed_query,
    fingerprint,
    passage_length_for,
    passage_tokenizer,
)
from llamory.library.readable import Readable
from llamory.library.reader import ReaderSettings
from llamory.library.store import Hit, PassageStore, Settings

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

    from llamory.documents import Document
    from llamory.longllama import LongLlamaForCausalLM

# Passages that are embedded before they are written: what is lost when a run is killed.
PASSAGES_PER_COMMIT = 64

PathLike = str | os.PathLike[str]


@dataclass
class AddReport:
    """What `Library.add` did.

    Attributes:
        added: documents that were new.
        unchanged: documents that were there already.
        updated: documents whose old passages were replaced.
        removed: documents that are no longer in their file, or whose file is gone.
        passages: passages that were written.
    """

    added: int = 0
    unchanged: int = 0
    updated: int = 0
    removed: int = 0
    passages: int = 0


class Library(Readable):
    """A folder (or object-store URI) of passages with their vectors.

    Args:
        path: where the library is, or will be once something is added.
        model: the embedding model: a LLARA checkpoint, a Sentence Transformers folder, a hub id, or a loaded model.
            An existing library knows its own.
        device: a torch device for the model; by default the best there is.
        bf16: compute in bfloat16, which is faster and a little less exact.
        reader: the LongLLaMA that reads documents and answers (`ask`, `chat`, `read_ahead`): a folder, `.gguf` file,
            hub id, "default" or a loaded model. By default the one that was noted when the library was first asked,
            else "default".
        reading: how it reads: `mem_layers`, `context_length`, `mem_dtype` ("int8", "bfloat16"), `memory_budget`
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
        **reading: Any,
    ) -> None:
        self.path = os.fspath(path)
        self._model = os.fspath(model) if isinstance(model, str | os.PathLike) else model
        self._device = device
        self._bf16 = bf16
        self._loaded: SentenceTransformer | None = None
        self._reading = ReaderSettings(os.fspath(reader) if isinstance(reader, os.PathLike) else reader, **reading)
        self._store = PassageStore.open(self.path)
        if self._store is None and model is None:
            raise LlamoryError(
                f"There is no library at {self.path}; name an existing one, or give a model to make one with."
            )

    def __len__(self) -> int:
        """Number of passages."""
        return 0 if self._store is None else len(self._store)

    def info(self) -> dict[str, Any]:
        """The library's settings and its numbers of documents and passages.

        Raises:
            LlamoryError: nothing was added yet.
        """
        store = self._require_store()
        return {
            "path": self.path,
            "documents": len(store.documents()),
            "passages": len(store),
            **asdict(store.settings),
        }

    # ---- adding ------------------------------------------------------------------------------------------------------

    def add(
        self,
        paths: PathLike | Iterable[PathLike],
        *,
        passage_length: int | None = None,
        text_field: str = "text",
        skip_broken: bool = False,
        progress: bool = True,
    ) -> AddReport:
        """Index files and folders. Only what is new or changed is embedded; what is gone from them is removed.

        A document is written with all of its passages at once, so a run that is killed or fails leaves whole
        documents, and the next run goes on where it stopped.

        Args:
            paths: files and folders; their absolute paths become the sources.
            passage_length: tokens that a passage may have, for a new library; by default 256, or what the model has
                room for. A library keeps the length it was made with.
            text_field: entry of a JSON line that holds the text.
            skip_broken: pass over broken JSON lines and files.
            progress: show a progress bar on standard error.

        Raises:
            LlamoryError: a path can't be read, the model is not the library's, or the passage length doesn't fit.
        """
        from llamory.documents import find_files, read_file

        if isinstance(paths, str | os.PathLike):
            paths = [paths]
        roots = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 -- resolve() would follow links
        files = find_files(roots)
        embedder = self._embedder()
        length = self._passage_length(embedder, passage_length)
        tokenizer = passage_tokenizer(embedder)
        known = {} if self._store is None else self._store.documents()
        report = AddReport()
        seen: set[str] = set()  # sources that have passages now
        waiting: list[dict[str, Any]] = []  # rows of documents that aren't written yet
        with _Bar(len(files), shown=progress) as bar:
            for file in files:
                for document in read_file(file, text_field=text_field, skip_broken=skip_broken):
                    digest = _digest(document, length)
                    if known.get(document.source, ("", ""))[1] == digest:
                        seen.add(document.source)
                        report.unchanged += 1
                        continue
                    rows = _rows(document, tokenizer, length, str(file), digest)
                    if not rows:
                        continue
                    seen.add(document.source)
                    waiting += rows
                    report.passages += len(rows)
                    report.updated += document.source in known
                    report.added += document.source not in known
                    if len(waiting) >= PASSAGES_PER_COMMIT:
                        self._write(waiting, known, embedder, length, bar)
                        waiting = []
                bar.file_done()
            if waiting:
                self._write(waiting, known, embedder, length, bar)
        gone = _gone(known, seen, files, roots)
        report.removed = len(gone)
        if self._store is not None:
            self._store.remove(gone)
            if report.passages or gone:
                self._store.tidy()
        if report.updated or report.removed:
            self._drop_stale_memories()
        return report

    def _write(
        self,
        rows: list[dict[str, Any]],
        known: Collection[str],
        embedder: SentenceTransformer,
        length: int,
        bar: _Bar,
    ) -> None:
        """Embed and write whole documents; passages of theirs that didn't change keep their vectors."""
        import numpy as np

        replaced = {row["source"] for row in rows if row["source"] in known}
        vectors = self._store.vectors(replaced) if self._store is not None else {}
        new = [text for text in dict.fromkeys(row["text"] for row in rows) if text not in vectors]
        if new:
            vectors |= dict(zip(new, embed_passages(embedder, new, bar.embedded, bf16=self._bf16), strict=True))
        matrix = np.stack([vectors[row["text"]] for row in rows])
        if self._store is None:
            model = self._model if isinstance(self._model, str) else ""
            if model and Path(model).is_dir():
                model = os.path.abspath(model)  # noqa: PTH100
            settings = Settings(model, fingerprint(embedder), matrix.shape[1], length)
            self._store = PassageStore.create(self.path, settings)
        self._store.write(rows, matrix, replaced)

    # ---- searching ---------------------------------------------------------------------------------------------------

    def search(self, query: str, top: int = 10, *, source: str | None = None) -> list[Hit]:
        """Find the passages whose vectors have the greatest cosine with the query's.

        Args:
            query: a question or any text.
            top: how many passages to give at most.
            source: only passages whose source begins so, or matches if there is a `*` or `?` in it (both match `/`
                too); one that doesn't begin with `/` may begin after any folder of the source.

        Returns:
            Hits, best first.

        Raises:
            LlamoryError: the library is empty, the model is not the library's, or the query is blank.
        """
        if not query.strip():
            raise LlamoryError("The query is blank; give at least one word to search for.")
        if top < 1:
            raise LlamoryError(f"A search must be for at least 1 passage, not {top}.")
        store = self._require_store()
        if not len(store):
            raise LlamoryError(f"The library at {self.path} is empty; add documents to it first.")
        return store.search(embed_query(self._embedder(), query), top, source)

    # ---- the library's model -----------------------------------------------------------------------------------------

    def _require_store(self) -> PassageStore:
        if self._store is None:
            raise LlamoryError(f"The library at {self.path} is empty; add documents to it first.")
        return self._store

    def _embedder(self) -> SentenceTransformer:
        if self._loaded is None:
            from llamory.llara.retriever import load_embedder

            model = self._model
            if model is None:
                model = self._require_store().settings.model
            if model == "":
                raise LlamoryError(f"The library at {self.path} doesn't know where its model is; give the model too.")
            self._loaded = load_embedder(model, device=self._device) if isinstance(model, str) else model
            if self._store is not None and fingerprint(self._loaded) != self._store.settings.fingerprint:
                made_by = self._store.settings.model or "another model"
                self._loaded = None
                raise LlamoryError(
                    f"The library at {self.path} was made by another model than the one given (it was {made_by} as it "
                    "was then); give that model, or make a new library."
                )
        return self._loaded

    def _passage_length(self, embedder: SentenceTransformer, wanted: int | None) -> int:
        if self._store is None:
            return passage_length_for(embedder, wanted)
        length = self._store.settings.passage_length
        if wanted not in (None, length):
            raise LlamoryError(
                f"The library at {self.path} has passages of {length} tokens, not {wanted}; make a new library for "
                "another length."
            )
        return length


class _Bar:
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

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def file_done(self) -> None:
        self._progress.advance(self._task)

    def embedded(self, passages: int) -> None:
        self._passages += passages
        self._progress.update(self._task, passages=self._passages)


def _digest(document: Document, length: int) -> str:
    """Hash of all that a document's passages are made from."""
    whole = "\0".join([str(length), document.title, document.text])
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


def _gone(
    known: Mapping[str, tuple[str, str]], seen: Collection[str], files: Iterable[Path], roots: Sequence[Path]
) -> list[str]:
    """Sources that are no longer in a file that was read, or whose file under one of the roots doesn't exist."""
    read = set(map(str, files))

    @cache
    def file_gone(file: str) -> bool:
        return any(Path(file).is_relative_to(root) for root in roots) and not Path(file).exists()

    return [source for source, (file, _) in known.items() if source not in seen and (file in read or file_gone(file))]

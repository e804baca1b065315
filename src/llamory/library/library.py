"""The library: index files by the meaning of their passages, and search them."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError
from llamory.library.embedding import embed_query, fingerprint, passage_length_for
from llamory.library.engine import Engine, FileTask, LocalEngine, Recipe
from llamory.library.store import Hit, PassageStore, Settings

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

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


class Library:
    """A folder (or object-store URI) of passages with their vectors.

    Args:
        path: where the library is, or will be once something is added.
        model: the embedding model: a LLARA checkpoint, a Sentence Transformers folder, a hub id, or a loaded model.
            An existing library knows its own.
        device: a torch device for the model; by default the best there is.
        bf16: embed passages in bfloat16, which is faster and a little less exact.

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
    ) -> None:
        self.path = os.fspath(path)
        self._model = os.fspath(model) if isinstance(model, str | os.PathLike) else model
        self._device = device
        self._bf16 = bf16
        self._loaded: SentenceTransformer | None = None
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
        from llamory.documents import find_files

        if isinstance(paths, str | os.PathLike):
            paths = [paths]
        roots = [Path(os.path.abspath(path)) for path in paths]  # noqa: PTH100 -- resolve() would follow links
        files = [str(file) for file in find_files(roots)]
        embedder = self._embedder()
        recipe = Recipe(self._passage_length(embedder, passage_length), text_field, skip_broken, self._bf16)
        known = {} if self._store is None else self._store.documents()
        with _Bar(len(files), shown=progress) as bar:
            engine = LocalEngine(recipe, embedder, self._held, bar.embedded)
            report, seen, finished = self._take(engine, _tasks(files, known), known, recipe, bar)
        gone = _gone(known, seen, finished, roots)
        report.removed = len(gone)
        if self._store is not None:
            self._store.remove(gone)
            if report.passages or gone:
                self._store.tidy()
        return report

    def _take(
        self, engine: Engine, tasks: list[FileTask], known: Mapping[str, tuple[str, str]], recipe: Recipe, bar: _Bar
    ) -> tuple[AddReport, set[str], set[str]]:
        """Write what an engine gives; also the sources that have passages now, and the files that were read."""
        report, seen, finished = AddReport(), set[str](), set[str]()
        for batch in engine.run(tasks):
            written = {row["source"] for row in batch.rows}
            replaced = {source for source in written if source in known}
            if batch.vectors is not None:
                store = self._store or self._create(batch.vectors.shape[1], recipe.passage_length)
                store.write(batch.rows, batch.vectors, replaced)
            seen |= written | set(batch.unchanged)
            finished |= set(batch.finished)
            report.unchanged += len(batch.unchanged)
            report.passages += len(batch.rows)
            report.updated += len(replaced)
            report.added += len(written) - len(replaced)
            bar.files_done(len(batch.finished))
        return report, seen, finished

    def _held(self, texts: Collection[str]) -> Mapping[str, np.ndarray]:
        return {} if self._store is None else self._store.vectors(texts)

    def _create(self, dimension: int, passage_length: int) -> PassageStore:
        model = self._model if isinstance(self._model, str) else ""
        if model and Path(model).is_dir():
            model = os.path.abspath(model)  # noqa: PTH100
        settings = Settings(model, fingerprint(self._embedder()), dimension, passage_length)
        self._store = PassageStore.create(self.path, settings)
        return self._store

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

    def files_done(self, files: int) -> None:
        self._progress.advance(self._task, files)

    def embedded(self, passages: int) -> None:
        self._passages += passages
        self._progress.update(self._task, passages=self._passages)


def _tasks(files: Iterable[str], known: Mapping[str, tuple[str, str]]) -> list[FileTask]:
    held: dict[str, dict[str, str]] = {}
    for source, (file, digest) in known.items():
        held.setdefault(file, {})[source] = digest
    return [FileTask(file, held.get(file, {})) for file in files]


def _gone(
    known: Mapping[str, tuple[str, str]], seen: Collection[str], finished: Collection[str], roots: Sequence[Path]
) -> list[str]:
    """Sources that are no longer in a file that was read, or whose file under one of the roots doesn't exist."""

    @cache
    def file_gone(file: str) -> bool:
        return any(Path(file).is_relative_to(root) for root in roots) and not Path(file).exists()

    return [
        source for source, (file, _) in known.items() if source not in seen and (file in finished or file_gone(file))
    ]

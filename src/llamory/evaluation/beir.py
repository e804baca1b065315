"""BEIR folders (Thakur et al. 2021, arXiv:2104.08663) as retrieval sets; the corpus is streamed, never held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from llamory.documents.beir import (
    CORPUS,
    JUDGEMENTS,
    QUERIES,
    document_entry,
    judgement_rows,
    query_entry,
    title_and_text,
)
from llamory.documents.readers import read_json_lines
from llamory.errors import LlamoryError
from llamory.evaluation.qrels import RetrievalSet, judged_queries

T = TypeVar("T", bound=tuple[str, ...])


def read_beir(folder: Path, split: str | None = None, *, ignore_identical_ids: bool = False) -> RetrievalSet:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`.

    A title stands before its text, with a space between, as in BEIR's own code. A document that has the id and the
    text of a query is the query itself, and isn't counted as found, unless it is judged relevant.

    Args:
        folder: the folder; if it holds one such folder per part, as `llamory dataset` writes them, its part SPLIT.
        split: name of the judgements; "test" if there are any of that name, else the only ones.
        ignore_identical_ids: leave a document with a query's id out for that query, whatever its text, as BEIR does.

    Raises:
        LlamoryError: a file is missing, a line is broken, an id stands twice, or there is nothing to judge.
    """
    folder = _of_parts(folder, split)
    for name in (CORPUS, QUERIES):
        if not (folder / name).is_file():
            raise LlamoryError(
                f"{folder} is no BEIR folder: there is no {name} (it should hold {CORPUS}, {QUERIES} and "
                f"{JUDGEMENTS}/*.tsv)."
            )
    judged_file = _judgements_file(folder, split)
    queries = dict(_unique(folder / QUERIES, query_entry))
    judgements = _read_judgements(judged_file)
    wanted = judged_queries(str(judged_file), queries, judgements)
    corpus = folder / CORPUS
    ids, own = [], set()
    for key, title, text in _unique(corpus, document_entry):
        ids.append(key)
        same = key in wanted and (
            ignore_identical_ids or _plain(wanted[key]) in (_plain(text), _plain(f"{title} {text}"))
        )
        if same and judgements[key].get(key, 0) < 1:
            own.add(key)
    if not ids:
        raise LlamoryError(f"{corpus} has no documents.")

    def read() -> Iterator[tuple[str, str]]:
        return (found for _, found in read_json_lines(corpus, title_and_text))

    return RetrievalSet(
        name=_name(folder.resolve(), judged_file.stem),
        split=judged_file.stem,
        queries=wanted,
        judgements={query: judgements[query] for query in wanted},
        ids=ids,
        read=read,
        own=frozenset(own),
        fingerprint=_digest([corpus, folder / QUERIES, judged_file]),
    )


def _of_parts(folder: Path, split: str | None) -> Path:
    part = folder / (split or "test")
    return part if not (folder / CORPUS).exists() and (part / CORPUS).is_file() else folder


def _name(folder: Path, split: str) -> str:
    return f"{folder.parent.name}/{folder.name}" if folder.name == split else folder.name


def _judgements_file(folder: Path, split: str | None) -> Path:
    there = sorted(path.stem for path in (folder / JUDGEMENTS).glob("*.tsv"))
    if not there:
        raise LlamoryError(f"{folder} is no BEIR folder: there are no judgements in {folder / JUDGEMENTS}/*.tsv.")
    if split is None:
        split = "test" if "test" in there else there[0] if len(there) == 1 else None
    if split not in there:
        asked = "name a split" if split is None else f"there is no split {split!r}"
        raise LlamoryError(f"{folder}: {asked}; there {'are' if len(there) > 1 else 'is'} {', '.join(there)}.")
    return folder / JUDGEMENTS / f"{split}.tsv"


def _read_judgements(file: Path) -> dict[str, dict[str, int]]:
    judgements: dict[str, dict[str, int]] = {}
    for line, query, document, score in judgement_rows(file):
        if not score.is_integer():
            raise LlamoryError(f"{file}:{line}: the score should be a whole number, not {score}.")
        judgements.setdefault(query, {})[document] = int(score)
    return judgements


def _unique(file: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    seen = set()
    for line, found in read_json_lines(file, parse):
        if found[0] in seen:
            raise LlamoryError(
                f"{file}:{line}: the id {found[0]!r} stands here for the second time; ids must be unique."
            )
        seen.add(found[0])
        yield found


def _plain(text: str) -> str:
    return " ".join(text.split())


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

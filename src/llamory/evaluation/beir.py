"""BEIR folders (Thakur et al. 2021, arXiv:2104.08663) as retrieval sets; the corpus is streamed, never held."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from llamory.documents.beir import (
    CORPUS,
    QRELS,
    QUERIES,
    document_entry,
    qrels_rows,
    query_entry,
    title_and_text,
)
from llamory.documents.readers import read_json_lines
from llamory.errors import LlamoryError
from llamory.evaluation.qrels import RetrievalDataset, queries_with_qrels

T = TypeVar("T", bound=tuple[str, ...])


def read_beir(folder: Path, split: str | None = None, *, ignore_identical_ids: bool = False) -> RetrievalDataset:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`.

    A title stands before its text, with a space between, as in BEIR's self_documents code. A document that has the id and the
    text of a query is the query itself, and isn't counted as found, unless it is judged relevant.

    Args:
        folder: the folder; if it holds one such folder per part, as `llamory dataset` writes them, its part SPLIT.
        split: name of the qrels; "test" if there are any of that name, else the only ones.
        ignore_identical_ids: leave a document with a query's id out for that query, whatever its text, as BEIR does.

    Raises:
        LlamoryError: a file is missing, a line is broken, an id stands twice, or there is nothing to judge.
    """
    folder = _split_folder(folder, split)
    for name in (CORPUS, QUERIES):
        if not (folder / name).is_file():
            raise LlamoryError(
                f"{folder} is no BEIR folder: there is no {name} (it should hold {CORPUS}, {QUERIES} and "
                f"{QRELS}/*.tsv)."
            )
    qrels_file = _qrels_file(folder, split)
    queries = dict(_read_unique(folder / QUERIES, query_entry))
    qrels = _load_qrels(qrels_file)
    query_texts = queries_with_qrels(str(qrels_file), queries, qrels)
    corpus = folder / CORPUS
    ids, self_documents = [], set()
    for key, title, text in _read_unique(corpus, document_entry):
        ids.append(key)
        is_query = key in query_texts and (
            ignore_identical_ids
            or _normalize_whitespace(query_texts[key])
            in (_normalize_whitespace(text), _normalize_whitespace(f"{title} {text}"))
        )
        if is_query and qrels[key].get(key, 0) < 1:
            self_documents.add(key)
    if not ids:
        raise LlamoryError(f"{corpus} has no documents.")

    def read() -> Iterator[tuple[str, str]]:
        return (found for _, found in read_json_lines(corpus, title_and_text))

    return RetrievalDataset(
        name=_name(folder.resolve(), qrels_file.stem),
        split=qrels_file.stem,
        queries=query_texts,
        qrels={query: qrels[query] for query in query_texts},
        ids=ids,
        read=read,
        self_documents=frozenset(self_documents),
        fingerprint=_digest([corpus, folder / QUERIES, qrels_file]),
    )


def _split_folder(folder: Path, split: str | None) -> Path:
    part = folder / (split or "test")
    return part if not (folder / CORPUS).exists() and (part / CORPUS).is_file() else folder


def _name(folder: Path, split: str) -> str:
    return f"{folder.parent.name}/{folder.name}" if folder.name == split else folder.name


def _qrels_file(folder: Path, split: str | None) -> Path:
    there = sorted(path.stem for path in (folder / QRELS).glob("*.tsv"))
    if not there:
        raise LlamoryError(f"{folder} is no BEIR folder: there are no qrels in {folder / QRELS}/*.tsv.")
    if split is None:
        split = "test" if "test" in there else there[0] if len(there) == 1 else None
    if split not in there:
        asked = "name a split" if split is None else f"there is no split {split!r}"
        raise LlamoryError(f"{folder}: {asked}; there {'are' if len(there) > 1 else 'is'} {', '.join(there)}.")
    return folder / QRELS / f"{split}.tsv"


def _load_qrels(file: Path) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    for line, query, document, score in qrels_rows(file):
        if not score.is_integer():
            raise LlamoryError(f"{file}:{line}: the score should be a whole number, not {score}.")
        qrels.setdefault(query, {})[document] = int(score)
    return qrels


def _read_unique(file: Path, parse: Callable[[dict[str, Any]], T]) -> Iterator[T]:
    seen = set()
    for line, found in read_json_lines(file, parse):
        if found[0] in seen:
            raise LlamoryError(
                f"{file}:{line}: the id {found[0]!r} stands here for the second time; ids must be unique."
            )
        seen.add(found[0])
        yield found


def _normalize_whitespace(text: str) -> str:
    return " ".join(text.split())


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

"""BEIR folders (Thakur et al. 2021, arXiv:2104.08663) as retrieval sets; the corpus is streamed, never held."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llamory.documents.files import read_json_lines, string_entry
from llamory.errors import LlamoryError
from llamory.evaluation.judged import RetrievalSet, judged_queries

CORPUS, QUERIES, JUDGEMENTS = "corpus.jsonl", "queries.jsonl", "qrels"
_HEADER = ("query-id", "corpus-id", "score")


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
    queries = dict(_unique(folder / QUERIES, _query))
    judgements = _read_judgements(judged_file)
    wanted = judged_queries(str(judged_file), queries, judgements)
    corpus = folder / CORPUS
    ids, own = [], set()
    for key, (text, whole) in _unique(corpus, _document):
        ids.append(key)
        same = key in wanted and (ignore_identical_ids or _plain(wanted[key]) in (_plain(text), _plain(whole)))
        if same and judgements[key].get(key, 0) < 1:
            own.add(key)
    if not ids:
        raise LlamoryError(f"{corpus} has no documents.")

    def read() -> Iterator[tuple[str, str]]:
        return ((key, whole) for key, (_, whole) in (found for _, found in read_json_lines(corpus, _document)))

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
    for query, document, score in _rows(file):
        judgements.setdefault(query, {})[document] = score
    return judgements


def _rows(file: Path) -> Iterator[tuple[str, str, int]]:
    """Query id, document id and score of each line; a header, where there is one, is no line."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for row in reader:
                if not row or (reader.line_num == 1 and tuple(map(str.strip, row)) == _HEADER):
                    continue
                if len(row) == 4:  # TREC's form has a column that no one uses
                    del row[1]
                try:
                    query, document, score = row
                    yield query, document, _score(score)
                except ValueError as error:
                    if reader.line_num == 1:
                        continue  # a header in other words
                    raise LlamoryError(
                        f"{file}:{reader.line_num}: a line should be a query's id, a document's id and a score that "
                        "is a whole number, with tabs between them; mend or remove the line."
                    ) from error
        except UnicodeDecodeError as error:
            raise LlamoryError(f"{file} is not UTF-8 text ({error}).") from error


def _score(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError(text)
    return int(number)


def _unique(file: Path, parse: Any) -> Iterator[tuple[str, Any]]:
    seen = set()
    for line, (key, found) in read_json_lines(file, parse):
        if key in seen:
            raise LlamoryError(f"{file}:{line}: the id {key!r} stands here for the second time; ids must be unique.")
        seen.add(key)
        yield key, found


def _document(entry: dict[str, Any]) -> tuple[str, tuple[str, str]]:
    title = string_entry({"title": entry.get("title") or ""}, "title")
    text = string_entry(entry, "text")
    return _id(entry), (text, f"{title} {text}".strip())


def _query(entry: dict[str, Any]) -> tuple[str, str]:
    return _id(entry), string_entry(entry, "text")


def _id(entry: dict[str, Any]) -> str:
    key = entry.get("_id", entry.get("id"))
    return str(key) if isinstance(key, int) else string_entry({"_id": key} if key is not None else {}, "_id")


def _plain(text: str) -> str:
    return " ".join(text.split())


def _digest(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()

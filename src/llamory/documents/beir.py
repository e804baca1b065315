"""BEIR folders: a corpus, queries, and qrels of which document answers which query (Thakur et al. 2021)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamory.documents.readers import read_json_lines, string_entry
from llamory.errors import LlamoryError

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"


@dataclass(frozen=True)
class BeirDocument:
    """A document of a corpus: its id, title, text, and the file and line it stands in."""

    id: str
    title: str
    text: str
    location: str

    @property
    def full_text(self) -> str:
        """The text after the title, as in BEIR's own code."""
        return f"{self.title} {self.text}".strip()


@dataclass(frozen=True)
class BeirDataset:
    """One split of a BEIR folder; the corpus is streamed."""

    folder: Path
    split: str
    queries: dict[str, str]  # text of each query of the folder, by id
    qrels: dict[str, dict[str, float]]  # by query id, the score of each document id; 0 is not relevant
    locations: dict[tuple[str, str], str]  # file and line of each (query id, document id) of the qrels
    skip_broken: bool = False

    @property
    def files(self) -> list[Path]:
        """Corpus, queries and qrels."""
        return [self.folder / CORPUS, self.folder / QUERIES, self.folder / QRELS / f"{self.split}.tsv"]

    @property
    def name(self) -> str:
        """The folder's name; for a folder per split, with its parent's."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}/{folder.name}" if folder.name == self.split else folder.name

    def documents(self) -> Iterator[BeirDocument]:
        """The corpus, read again with each call."""
        corpus = self.folder / CORPUS
        for line, (name, title, text) in read_json_lines(corpus, _document_entry, skip_broken=self.skip_broken):
            yield BeirDocument(name, title, text, f"{corpus}:{line}")


def is_beir(folder: Path) -> bool:
    """Whether a path is a BEIR folder."""
    return (folder / CORPUS).is_file()


def read_beir(folder: Path, split: str | None = None, *, skip_broken: bool = False) -> BeirDataset:
    """Read the queries and qrels of a folder with `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`.

    Args:
        folder: the folder; if it holds a folder per split, as `llamory dataset` writes them, the folder SPLIT of it.
        split: name of the qrels; None for "test" if it exists, else the only one.
        skip_broken: skip broken JSON lines, with a warning in the log.

    Raises LlamoryError if a file is missing, or a line is broken or of an unknown query; the message has file and line.
    """
    split_folder = folder / (split or "test")
    if not (folder / CORPUS).exists() and (split_folder / CORPUS).is_file():
        folder = split_folder
    for name in (CORPUS, QUERIES):
        if not (folder / name).is_file():
            required = f"{CORPUS}, {QUERIES}, {QRELS}/*.tsv"
            raise LlamoryError(f"{folder} is no BEIR folder: there is no {name} (it should have {required}).")
    split = _resolve_split(folder, split)
    queries = dict(entry for _, entry in read_json_lines(folder / QUERIES, _query_entry, skip_broken=skip_broken))
    qrels: dict[str, dict[str, float]] = {}
    locations: dict[tuple[str, str], str] = {}
    file = folder / QRELS / f"{split}.tsv"
    for line, query, document, score in _qrels_rows(file):
        if query not in queries:
            raise LlamoryError(f"{file}:{line}: there is no {query!r} in {QUERIES}; mend or remove the line.")
        qrels.setdefault(query, {})[document] = score
        locations.setdefault((query, document), f"{file}:{line}")
    return BeirDataset(folder, split, queries, qrels, locations, skip_broken)


def _resolve_split(folder: Path, split: str | None) -> str:
    existing = sorted(path.stem for path in (folder / QRELS).glob("*.tsv"))
    if not existing:
        raise LlamoryError(f"{folder} is no BEIR folder: there are no qrels in {folder / QRELS}/*.tsv.")
    if split is None:
        split = "test" if "test" in existing else existing[0] if len(existing) == 1 else None
    if split is None or split not in existing:
        problem = "name a split" if split is None else f"there is no split {split!r}"
        raise LlamoryError(f"{folder}: {problem}; there {'are' if len(existing) > 1 else 'is'} {', '.join(existing)}.")
    return split


def _qrels_rows(file: Path) -> Iterator[tuple[int, str, str, float]]:
    """Line, query id, document id and score of each row, without a header and TREC's second column."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for row in reader:
                if not row or (reader.line_num == 1 and not _is_number(row[-1])):
                    continue
                if len(row) == 4:
                    del row[1]
                if len(row) != 3 or not _is_number(row[2]):
                    fields = "a query's id, a document's id and a score, with tabs between them"
                    raise LlamoryError(f"{file}:{reader.line_num}: a line should be {fields}; mend or remove the line.")
                yield reader.line_num, row[0], row[1], float(row[2])
        except UnicodeDecodeError as error:
            raise LlamoryError(f"{file} is not UTF-8 text ({error}).") from error


def _is_number(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return False


def _document_entry(entry: dict[str, Any]) -> tuple[str, str, str]:
    return _id(entry), string_entry({"title": entry.get("title") or ""}, "title"), string_entry(entry, "text")


def _query_entry(entry: dict[str, Any]) -> tuple[str, str]:
    return _id(entry), string_entry(entry, "text")


def _id(entry: dict[str, Any]) -> str:
    return str(entry["_id"]) if "_id" in entry else string_entry(entry, "_id")

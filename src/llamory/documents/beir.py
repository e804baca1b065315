"""BEIR folders: a corpus, queries, and qrels of which document answers which query (Thakur et al. 2021)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamory.documents.readers import read_json_lines, string_entry
from llamory.errors import LlamoryError

CORPUS, QUERIES, QRELS = "corpus.jsonl", "queries.jsonl", "qrels"


@dataclass(frozen=True)
class BeirDataset:
    """One split of a BEIR folder.

    Attributes:
        corpus: text of each document, under its id; a title stands before the text, as in BEIR's own code.
        queries: text of each query of the folder, under its id.
        qrels: for each qrels_file query's id, the score of each qrels_file document's id; 0 is not relevant.
        locations: for each qrels_file query's id, the file and line that name it first.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    qrels: dict[str, dict[str, float]]
    locations: dict[str, str]


def is_beir(folder: Path) -> bool:
    """Whether a path is a folder in BEIR's form."""
    return (folder / CORPUS).is_file()


def read_beir(folder: Path, split: str = "train", *, skip_broken: bool = False) -> BeirDataset:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv` of a folder.

    Args:
        folder: the folder.
        split: name of the qrels' file.
        skip_broken: pass over broken JSON lines, with a warning in the log.

    Raises:
        LlamoryError: a file is missing, or a line broken or of an unknown id; file and line are told.
    """
    qrels_file = folder / QRELS / f"{split}.tsv"
    for file in (folder / CORPUS, folder / QUERIES, qrels_file):
        if not file.is_file():
            raise LlamoryError(f"{folder} is no BEIR folder with a split {split!r}: there is no {file}.")
    corpus = dict(text for _, text in read_json_lines(folder / CORPUS, title_and_text, skip_broken=skip_broken))
    queries = dict(text for _, text in read_json_lines(folder / QUERIES, query_entry, skip_broken=skip_broken))
    qrels: dict[str, dict[str, float]] = {}
    locations: dict[str, str] = {}
    for number, query, document, score in qrels_rows(qrels_file):
        for name, known, texts in ((query, queries, QUERIES), (document, corpus, CORPUS)):
            if name not in known:
                raise LlamoryError(f"{qrels_file}:{number}: there is no {name!r} in {texts}; mend or remove the line.")
        qrels.setdefault(query, {})[document] = score
        locations.setdefault(query, f"{qrels_file}:{number}")
    return BeirDataset(corpus, queries, qrels, locations)


def qrels_rows(file: Path) -> Iterator[tuple[int, str, str, float]]:
    """Line number, query id, document id and score of each line of `qrels/SPLIT.tsv`.

    The header, where there is one, isn't a row; a fourth column, which TREC's files have second, is passed over.

    Raises:
        LlamoryError: a line is broken; file and line are told.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for row in reader:
                if not row or (reader.line_num == 1 and not _is_number(row[-1])):
                    continue
                if len(row) == 4:
                    del row[1]
                if len(row) != 3 or not _is_number(row[2]):
                    raise LlamoryError(
                        f"{file}:{reader.line_num}: a line should be a query's id, a document's id and a score, with "
                        "tabs between them; mend or remove the line."
                    )
                yield reader.line_num, row[0], row[1], float(row[2])
        except UnicodeDecodeError as error:
            raise LlamoryError(f"{file} is not UTF-8 text ({error}).") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def title_and_text(entry: dict[str, Any]) -> tuple[str, str]:
    """Id and text of a line of the corpus; a title stands before its text, as in BEIR's own code."""
    key, title, text = document_entry(entry)
    return key, f"{title} {text}".strip()


def document_entry(entry: dict[str, Any]) -> tuple[str, str, str]:
    """Id, title and text of a line of the corpus."""
    return _id(entry), string_entry({"title": entry.get("title") or ""}, "title"), string_entry(entry, "text")


def query_entry(entry: dict[str, Any]) -> tuple[str, str]:
    """Id and text of a line of the queries."""
    return _id(entry), string_entry(entry, "text")


def _id(entry: dict[str, Any]) -> str:
    return str(entry["_id"]) if "_id" in entry else string_entry(entry, "_id")

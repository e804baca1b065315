"""BEIR folders: a corpus, queries, and judgements of which document answers which query (Thakur et al. 2021)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamory.documents.files import read_json_lines, string_entry
from llamory.errors import LlamoryError

CORPUS, QUERIES, JUDGEMENTS = "corpus.jsonl", "queries.jsonl", "qrels"


@dataclass(frozen=True)
class Beir:
    """One split of a BEIR folder.

    Attributes:
        corpus: text of each document, under its id; a title stands before the text, as in BEIR's own code.
        queries: text of each query of the folder, under its id.
        judgements: for each judged query's id, the score of each judged document's id; 0 is not relevant.
        places: for each judged query's id, the file and line that name it first.
    """

    corpus: dict[str, str]
    queries: dict[str, str]
    judgements: dict[str, dict[str, float]]
    places: dict[str, str]


def is_beir(folder: Path) -> bool:
    """Whether a path is a folder in BEIR's form."""
    return (folder / CORPUS).is_file()


def read_beir(folder: Path, split: str = "train", *, skip_broken: bool = False) -> Beir:
    """Read `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv` of a folder.

    Args:
        folder: the folder.
        split: name of the judgements' file.
        skip_broken: pass over broken JSON lines, with a warning in the log.

    Raises:
        LlamoryError: a file is missing, or a line broken or of an unknown id; file and line are told.
    """
    judged = folder / JUDGEMENTS / f"{split}.tsv"
    for file in (folder / CORPUS, folder / QUERIES, judged):
        if not file.is_file():
            raise LlamoryError(f"{folder} is no BEIR folder with a split {split!r}: there is no {file}.")
    corpus = dict(text for _, text in read_json_lines(folder / CORPUS, _document, skip_broken=skip_broken))
    queries = dict(text for _, text in read_json_lines(folder / QUERIES, _query, skip_broken=skip_broken))
    judgements: dict[str, dict[str, float]] = {}
    places: dict[str, str] = {}
    for number, query, document, score in _rows(judged):
        for name, known, texts in ((query, queries, QUERIES), (document, corpus, CORPUS)):
            if name not in known:
                raise LlamoryError(f"{judged}:{number}: there is no {name!r} in {texts}; mend or remove the line.")
        judgements.setdefault(query, {})[document] = score
        places.setdefault(query, f"{judged}:{number}")
    return Beir(corpus, queries, judgements, places)


def _rows(file: Path) -> Iterator[tuple[int, str, str, float]]:
    """Line number, query id, document id and score; the header, where there is one, isn't a row."""
    with file.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            for row in reader:
                if not row or (reader.line_num == 1 and not _is_number(row[-1])):
                    continue
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


def _document(entry: dict[str, Any]) -> tuple[str, str]:
    title = entry.get("title") or ""
    return _id(entry), f"{string_entry({'title': title}, 'title')} {string_entry(entry, 'text')}".strip()


def _query(entry: dict[str, Any]) -> tuple[str, str]:
    return _id(entry), string_entry(entry, "text")


def _id(entry: dict[str, Any]) -> str:
    return str(entry["_id"]) if "_id" in entry else string_entry(entry, "_id")

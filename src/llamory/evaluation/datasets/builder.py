"""Retrieval sets made of pairs: fixed, disjoint parts to train with, to choose with and to test with.

A pair's part follows from a hash of its own content, so that new pairs move no old one. What stands in one part has no
copy and no near copy in another: test keeps its pairs, then dev, and train loses what is like theirs.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import xxhash

from llamory.documents.beir import CORPUS, JUDGEMENTS, QUERIES
from llamory.documents.readers import read_json_lines, string_entry
from llamory.errors import LlamoryError
from llamory.evaluation.results import write_lines

PARTS = {"test": 5 / 32, "dev": 2 / 32, "train": 25 / 32}  # the first keeps its pairs where two are alike
SHINGLE = 5  # words
ALIKE = 0.5  # of the shorter text's shingles: with so many in common two texts are near copies
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pair:
    """A query and the text that answers it.

    Attributes:
        query: the query.
        text: the document.
        family: what near relatives have in common, such as a first paragraph: one pair of a family is kept.
        source: where the document comes from, such as a package's name.
    """

    query: str
    text: str
    family: str
    source: str


@dataclass(frozen=True)
class Parts:
    """The parts of a set.

    Attributes:
        pairs: per part its pairs, in the order of their hashes.
        copies: how many pairs were left out as copies of a query, a text or a family that is there.
        near_copies: how many were left out as near copies of a text of another part.
    """

    pairs: Mapping[str, list[Pair]]
    copies: int
    near_copies: int


def split_pairs(pairs: Iterable[Pair], shares: Mapping[str, float] = PARTS) -> Parts:
    """Divide pairs into parts, by default 5/32 for test, 2/32 for dev and the rest for train, and leave copies out.

    The part depends on the family's words alone. Copies are told by their words, without case and punctuation. Near
    copies are texts of different parts that share half of the shorter one's runs of five words.
    """
    by_part: dict[str, list[tuple[int, Pair]]] = {part: [] for part in shares}
    ends = dict(zip(shares, accumulate(shares.values()), strict=True))
    for pair in pairs:
        place = _hash(pair.family) / 2**64
        part = next((part for part, end in ends.items() if place < end), list(shares)[-1])
        by_part[part].append((_hash(pair.query + "\n" + pair.text), pair))
    kept: dict[str, list[Pair]] = {part: [] for part in shares}
    seen: set[tuple[str, int]] = set()
    texts = NearCopies()
    copies = near_copies = 0
    for part, found in by_part.items():
        taken = []
        for _, pair in sorted(found, key=lambda entry: (entry[0], entry[1].source)):
            marks = {("query", _hash(pair.query)), ("text", _hash(pair.text)), ("family", _hash(pair.family))}
            if marks & seen:
                copies += 1
            elif texts.near(pair.text):
                near_copies += 1
            else:
                seen |= marks
                taken.append(pair)
        kept[part] = taken
        if part != list(shares)[-1]:  # nothing is compared with the last part
            for pair in taken:
                texts.add(pair.text)
    return Parts(kept, copies, near_copies)


def write_set(folder: Path, parts: Parts, about: str) -> dict[str, int]:
    """Write each part as a BEIR folder of its own, so that what trains on one part can't see another's documents.

    Args:
        folder: where `train`, `dev`, `test` and `README.md` go; it may exist if it is empty.
        parts: from `split_pairs`.
        about: text of the README: sources and licences.

    Returns:
        The number of pairs per part.

    Raises:
        LlamoryError: the folder is in use, or there is a part without pairs.
    """
    check_free(folder)
    empty = [part for part, pairs in parts.pairs.items() if not pairs]
    if empty:
        raise LlamoryError(f"There are too few pairs to make a set: none is left for {' and '.join(empty)}.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for part, pairs in parts.pairs.items():
        _write_part(partial / part, part, pairs)
    (partial / "README.md").write_text(about, encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return {part: len(pairs) for part, pairs in parts.pairs.items()}


def check_free(folder: Path) -> None:
    """See that a set can be written to a folder.

    Raises:
        LlamoryError: it can't.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise LlamoryError(f"{folder} already exists and isn't an empty folder; choose another --output.")


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return _WORD.findall(text.casefold())


def _write_part(folder: Path, part: str, pairs: list[Pair]) -> None:
    (folder / JUDGEMENTS).mkdir(parents=True)
    keys = [f"{_hash(pair.query + chr(10) + pair.text):016x}" for pair in pairs]
    write_lines(
        folder / CORPUS,
        (
            {"_id": f"d-{key}", "title": "", "text": pair.text, "metadata": {"source": pair.source}}
            for key, pair in zip(keys, pairs, strict=True)
        ),
    )
    write_lines(
        folder / QUERIES,
        ({"_id": f"q-{key}", "text": pair.query} for key, pair in zip(keys, pairs, strict=True)),
    )
    rows = ["query-id\tcorpus-id\tscore", *(f"q-{key}\td-{key}\t1" for key in keys)]
    (folder / JUDGEMENTS / f"{part}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


class NearCopies:
    """Finds texts that share half of the shorter one's runs of five words with one that was added."""

    def __init__(self) -> None:
        self._holders: dict[int, list[int]] = {}
        self._sizes: list[int] = []

    def add(self, text: str) -> None:
        """Take up a text."""
        found = set(_runs(text))
        for run in found:
            self._holders.setdefault(run, []).append(len(self._sizes))
        self._sizes.append(len(found))

    def near(self, text: str) -> bool:
        """Whether a text is a copy or a near copy of one that was added."""
        found = set(_runs(text))
        shared = Counter(holder for run in found for holder in self._holders.get(run, ()))
        return any(count >= ALIKE * min(len(found), self._sizes[holder]) for holder, count in shared.items())


class Judged:
    """What sets judge with, to keep it out of training: queries and documents of BEIR folders.

    Args:
        folders: parts of sets, each with its corpus and queries.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._documents, self._queries = NearCopies(), set[int]()
        for folder in folders:
            for _, text in read_json_lines(folder / CORPUS, lambda entry: string_entry(entry, "text")):
                self._documents.add(text)
            for _, text in read_json_lines(folder / QUERIES, lambda entry: string_entry(entry, "text")):
                self._queries.add(_hash(text))

    def holds(self, text: str) -> bool:
        """Whether a text is a query, a document or a near copy of a document."""
        return _hash(text) in self._queries or self._documents.near(text)


def _runs(text: str) -> Iterator[int]:
    """Hashes of the runs of five words; a shorter text is one run."""
    found = words(text)
    for start in range(max(1, len(found) - SHINGLE + 1)):
        yield xxhash.xxh64_intdigest(" ".join(found[start : start + SHINGLE]).encode())


def _hash(text: str) -> int:
    """The same for texts that differ in case and punctuation only."""
    return xxhash.xxh64_intdigest(" ".join(words(text)).encode())

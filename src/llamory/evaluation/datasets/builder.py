"""Retrieval sets made of pairs: fixed, disjoint splits to train with, to choose with and to test with.

A pair's split follows from a hash of its own content, so that new pairs move no old one. What stands in one split has no
copy and no has_near_duplicate copy in another: test keeps its pairs, then dev, and train loses what is like theirs.
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

from llamory.common.io import write_json_lines
from llamory.documents.beir import CORPUS, QRELS, QUERIES
from llamory.documents.readers import read_json_lines, string_entry
from llamory.errors import LlamoryError

SPLITS = {"test": 5 / 32, "dev": 2 / 32, "train": 25 / 32}  # the first keeps its pairs where two are alike
SHINGLE_WORDS = 5  # words
NEAR_DUPLICATE_OVERLAP = (
    0.5  # of the shorter text's shingles: with so many in common two texts are has_near_duplicate duplicates
)
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pair:
    """A query and the text that answers it.

    Attributes:
        query: the query.
        text: the document.
        group: what has_near_duplicate relatives have in common, such as a first paragraph: one pair of a group is kept.
        source: where the document comes from, such as a package's name.
    """

    query: str
    text: str
    group: str
    source: str


@dataclass(frozen=True)
class Splits:
    """The splits of a set.

    Attributes:
        pairs: per split its pairs, in the order of their hashes.
        duplicates: how many pairs were left out as duplicates of a query, a text or a group that is there.
        near_duplicates: how many were left out as has_near_duplicate duplicates of a text of another split.
    """

    pairs: Mapping[str, list[Pair]]
    duplicates: int
    near_duplicates: int


def split_pairs(pairs: Iterable[Pair], fractions: Mapping[str, float] = SPLITS) -> Splits:
    """Divide pairs into splits, by default 5/32 for test, 2/32 for dev and the rest for train, and leave duplicates out.

    The split depends on the group's words alone. Copies are told by their words, without case and punctuation. Near
    duplicates are texts of different splits that share half of the shorter one's runs of five words.
    """
    by_split: dict[str, list[tuple[int, Pair]]] = {split: [] for split in fractions}
    ends = dict(zip(fractions, accumulate(fractions.values()), strict=True))
    for pair in pairs:
        bucket = _hash(pair.group) / 2**64
        split = next((split for split, end in ends.items() if bucket < end), list(fractions)[-1])
        by_split[split].append((_hash(pair.query + "\n" + pair.text), pair))
    kept: dict[str, list[Pair]] = {split: [] for split in fractions}
    seen_keys: set[tuple[str, int]] = set()
    texts = NearDuplicateIndex()
    duplicates = near_duplicates = 0
    for split, found in by_split.items():
        accepted = []
        for _, pair in sorted(found, key=lambda entry: (entry[0], entry[1].source)):
            content_keys = {("query", _hash(pair.query)), ("text", _hash(pair.text)), ("group", _hash(pair.group))}
            if content_keys & seen_keys:
                duplicates += 1
            elif texts.has_near_duplicate(pair.text):
                near_duplicates += 1
            else:
                seen_keys |= content_keys
                accepted.append(pair)
        kept[split] = accepted
        if split != list(fractions)[-1]:  # nothing is compared with the last split
            for pair in accepted:
                texts.add(pair.text)
    return Splits(kept, duplicates, near_duplicates)


def write_set(folder: Path, splits: Splits, readme: str) -> dict[str, int]:
    """Write each split as a BEIR folder of its own, so that what trains on one split can't see another's documents.

    Args:
        folder: where `train`, `dev`, `test` and `README.md` go; it may exist if it is empty.
        splits: from `split_pairs`.
        readme: text of the README: sources and licences.

    Returns:
        The number of pairs per split.

    Raises:
        LlamoryError: the folder is in use, or there is a split without pairs.
    """
    require_empty_folder(folder)
    empty = [split for split, pairs in splits.pairs.items() if not pairs]
    if empty:
        raise LlamoryError(f"There are too few pairs to make a set: none is left for {' and '.join(empty)}.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for split, pairs in splits.pairs.items():
        _write_split(partial / split, split, pairs)
    (partial / "README.md").write_text(readme, encoding="utf-8")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    return {split: len(pairs) for split, pairs in splits.pairs.items()}


def require_empty_folder(folder: Path) -> None:
    """See that a set can be written to a folder.

    Raises:
        LlamoryError: it can't.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise LlamoryError(f"{folder} already exists and isn't an empty folder; choose another --output.")


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return _WORD.findall(text.casefold())


def _write_split(folder: Path, split: str, pairs: list[Pair]) -> None:
    (folder / QRELS).mkdir(parents=True)
    keys = [f"{_hash(pair.query + chr(10) + pair.text):016x}" for pair in pairs]
    write_json_lines(
        folder / CORPUS,
        (
            {"_id": f"d-{key}", "title": "", "text": pair.text, "metadata": {"source": pair.source}}
            for key, pair in zip(keys, pairs, strict=True)
        ),
    )
    write_json_lines(
        folder / QUERIES,
        ({"_id": f"q-{key}", "text": pair.query} for key, pair in zip(keys, pairs, strict=True)),
    )
    rows = ["query-id\tcorpus-id\tscore", *(f"q-{key}\td-{key}\t1" for key in keys)]
    (folder / QRELS / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


class NearDuplicateIndex:
    """Finds texts that share half of the shorter one's runs of five words with one that was added."""

    def __init__(self) -> None:
        self._texts_by_shingle: dict[int, list[int]] = {}
        self._sizes: list[int] = []

    def add(self, text: str) -> None:
        """Take up a text."""
        found = set(_shingles(text))
        for shingle in found:
            self._texts_by_shingle.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(found))

    def has_near_duplicate(self, text: str) -> bool:
        """Whether a text is a copy or a has_near_duplicate copy of one that was added."""
        found = set(_shingles(text))
        shared = Counter(text_index for shingle in found for text_index in self._texts_by_shingle.get(shingle, ()))
        return any(
            count >= NEAR_DUPLICATE_OVERLAP * min(len(found), self._sizes[text_index])
            for text_index, count in shared.items()
        )


class DecontaminationIndex:
    """What sets judge with, to keep it out of training: queries and documents of BEIR folders.

    Args:
        folders: splits of sets, each with its corpus and queries.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._documents, self._queries = NearDuplicateIndex(), set[int]()
        for folder in folders:
            for _, text in read_json_lines(folder / CORPUS, lambda entry: string_entry(entry, "text")):
                self._documents.add(text)
            for _, text in read_json_lines(folder / QUERIES, lambda entry: string_entry(entry, "text")):
                self._queries.add(_hash(text))

    def contains(self, text: str) -> bool:
        """Whether a text is a query, a document or a has_near_duplicate copy of a document."""
        return _hash(text) in self._queries or self._documents.has_near_duplicate(text)


def _shingles(text: str) -> Iterator[int]:
    """Hashes of the runs of five words; a shorter text is one shingle."""
    found = words(text)
    for start in range(max(1, len(found) - SHINGLE_WORDS + 1)):
        yield xxhash.xxh64_intdigest(" ".join(found[start : start + SHINGLE_WORDS]).encode())


def _hash(text: str) -> int:
    """The same for texts that differ in case and punctuation only."""
    return xxhash.xxh64_intdigest(" ".join(words(text)).encode())

"""Retrieval datasets from pairs of query and text: deterministic, disjoint splits for training, validation and test.

A hash of a pair's content assigns its split, so new pairs move no existing one. No text has a near duplicate in another
split: test keeps its pairs, then dev, and train loses those that are similar.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import xxhash

from llamory.common.io import atomic_path, write_json_lines
from llamory.documents.beir import CORPUS, QRELS, QUERIES
from llamory.documents.readers import read_json_lines, string_entry
from llamory.errors import LlamoryError

SPLITS = {"test": 5 / 32, "dev": 2 / 32, "train": 25 / 32}  # of near duplicates, the earlier split keeps its pair
SHINGLE_WORDS = 5
DUPLICATE_OVERLAP = 0.5  # fraction of the shorter text's shingles that makes two texts near duplicates
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Pair:
    """A query and its relevant text.

    Attributes:
        query: the query.
        text: the document.
        group: a key shared by related pairs, such as a first paragraph; one pair per group is kept.
        source: origin of the document, such as a package's name.
    """

    query: str
    text: str
    group: str
    source: str


@dataclass(frozen=True)
class Splits:
    """The splits of a dataset.

    Attributes:
        pairs: the pairs of each split, in the order of their hashes.
        duplicates: number of pairs removed because their query, text or group occurs before.
        near_duplicates: number of pairs removed because of a similar text in another split.
    """

    pairs: Mapping[str, list[Pair]]
    duplicates: int
    near_duplicates: int


def split_pairs(pairs: Iterable[Pair], fractions: Mapping[str, float] = SPLITS) -> Splits:
    """Divide pairs into splits and remove duplicates.

    The split depends only on the words of the group. Duplicates have the same words, without case and punctuation; near
    duplicates are texts of different splits that share half of the shorter one's five-word sequences.

    Args:
        pairs: in any order.
        fractions: of each split, in the order in which splits keep near duplicates.
    """
    by_split: dict[str, list[tuple[int, Pair]]] = {split: [] for split in fractions}
    bounds = dict(zip(fractions, accumulate(fractions.values()), strict=True))
    for pair in pairs:
        bucket = _hash(pair.group) / 2**64
        split = next((split for split, bound in bounds.items() if bucket < bound), list(fractions)[-1])
        by_split[split].append((_hash(pair.query + "\n" + pair.text), pair))
    kept: dict[str, list[Pair]] = {split: [] for split in fractions}
    seen_keys: set[tuple[str, int]] = set()
    texts = DuplicateIndex()
    duplicates = near_duplicates = 0
    for split, found in by_split.items():
        accepted = []
        for _, pair in sorted(found, key=lambda entry: (entry[0], entry[1].source)):
            content_keys = {("query", _hash(pair.query)), ("text", _hash(pair.text)), ("group", _hash(pair.group))}
            if content_keys & seen_keys:
                duplicates += 1
            elif texts.matches(pair.text):
                near_duplicates += 1
            else:
                seen_keys |= content_keys
                accepted.append(pair)
        kept[split] = accepted
        if split != list(fractions)[-1]:  # no later split is compared with the last
            for pair in accepted:
                texts.add(pair.text)
    return Splits(kept, duplicates, near_duplicates)


def write_set(folder: Path, splits: Splits, readme: str) -> dict[str, int]:
    """Write each split as a separate BEIR folder, so that training can't see documents of another split.

    Args:
        folder: for `train`, `dev`, `test` and `README.md`; it is empty or doesn't exist.
        splits: from `split_pairs`.
        readme: text of the README, with sources and licences.

    Returns:
        The number of pairs per split.

    Raises:
        LlamoryError: the folder isn't empty, or a split has no pairs.
    """
    require_empty_folder(folder)
    empty = [split for split, pairs in splits.pairs.items() if not pairs]
    if empty:
        raise LlamoryError(f"There are too few pairs for a dataset: none is left for {' and '.join(empty)}.")
    with atomic_path(folder) as temporary:
        for split, pairs in splits.pairs.items():
            _write_split(temporary / split, split, pairs)
        (temporary / "README.md").write_text(readme, encoding="utf-8")
    return {split: len(pairs) for split, pairs in splits.pairs.items()}


def require_empty_folder(folder: Path) -> None:
    """Raise a LlamoryError if a folder exists and isn't empty."""
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


class DuplicateIndex:
    """Finds near duplicates of the texts that were added: half of the shorter one's five-word sequences are shared."""

    def __init__(self) -> None:
        self._texts_by_shingle: dict[int, list[int]] = {}
        self._sizes: list[int] = []

    def add(self, text: str) -> None:
        """Add a text."""
        found = set(_shingles(text))
        for shingle in found:
            self._texts_by_shingle.setdefault(shingle, []).append(len(self._sizes))
        self._sizes.append(len(found))

    def matches(self, text: str) -> bool:
        """Whether a text is a near duplicate of one that was added."""
        found = set(_shingles(text))
        shared = Counter(text_index for shingle in found for text_index in self._texts_by_shingle.get(shingle, ()))
        return any(
            count >= DUPLICATE_OVERLAP * min(len(found), self._sizes[text_index])
            for text_index, count in shared.items()
        )


class DecontaminationIndex:
    """Queries and documents of test sets, to keep them out of training data.

    Args:
        folders: BEIR folders.
    """

    def __init__(self, folders: Iterable[Path]) -> None:
        self._documents, self._queries = DuplicateIndex(), set[int]()
        for folder in folders:
            for _, text in read_json_lines(folder / CORPUS, lambda entry: string_entry(entry, "text")):
                self._documents.add(text)
            for _, text in read_json_lines(folder / QUERIES, lambda entry: string_entry(entry, "text")):
                self._queries.add(_hash(text))

    def contains(self, text: str) -> bool:
        """Whether a text is a query, a document or a near duplicate of a document."""
        return _hash(text) in self._queries or self._documents.matches(text)


def _shingles(text: str) -> Iterator[int]:
    """Hashes of the five-word sequences; a shorter text is one shingle."""
    found = words(text)
    for start in range(max(1, len(found) - SHINGLE_WORDS + 1)):
        yield xxhash.xxh64_intdigest(" ".join(found[start : start + SHINGLE_WORDS]).encode())


def _hash(text: str) -> int:
    """A hash that ignores case and punctuation."""
    return xxhash.xxh64_intdigest(" ".join(words(text)).encode())

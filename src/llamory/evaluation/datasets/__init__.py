"""Retrieval datasets from pairs of query and text: deterministic, disjoint splits for training, validation and test.

A hash of a pair's content assigns its split, so new pairs move no existing one. No text has a near duplicate in another
split: test keeps its pairs, then dev, and train loses those that are similar.
"""

from __future__ import annotations

import pkgutil
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import xxhash

from llamory.common.io import atomic_path, write_json_lines
from llamory.documents.beir import CORPUS, QRELS, QUERIES
from llamory.documents.readers import read_json_lines, string_entry
from llamory.errors import LlamoryError

DATASETS = {
    "descriptions": "llamory.evaluation.datasets.descriptions.description_pairs",
    "functions": "llamory.evaluation.datasets.functions.function_pairs",
    "sections": "llamory.evaluation.datasets.sections.section_pairs",
}
"""For each dataset, the function that yields its pairs; its module has a template `README` with `{sources}`."""
SPLITS = {"test": 5 / 32, "dev": 2 / 32, "train": 25 / 32}  # of near duplicates, the earlier split keeps its pair
SHINGLE_WORDS = 5
DUPLICATE_OVERLAP = 0.5  # fraction of the shorter text's shingles that makes two texts near duplicates

_SPLITS_NOTE = """
Each split is a BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv). A hash of its text assigns a pair to a
split, so new sources move no pair. No query and no text is in two splits, regardless of case and punctuation. Of texts
in different splits that share half of the five-word sequences of the shorter one, only one is kept: test comes before
dev, dev before train.
"""


@dataclass(frozen=True)
class Pair:
    """A query and its relevant text."""

    query: str
    text: str
    group: str  # a key shared by related pairs, such as a first paragraph; one pair per group is kept
    source: str  # such as a package's name


@dataclass(frozen=True)
class Splits:
    """The pairs of each split, in the order of their hashes, and the numbers of removed pairs."""

    pairs: Mapping[str, list[Pair]]
    duplicates: int  # with the query, text or group of another
    near_duplicates: int  # with a text similar to one of another split


def build_dataset(
    name: str, folder: Path, sources: str, *arguments: Any, fractions: Mapping[str, float] = SPLITS
) -> dict[str, Any]:
    """Write the splits of a dataset of `DATASETS`, made from `arguments`, with a README that lists `sources`.

    Returns "pairs" (their number per split), "duplicates_removed" and "near_duplicates_removed".
    """
    make_pairs = pkgutil.resolve_name(DATASETS[name])
    splits = split_pairs(make_pairs(*arguments), fractions)
    counts = {split: len(found) for split, found in splits.pairs.items()}
    rows = "\n".join(f"| {split} | {count:,} |" for split, count in counts.items())
    removed = f"{splits.duplicates:,} duplicates and {splits.near_duplicates:,} near duplicates were removed."
    readme = sys.modules[make_pairs.__module__].README.format(sources=sources)
    write_set(folder, splits, f"{readme}\n| split | pairs |\n|---|---:|\n{rows}\n\n{removed}\n{_SPLITS_NOTE}")
    return {"pairs": counts, "duplicates_removed": splits.duplicates, "near_duplicates_removed": splits.near_duplicates}


def split_pairs(pairs: Iterable[Pair], fractions: Mapping[str, float] = SPLITS) -> Splits:
    """Divide pairs into splits by the words of their groups, without duplicates regardless of case and punctuation.

    Near duplicates stay in the split that comes first in `fractions`.
    """
    by_split: dict[str, list[tuple[int, Pair]]] = {split: [] for split in fractions}
    bounds = dict(zip(fractions, accumulate(fractions.values()), strict=True))
    last = list(fractions)[-1]
    for pair in pairs:
        bucket = _hash(pair.group) / 2**64
        split = next((split for split, bound in bounds.items() if bucket < bound), last)
        by_split[split].append((_hash(pair.query + "\n" + pair.text), pair))
    kept: dict[str, list[Pair]] = {split: [] for split in fractions}
    seen_keys: set[tuple[str, int]] = set()
    texts = DuplicateIndex()
    duplicates = near_duplicates = 0
    for split, found in by_split.items():
        for _, pair in sorted(found, key=lambda entry: (entry[0], entry[1].source)):
            content_keys = {(key, _hash(getattr(pair, key))) for key in ("query", "text", "group")}
            if content_keys & seen_keys:
                duplicates += 1
            elif texts.matches(pair.text):
                near_duplicates += 1
            else:
                seen_keys |= content_keys
                kept[split].append(pair)
        for pair in kept[split] if split != last else ():  # no later split is compared with the last
            texts.add(pair.text)
    return Splits(kept, duplicates, near_duplicates)


def write_set(folder: Path, splits: Splits, readme: str) -> dict[str, int]:
    """Write each split as a BEIR folder, and return the number of pairs per split.

    Raises a LlamoryError if the folder exists and isn't empty, or a split has no pairs.
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


def _write_split(folder: Path, split: str, pairs: list[Pair]) -> None:
    (folder / QRELS).mkdir(parents=True)
    by_key = [(f"{_hash(pair.query + chr(10) + pair.text):016x}", pair) for pair in pairs]
    entries = ((key, {"title": "", "text": pair.text, "metadata": {"source": pair.source}}) for key, pair in by_key)
    write_json_lines(folder / CORPUS, ({"_id": f"d-{key}", **entry} for key, entry in entries))
    write_json_lines(folder / QUERIES, ({"_id": f"q-{key}", "text": pair.query} for key, pair in by_key))
    rows = ["query-id\tcorpus-id\tscore", *(f"q-{key}\td-{key}\t1" for key, _ in by_key)]
    (folder / QRELS / f"{split}.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")


class DuplicateIndex:
    """Finds near duplicates of added texts: half of the shorter one's five-word sequences are shared."""

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
        shared = Counter(index for shingle in found for index in self._texts_by_shingle.get(shingle, ()))
        return any(count >= DUPLICATE_OVERLAP * min(len(found), self._sizes[index]) for index, count in shared.items())


class DecontaminationIndex:
    """Queries and documents of test sets in BEIR folders, to keep them out of training data."""

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


def words(text: str) -> list[str]:
    """The words of a text, without case and punctuation."""
    return re.findall(r"\w+", text.casefold())


def _shingles(text: str) -> Iterator[int]:
    """Hashes of the five-word sequences; a shorter text is one shingle."""
    found = words(text)
    for start in range(max(1, len(found) - SHINGLE_WORDS + 1)):
        yield xxhash.xxh64_intdigest(" ".join(found[start : start + SHINGLE_WORDS]).encode())


def _hash(text: str) -> int:
    """A hash that ignores case and punctuation."""
    return xxhash.xxh64_intdigest(" ".join(words(text)).encode())

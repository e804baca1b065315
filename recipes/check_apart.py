"""Proves that no text of a set that is judged with stands in what was trained on.

    python recipes/check_apart.py TRAINED.jsonl [TRAINED.jsonl ...] --apart SET [--apart ...]

Every string of TRAINED's JSON lines is compared with every document and query of each SET (a BEIR folder): equal words,
or half of the shorter text's runs of five words in common. Gives the number of each, and exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from llamory.evaluation.sets import NearCopies, words


def strings(value: object) -> Iterator[str]:
    """All texts in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)


def main() -> int:
    """Compare; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path, nargs="+")
    parser.add_argument("--apart", type=Path, action="append", required=True, metavar="SET")
    options = parser.parse_args()
    trained: dict[str, None] = {}
    for path in options.trained:
        for line in path.read_text(encoding="utf-8").splitlines():
            trained.update(dict.fromkeys(strings(json.loads(line))))
    wrong = 0
    for folder in options.apart:
        documents, queries = NearCopies(), set()
        for line in (folder / "corpus.jsonl").read_text(encoding="utf-8").splitlines():
            documents.add(json.loads(line)["text"])
        for line in (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines():
            queries.add(" ".join(words(json.loads(line)["text"])))
        near = sum(documents.near(text) for text in trained)
        asked = sum(" ".join(words(text)) in queries for text in trained)
        wrong += near + asked
        told = f"of {len(trained):,} texts {near} are near one of its documents, {asked} are one of its queries"
        sys.stdout.write(f"{folder}: {told}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

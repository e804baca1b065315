"""Proves that no text of a set that is judged with stands in what was trained on.

    python recipes/retriever/check_contamination.py TRAINED.jsonl [TRAINED.jsonl ...] --exclude SET [--exclude ...]

Every string of TRAINED's JSON lines is compared with every document and query of each SET (a BEIR folder): equal words,
or half of the shorter text's runs of five words in common. Gives their number, and exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from llamory.evaluation.datasets import DecontaminationIndex


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
    parser.add_argument("--exclude", type=Path, action="append", required=True, metavar="SET")
    options = parser.parse_args()
    trained: dict[str, None] = {}
    for path in options.trained:
        for line in path.read_text(encoding="utf-8").splitlines():
            trained.update(dict.fromkeys(strings(json.loads(line))))
    wrong = 0
    for folder in options.exclude:
        judged = DecontaminationIndex([folder])
        found = sum(judged.contains(text) for text in trained)
        wrong += found
        message = f"of {len(trained):,} texts {found} are one of its queries or documents, or near one of its documents"
        sys.stdout.write(f"{folder}: {message}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

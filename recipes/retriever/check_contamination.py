"""Checks that training data contain no text of the evaluation sets.

    python recipes/retriever/check_contamination.py TRAINED.jsonl [TRAINED.jsonl ...] --exclude SET [--exclude ...]

Compares every string of the JSON lines with every document and query of each SET (a BEIR folder). Texts match if their
words are equal, or if they share half of the shorter text's sequences of five words. Prints the number of matches; the
exit code is 1 if there are any.
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
    """Compare, and return the exit code."""
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
        message = f"{found} of {len(trained):,} texts equal or nearly equal one of its queries or documents"
        sys.stdout.write(f"{folder}: {message}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

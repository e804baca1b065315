"""Writes sequences of labelled texts: training data for many-shot classification.

    python recipes/reader/labelled_texts.py OUT.jsonl --texts speech=SPEECHES --texts manual=MANUALS [--examples 500]

Each line is a published chat of about a hundred short texts with their labels, in one of several plain-text formats;
the responses are the labels. The texts are sentences of the documents under --texts, or entries of the lists in
hidden_facts.py. A label is the kind of the text, or a random word for each kind, which only the preceding texts of the
line explain.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from hidden_facts import FIRST, LAST, MONTHS, ROLES, SYLLABLES, THINGS, WORDS, FactRng, fact, paragraphs

# Text before and after a label. The evaluation uses "Kind:", which is not among them.
FORMS = [
    ("\nLabel: ", "\n\n"),
    ("\nType: ", "\n\n"),
    ("\nClass: ", "\n---\n"),
    (" => ", "\n"),
    (" -> ", "\n"),
    ("\nAnswer: ", "\n\n"),
    ("\nThis is: ", "\n\n"),
    (" | ", "\n"),
]
PER_SOURCE, SHORTEST, LONGEST = 4_000, 30, 160  # sentences, characters
ROOM, KINDS = 10_000, (2, 6)


def sentences(folder: Path) -> list[str]:
    """Sentences, or lines of code, of a folder: at most two per paragraph."""
    found: list[str] = []
    for text in paragraphs(folder):
        parts = re.split(r"(?<=[.!?;])\s+|\n", text)
        found += [part.strip() for part in parts if SHORTEST < len(part.strip()) < LONGEST][:2]
        if len(found) > PER_SOURCE:
            return found
    return found


def invented(rng: FactRng) -> dict[str, list[str]]:
    """Texts that need no documents, by kind."""
    facts = [fact(rng, [" ".join(rng.sample(WORDS, 5))]) for _ in range(400)]
    lists = {"first name": FIRST, "family name": LAST, "month": MONTHS, "role": ROLES, "place": THINGS, "word": WORDS}
    numbers = {
        "number": [str(rng.randint(10, 99_999)) for _ in range(200)],
        "year": [str(rng.randint(1500, 2030)) for _ in range(200)],
        "sound": ["".join(rng.sample(SYLLABLES, 2)) for _ in range(200)],
    }
    return lists | numbers | {"question": [each[1] for each in facts], "statement": [each[3] for each in facts]}


def example(rng: random.Random, real: dict[str, list[str]], made: dict[str, list[str]]) -> dict[str, Any]:
    """One line of the output."""
    pool = real if rng.random() < 0.5 else real | made
    kinds = rng.sample(sorted(pool), min(len(pool), rng.randint(*KINDS)))
    labels = dict(zip(kinds, kinds if rng.random() < 0.4 else rng.sample(WORDS, len(kinds)), strict=True))
    between, after = rng.choice(FORMS)
    turns: list[dict[str, str]] = []
    size, before = 0, ""
    while size < ROOM:
        kind = rng.choice(kinds)
        text = rng.choice(pool[kind])
        # Tokens begin with a space: move it from the end of the text to the label.
        space = " " * between.endswith(" ")
        turns.append({"from": "human", "value": before + text + between.rstrip(" ")})
        turns.append({"from": "gpt", "value": space + labels[kind]})
        before = after
        size += len(text) + len(between) + len(labels[kind]) + len(after)
    return {"conversations": turns}


def main() -> None:
    """Write the examples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", action="append", required=True, help="KIND=FOLDER")
    parser.add_argument("--examples", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = FactRng(options.seed)
    named = dict(each.split("=", 1) for each in options.texts)
    real, made = {kind: sentences(Path(folder)) for kind, folder in named.items()}, invented(rng)
    with options.output.open("w", encoding="utf-8") as file:
        for _ in range(options.examples):
            file.write(json.dumps(example(rng, real, made), ensure_ascii=False) + "\n")
    sys.stdout.write(f"{options.examples} lines in {options.output}\n")


if __name__ == "__main__":
    main()

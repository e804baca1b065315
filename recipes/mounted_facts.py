"""Writes documents with facts in them, each of which is asked for by itself: for training on what is read apart.

    python recipes/mounted_facts.py MOUNTED.jsonl --texts DOCUMENTS [--texts ...] [--documents 500]

Texts and facts are hidden_facts.py's, with more names that nobody has. In half of the documents all facts are of one
kind, about things that differ in their owner only, so that a reader has to find the right one, not just one that would
do. Half of the documents are asked about in chats, half in plain text, most often with the answer begun.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import hidden_facts as facts_of
from hidden_facts import FORMS, KINDS, PLACES, THINGS, WORDS, Draw, Fact, capital, fact, paragraphs, sayings

DOCUMENT, FACTS = (800, 5_000), (8, 24)  # characters and facts of a document
NEW_NAMES = 0.5
ALIKE, POOL = 0.5, 300  # share of documents whose facts are alike; facts that these are chosen from
MORE_SAYINGS = 0.3  # per other fact
QUOTES = (facts_of.saying_of, facts_of.writing_on)
OTHERS = (
    facts_of.number_of,
    facts_of.number_of,
    facts_of.changed_on,
    facts_of.word_of,
    facts_of.amount_of,
    facts_of.name_of,
    facts_of.done_by,
)


def alike(draw: Draw, sentences: list[str], number: int) -> list[Fact]:
    """Facts of one kind, about things that differ in their owner only."""
    of_owner = f"the {draw.choice(KINDS)} {draw.choice(THINGS)} of"
    draw.alike = draw.choice([of_owner, of_owner, draw.choice(PLACES)])
    if draw.random() < 0.25:
        pool = [facts_of.writing_on(draw, sentences) for _ in range(POOL)]
    else:
        chosen = draw.choice(OTHERS)
        pool = [chosen(draw) for _ in range(POOL)]
    draw.alike = ""
    most = Counter(map(beginning, pool)).most_common(1)[0][0]
    return [each for each in pool if beginning(each) == most][:number]


def beginning(made: Fact) -> str:
    """What questions of one kind have in common."""
    return " ".join(made[1].split()[:4])


def mixed(draw: Draw, sentences: list[str], number: int) -> list[Fact]:
    """Facts of all kinds."""
    made = [fact(draw, sentences) for _ in range(number)]
    return made + [draw.choice(QUOTES)(draw, sentences) for _ in made if draw.random() < MORE_SAYINGS]


def mounted(sources: list[Iterator[str]], draw: Draw) -> Iterator[dict[str, Any]]:
    """A document with facts in it, and questions about them."""
    while True:
        source = draw.choice(sources)
        body: list[str] = []
        room, number = draw.randint(*DOCUMENT), draw.randint(*FACTS)
        while sum(map(len, body)) < room:
            body.append(next(source))
        sentences = [" ".join(draw.sample(WORDS, draw.randint(3, 7))) for _ in range(20)]
        sentences += [each for text in body for each in sayings(text)]
        made = (alike if draw.random() < ALIKE else mixed)(draw, sentences, number)
        made = list({each[1]: each for each in made}.values())  # each question has one answer
        for stated, *_ in made:
            body.insert(draw.randint(0, len(body)), capital(stated))
        document = "\n\n".join(body)
        if draw.random() < 0.5:
            yield {"document": document, "chats": [chat(draw, each) for each in made]}
        else:
            yield {"document": document, "questions": [question(draw, each) for each in made]}


def chat(draw: Draw, made: Fact) -> list[dict[str, str]]:
    """A fact is asked for, and told."""
    _, asked, value, said = made
    answer = capital(said) if draw.random() < 0.7 else value
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def question(draw: Draw, made: Fact) -> dict[str, str]:
    """A fact is asked for in plain text, most often with the answer begun."""
    _, asked, value, said = made
    said = capital(said)
    before, between = draw.choice([*FORMS, ("", " "), ("\n", "\n")])
    begun = said[: said.rfind(value)] if draw.random() < 0.75 else ""
    text = f"{before}{asked}{between}{begun}"
    # Tokens begin with a space; so does the answer, then.
    answer = " " * text.endswith(" ") + (said if begun else value)[len(begun) :]
    return {"question": text.rstrip(" "), "response": answer}


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=Path, action="append", required=True)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = Draw(options.seed)
    draw.new_names = NEW_NAMES
    with options.output.open("w", encoding="utf-8") as file:
        for entry in islice(mounted(list(map(paragraphs, options.texts)), draw), options.documents):
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{options.documents} documents in {options.output}\n")


if __name__ == "__main__":
    main()

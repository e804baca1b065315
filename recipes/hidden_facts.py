"""Writes documents of real text with facts hidden in it, and questions about them at the end: FoT's warming up.

    python recipes/hidden_facts.py FACTS.jsonl --texts DOCUMENTS [--texts ...] [--documents 2000]

What stands between the facts is the text of DOCUMENTS, in order. A fact is a number, a date, a name, a word or a
sentence that belongs to something or somebody; it is stated in one of several ways and asked for in another. The
passkey task's own words don't occur.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from llamory.documents import find_files, read_file

BODY, FACTS = 7_000, (12, 24)  # characters of text with so many facts in it
KINDS = "old new red blue grey green broken silver northern southern eastern western upper hidden narrow round".split()
THINGS = (
    "mill harbour bridge museum bakery lighthouse station garden library cellar workshop tower chapel brewery "
    "observatory stable boathouse archive gallery kitchen laboratory warehouse theatre school clinic market fountain "
    "greenhouse quarry vineyard ferry depot printer telescope piano bicycle suitcase cabinet engine drawbridge"
).split()
FIRST = (
    "Maria Jonas Aisha Peter Ingrid Tomas Leila Hugo Nora Felix Yuki Omar Clara Bruno Anna David Sofia Erik Marta Paul "
    "Ines Karl Rosa Viktor Emma Samuel Olga Martin Julia Andre Hana Lukas Teresa Igor Beata Simon"
).split()
LAST = (
    "Lindqvist Okafor Tanaka Moreau Fischer Novak Rossi Haddad Keller Silva Berg Petrov Walsh Nakamura Olsen Costa "
    "Weber Kaya Laurent Dvorak Mensah Romero Lund Conti Baker Horvat Jensen Marsh Ortega Vogel Quinn Sato Ilves Brandt"
).split()
MONTHS = "January February March April May June July August September October November December".split()
WORDS = (
    "lantern copper meadow falcon thimble orchard granite whistle saffron compass pebble velvet harvest magnet cinder "
    "walnut ribbon glacier pepper anchor mosaic thunder basket crystal hammer willow marble feather candle spiral"
).split()
NUMBERS = ("code", "serial number", "access number", "phone extension", "room number", "combination", "ticket number")
OFFICES = ("keeper", "owner", "builder", "inspector", "founder", "painter", "caretaker")

# A fact: how it is stated, how it is asked for, and the answer.
Fact = tuple[str, str, str]


def thing(draw: random.Random) -> str:
    """Something that there is only one of in a document."""
    return f"the {draw.choice(KINDS)} {draw.choice(THINGS)} of {draw.choice(LAST)}"


def person(draw: random.Random) -> str:
    """Somebody."""
    return f"{draw.choice(FIRST)} {draw.choice(LAST)}"


def number_of(draw: random.Random) -> Fact:
    """A number of two to six digits."""
    what, whose, size = draw.choice(NUMBERS), thing(draw), draw.randint(2, 6)
    value = str(draw.randint(10 ** (size - 1), 10**size - 1))
    stated = draw.choice(
        [
            f"The {what} of {whose} is {value}.",
            f"Note that {value} is the {what} of {whose}.",
            f"{whose}: {what} {value}.",
        ]
    )
    return stated, draw.choice([f"What is the {what} of {whose}?", f"Which {what} has {whose}?"]), value


def date_of(draw: random.Random) -> Fact:
    """A day."""
    who, value = person(draw), f"{draw.randint(1, 28)} {draw.choice(MONTHS)} {draw.randint(1700, 2020)}"
    what, asked = draw.choice(
        [("was born on", "was {} born"), ("arrived on", "did {} arrive"), ("died on", "did {} die")]
    )
    return f"{who} {what} {value}.", f"When {asked.format(who)}?", value


def name_of(draw: random.Random) -> Fact:
    """Somebody who has to do with something."""
    office, whose, value = draw.choice(OFFICES), thing(draw), person(draw)
    stated = draw.choice([f"The {office} of {whose} is {value}.", f"{value} is the {office} of {whose}."])
    return (
        stated,
        draw.choice([f"Who is the {office} of {whose}?", f"What is the name of the {office} of {whose}?"]),
        value,
    )


def word_of(draw: random.Random) -> Fact:
    """A password of one to three words."""
    whose, value = thing(draw), " ".join(draw.sample(WORDS, draw.randint(1, 3)))
    return f'The password of {whose} is "{value}".', f"What is the password of {whose}?", value


def saying_of(draw: random.Random, sentences: list[str]) -> Fact:
    """A sentence of the texts that somebody is made to say."""
    who, value = person(draw), draw.choice(sentences)
    return f'{who} said: "{value}"', f"What did {who} say?", value


def fact(draw: random.Random, sentences: list[str]) -> Fact:
    """Any of them; numbers are the most frequent."""
    kind = draw.choice([number_of, number_of, number_of, date_of, name_of, word_of, None])
    stated, asked, value = saying_of(draw, sentences) if kind is None else kind(draw)
    return stated[0].upper() + stated[1:], asked, value


def asked_about(draw: random.Random, facts: list[Fact]) -> str:
    """Questions and answers, all in one of several forms."""
    form = draw.choice(["Question: {}\nAnswer: {}", "Q: {}\nA: {}", "{}\n{}", "{} {}", "- {} {}"])
    return "\n".join(form.format(asked, value) for _, asked, value in draw.sample(facts, len(facts)))


def paragraphs(texts: list[Path]) -> Iterator[str]:
    """Paragraphs of all documents, again and again."""
    while True:
        for path in find_files(texts):
            for document in read_file(path):
                for block in document.blocks:
                    if len(block.text) > 80:
                        yield block.text[:1500]


def documents(texts: list[Path], number: int, seed: int) -> Iterator[str]:
    """The documents."""
    draw, source = random.Random(seed), paragraphs(texts)
    for _ in range(number):
        body: list[str] = []
        while sum(map(len, body)) < BODY:
            body.append(next(source))
        sentences = [" ".join(text.split()[:8]) for text in body if len(text.split()) > 20 and text[0].isalpha()]
        facts = [fact(draw, sentences) for _ in range(draw.randint(*FACTS))]
        for stated, _, _ in facts:
            body.insert(draw.randint(0, len(body)), stated)
        yield "\n\n".join([*body, asked_about(draw, facts)])


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=Path, action="append", required=True)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with options.output.open("w", encoding="utf-8") as file:
        for text in documents(options.texts, options.documents, options.seed):
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{options.documents} documents in {options.output}\n")


if __name__ == "__main__":
    main()

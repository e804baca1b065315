"""Writes documents that contain facts, with a separate question about each: data for training with frozen contexts.

    python recipes/reader/document_facts.py FACTS.jsonl --texts DOCUMENTS [--texts ...] [--documents 500]

Texts and facts are those of hidden_facts.py, with more invented names. In half of the documents all facts are of one
kind, about things that differ only in their owner, so that the reader must find the right fact among similar ones.
Half of the documents have questions in chats, half in plain text, most of which end with the start of the answer.
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
from hidden_facts import FORMS, KINDS, PLACES, THINGS, WORDS, Fact, FactRng, capitalize, fact, paragraphs, sayings

DOCUMENT, FACTS = (800, 5_000), (8, 24)  # characters and facts of a document
NEW_NAMES = 0.5
SIMILAR_SHARE, POOL = 0.5, 300  # fraction of documents with similar facts; candidates for these facts
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


def alike(rng: FactRng, sentences: list[str], number: int) -> list[Fact]:
    """Facts of one kind, about things that differ only in their owner."""
    of_owner = f"the {rng.choice(KINDS)} {rng.choice(THINGS)} of"
    rng.shared_name = rng.choice([of_owner, of_owner, rng.choice(PLACES)])
    if rng.random() < 0.25:
        pool = [facts_of.writing_on(rng, sentences) for _ in range(POOL)]
    else:
        chosen = rng.choice(OTHERS)
        pool = [chosen(rng) for _ in range(POOL)]
    rng.shared_name = ""
    most = Counter(map(question_prefix, pool)).most_common(1)[0][0]
    return [each for each in pool if question_prefix(each) == most][:number]


def question_prefix(made: Fact) -> str:
    """The start that questions of one kind share."""
    return " ".join(made[1].split()[:4])


def mixed(rng: FactRng, sentences: list[str], number: int) -> list[Fact]:
    """Facts of all kinds."""
    made = [fact(rng, sentences) for _ in range(number)]
    return made + [rng.choice(QUOTES)(rng, sentences) for _ in made if rng.random() < MORE_SAYINGS]


def documents_with_questions(sources: list[Iterator[str]], rng: FactRng) -> Iterator[dict[str, Any]]:
    """Documents that contain facts, with questions about them."""
    while True:
        source = rng.choice(sources)
        body: list[str] = []
        room, number = rng.randint(*DOCUMENT), rng.randint(*FACTS)
        while sum(map(len, body)) < room:
            body.append(next(source))
        sentences = [" ".join(rng.sample(WORDS, rng.randint(3, 7))) for _ in range(20)]
        sentences += [each for text in body for each in sayings(text)]
        made = (alike if rng.random() < SIMILAR_SHARE else mixed)(rng, sentences, number)
        made = list({each[1]: each for each in made}.values())  # each question has one answer
        for stated, *_ in made:
            body.insert(rng.randint(0, len(body)), capitalize(stated))
        document = "\n\n".join(body)
        if rng.random() < 0.5:
            yield {"document": document, "chats": [chat(rng, each) for each in made]}
        else:
            yield {"document": document, "questions": [question(rng, each) for each in made]}


def chat(rng: FactRng, made: Fact) -> list[dict[str, str]]:
    """A chat of one question and its answer."""
    _, asked, value, answer_sentence = made
    answer = capitalize(answer_sentence) if rng.random() < 0.7 else value
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def question(rng: FactRng, made: Fact) -> dict[str, str]:
    """A question in plain text, most often with the start of the answer (answer_prefix)."""
    _, asked, value, answer_sentence = made
    answer_sentence = capitalize(answer_sentence)
    before, between = rng.choice([*FORMS, ("", " "), ("\n", "\n")])
    answer_prefix = answer_sentence[: answer_sentence.rfind(value)] if rng.random() < 0.75 else ""
    text = f"{before}{asked}{between}{answer_prefix}"
    # Tokens begin with a space: move it from the end of the question to the answer.
    answer = " " * text.endswith(" ") + (answer_sentence if answer_prefix else value)[len(answer_prefix) :]
    return {"question": text.rstrip(" "), "response": answer}


def main() -> None:
    """Write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=Path, action="append", required=True)
    parser.add_argument("--documents", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = FactRng(options.seed)
    rng.new_names = NEW_NAMES
    with options.output.open("w", encoding="utf-8") as file:
        for entry in islice(documents_with_questions(list(map(paragraphs, options.texts)), rng), options.documents):
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{options.documents} documents in {options.output}\n")


if __name__ == "__main__":
    main()

"""Writes documents of real text with hidden facts and questions about them, for FoT and instruction training.

    python recipes/reader/hidden_facts.py FACTS.jsonl --texts DOCUMENTS [--texts ...] [--documents 200]
    python recipes/reader/hidden_facts.py CHATS.jsonl --texts DOCUMENTS [--texts ...] [--documents 2000] --as chats
    python recipes/reader/hidden_facts.py PLAIN.jsonl --texts DOCUMENTS [--texts ...] [--documents 2000] --as plain
    python recipes/reader/hidden_facts.py TEXT.jsonl --texts DOCUMENTS [--documents 500] --as continuations

The text between the facts is consecutive text of one of the DOCUMENTS. A fact is a number, date, name, word or sentence
that belongs to a thing or a person. It is stated in one of several wordings and asked for in another, 600 to 6,500
characters later: mostly outside the same row of 512 tokens, and within the three rows before it. The words of the
passkey task do not occur.

For instruction tuning: "chats" ask for the facts of a document with the chat template, "plain" ones in one of several
plain-text formats; "continuations" have no questions, only the continuation of a text.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from llamory.documents import find_files, read_file

# All in characters.
DOCUMENT = 40_000
FACT_GAP = (150, 800)  # between facts
DISTANCE = (600, 6_500)  # between a fact and its question
SHORTEST, LONGEST = 80, 1_500  # paragraphs
CHAT_DOCUMENT, CHAT_FACTS, TURNS = (1_200, 8_000), (8, 24), 12
REPEATED = 0.15  # fraction of those documents that repeat one or two paragraphs
READ, CONTINUED = 9_000, 6_000
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
ROLES = (
    "winner,author,captain,judge,first speaker,witness,teacher,surgeon,sculptor,patron,ambassador,driver,leader,chair,"
    "secretary,treasurer,translator,composer,pilot,editor,hostess,interpreter,runner-up,landlord,conductor,hero,"
    "last visitor,youngest member,best man,new mayor"
).split(",")
OCCASIONS = (
    "of the chess tournament,of the preface,of the steamer,at the county fair,of the meeting,at the trial,of the "
    "evening class,on duty that night,of the marble statue,of the orchestra,to the northern court,of the night bus,of "
    "the expedition,of the budget committee,of the rowing club,of the anthem,of the balloon,of the newspaper,at the "
    "wedding,of the regatta,in the play,of the choir,of the council,of the spring race,at the parish hall"
).split(",")
DONE = (
    "painted by,sold to,written by,rented from,designed by,lent to,bought by,guarded by,named after,discovered by,"
    "inherited by,repaired by,photographed by,opened by,given to"
).split(",")
SYLLABLES = "bal cor den fel gar hol jun kes lam mor nev ost pel quin ras sel tor ul vas wen yar zim".split()
ENDINGS = "ski son wick ley ard ette ov man berg stead ino well er ton".split()
AMOUNTS = "windows,steps,rooms,members,seats,horses,lamps,shelves,beds,workers".split(",")
WRITTEN = (("label on", "says"), ("motto of", "is"), ("inscription over", "reads"), ("letter from", "begins"))

PLACES = "Farm,Manor,Cottage,Castle,Priory,Grange,Court,Park,Villa,Abbey,Inn,Wharf,Street,Square".split(",")
CHANGED = "opened,closed,sold,rebuilt,founded,flooded,painted,insured,measured".split(",")

# Text before a question and before its answer.
FORMS = [("Question: ", "\nAnswer: "), ("Q: ", "\nA: "), ("", "\n"), ("", " "), ("- ", " ")]

# A fact: statement, question, answer, and the answer as a sentence.
Fact = tuple[str, str, str, str]


class FactRng(random.Random):
    """Random numbers, and the settings of the texts.

    Attributes:
        new_names: probability of an invented name, and of a named place as a thing.
        shared_name: the name that all things share except for their owner; "" for none.
        read, continued: characters of a text and of its continuation.
    """

    new_names = 0.0
    shared_name = ""
    read, continued = READ, CONTINUED

    def with_probability(self, share: float) -> bool:
        """True with this probability; draws no random number if it is 0."""
        return share > 0 and self.random() < share

    def new_name(self) -> str:
        """An invented name."""
        return capitalize("".join(self.choices(SYLLABLES, k=self.randint(1, 2))) + self.choice(ENDINGS))

    def owner(self) -> str:
        """A last name."""
        return self.new_name() if self.with_probability(self.new_names) else self.choice(LAST)


def thing(rng: FactRng) -> str:
    """A thing that is unique in its document."""
    if rng.shared_name:
        return (
            f"{rng.shared_name} {rng.owner()}"
            if rng.shared_name.startswith("the ")
            else f"{rng.owner()} {rng.shared_name}"
        )
    if rng.with_probability(rng.new_names):
        return f"{rng.owner()} {rng.choice(PLACES)}"
    return f"the {rng.choice(KINDS)} {rng.choice(THINGS)} of {rng.owner()}"


def person(rng: FactRng) -> str:
    """A person; half of the last names are invented."""
    last = rng.choice(LAST) if rng.random() < 0.5 else capitalize(rng.choice(SYLLABLES) + rng.choice(ENDINGS))
    return f"{rng.choice(FIRST)} {last}"


def number_of(rng: FactRng) -> Fact:
    """A number of two to six digits."""
    what, whose, size = rng.choice(NUMBERS), thing(rng), rng.randint(2, 6)
    value = str(rng.randint(10 ** (size - 1), 10**size - 1))
    said = f"The {what} of {whose} is {value}."
    stated = rng.choice([said, f"Note that {value} is the {what} of {whose}.", f"{whose}: {what} {value}."])
    return stated, rng.choice([f"What is the {what} of {whose}?", f"Which {what} has {whose}?"]), value, said


def date_of(rng: FactRng) -> Fact:
    """When a person was born, arrived or died."""
    who, value = person(rng), day_of(rng)
    what, asked = rng.choice([("was born", "was {} born"), ("arrived", "did {} arrive"), ("died", "did {} die")])
    said = f"{who} {what} on {value}."
    return rng.choice([said, f"On {value} {who} {what}."]), f"When {asked.format(who)}?", value, said


def name_of(rng: FactRng) -> Fact:
    """Who holds an office of a thing."""
    office, whose, value = rng.choice(OFFICES), thing(rng), person(rng)
    said = f"The {office} of {whose} is {value}."
    asked = rng.choice([f"Who is the {office} of {whose}?", f"What is the name of the {office} of {whose}?"])
    return rng.choice([said, f"{value} is the {office} of {whose}."]), asked, value, said


def role_of(rng: FactRng) -> Fact:
    """Who had a role on an occasion."""
    what, value = f"the {rng.choice(ROLES)} {rng.choice(OCCASIONS)}", person(rng)
    if rng.with_probability(rng.new_names):
        what += f" in {rng.new_name()}"
    verb = rng.choice(["was", "was", "is", "will be"])
    said = f"{what} {verb} {value}."
    asked = rng.choice([f"Who {verb} {what}?", f"Who {verb} {what}?", f"What is the name of {what}?"])
    return rng.choice([said, f"{value} {verb} {what}."]), asked, value, said


def done_by(rng: FactRng) -> Fact:
    """Who did something to a thing, or received it."""
    whose, what, value = thing(rng), rng.choice(DONE), person(rng)
    verb, preposition = what.split()
    said = f"{whose} was {what} {value}."
    return said, f"{'Who' if preposition == 'by' else 'Whom'} was {whose} {verb} {preposition}?", value, said


def changed_on(rng: FactRng) -> Fact:
    """The day of an event of a thing."""
    whose, what, day = thing(rng), rng.choice(CHANGED), day_of(rng)
    said = f"{whose} was {what} on {day}."
    return rng.choice([said, f"On {day} {whose} was {what}."]), f"When was {whose} {what}?", day, said


def day_of(rng: FactRng) -> str:
    """A date from 1700 to 2020."""
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1700, 2020)}"


def amount_of(rng: FactRng) -> Fact:
    """The number of a thing's parts."""
    whose, what, value = thing(rng), rng.choice(AMOUNTS), str(rng.randint(2, 9999))
    said = f"{whose} has {value} {what}."
    return said, f"How many {what} does {whose} have?", value, said


def writing_on(rng: FactRng, sentences: list[str]) -> Fact:
    """Words of the texts, written on a thing."""
    (what, verb), whose, value = rng.choice(WRITTEN), thing(rng), rng.choice(sentences)
    said = f'The {what} {whose} {verb}: "{value}"'
    return said, f"What does the {what} {whose} say?", value, said


def word_of(rng: FactRng) -> Fact:
    """A password of one to three words."""
    whose, value = thing(rng), " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    said = f'The password of {whose} is "{value}".'
    return said, f"What is the password of {whose}?", value, said


def saying_of(rng: FactRng, sentences: list[str]) -> Fact:
    """Words of the texts, said by a person."""
    who, value = person(rng), rng.choice(sentences)
    said = f'{who} said: "{value}"'
    return said, f"What did {who} say?", value, said


def fact(rng: FactRng, sentences: list[str]) -> Fact:
    """A fact of any kind."""
    kinds = [number_of, number_of, number_of, date_of, word_of, amount_of]
    quotes = [saying_of, writing_on]
    chosen = rng.choice([*kinds, *quotes, name_of, *[role_of] * 4, done_by])
    stated, asked, value, said = chosen(rng, sentences) if chosen in quotes else chosen(rng)
    return capitalize(stated), asked, value, capitalize(said)


def capitalize(text: str) -> str:
    """The text with an upper-case first letter."""
    return text[0].upper() + text[1:]


def format_questions(rng: FactRng, facts: list[Fact]) -> str:
    """Questions and answers, all in the same one of several formats."""
    before, between = rng.choice(FORMS)
    whole = rng.random() < 0.3
    return "\n".join(f"{before}{asked}{between}{said if whole else value}" for _, asked, value, said in facts)


def sayings(text: str) -> list[str]:
    """The first eight words of a paragraph, if it is prose."""
    words = text.split()
    return [" ".join(words[:8])] if len(words) > 20 and text[0].isalpha() else []


def paragraphs(texts: Path) -> Iterator[str]:
    """Paragraphs of all documents of a folder, repeated endlessly."""
    while True:
        for path in find_files([texts]):
            for document in read_file(path):
                for section in document.sections:
                    if len(section.text) > SHORTEST:
                        yield section.text[:LONGEST]


def documents(sources: list[Iterator[str]], rng: FactRng) -> Iterator[dict[str, Any]]:
    """Long documents in which each fact is asked for DISTANCE characters later."""
    while True:
        source = rng.choice(sources)
        parts: list[str] = []
        waiting: list[tuple[int, Fact]] = []  # character from which on to ask, and fact
        sentences = [" ".join(rng.sample(WORDS, 5))]
        at = since = 0
        while at < DOCUMENT or waiting:
            text = next(source)
            parts.append(text)
            sentences = (sentences + sayings(text))[-20:]
            at += len(text)
            since += len(text)
            while since > 0 and at < DOCUMENT:
                new = fact(rng, sentences)
                parts.append(new[0])
                waiting.append((at + rng.randint(*DISTANCE), new))
                since -= rng.randint(*FACT_GAP)
            due = [each for when, each in waiting if when <= at]
            if due:
                waiting = [(when, each) for when, each in waiting if when > at]
                parts.append(format_questions(rng, rng.sample(due, len(due))))
        yield {"text": "\n\n".join(parts)}


def with_facts(sources: list[Iterator[str]], rng: FactRng) -> Iterator[tuple[str, list[Fact]]]:
    """Documents that contain facts, and the facts to ask for."""
    while True:
        source = rng.choice(sources)
        body: list[str] = []
        room = rng.randint(*CHAT_DOCUMENT)
        again = [next(source) for _ in range(rng.randint(1, 2))] if rng.random() < REPEATED else []
        while sum(map(len, body)) < room:
            body += again or [next(source)]
        sentences = [" ".join(rng.sample(WORDS, 5))] + [each for text in body for each in sayings(text)]
        drawn = (fact(rng, sentences) for _ in range(rng.randint(*CHAT_FACTS)))
        facts = list({each[1]: each for each in drawn}.values())  # each question has one answer
        for stated, *_ in facts:
            body.insert(rng.randint(0, len(body)), stated)
        yield "\n\n".join(body), rng.sample(facts, min(len(facts), TURNS))


def chats(sources: list[Iterator[str]], rng: FactRng) -> Iterator[dict[str, Any]]:
    """Documents that contain facts, with a chat about them."""
    for document, facts in with_facts(sources, rng):
        messages = []
        for _, asked, value, said in facts:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": said if rng.random() < 0.7 else value})
        yield {"document": document, "messages": messages}


def plain(sources: list[Iterator[str]], rng: FactRng) -> Iterator[dict[str, Any]]:
    """Documents that contain facts, with questions in plain text, most with the start of the answer (answer_prefix)."""
    for document, facts in with_facts(sources, rng):
        turns = [{"from": "human", "value": document + "\n"}]
        before, between = rng.choice([*FORMS, ("", " ")])
        often = max(rng.random(), rng.random())
        for _, asked, value, said in facts:
            answer_prefix = said[: said.rfind(value)] if rng.random() < often else ""
            text = f"\n{before}{asked}{between}{answer_prefix}"
            answer = (said if answer_prefix else value)[len(answer_prefix) :]
            # Tokens begin with a space: move it from the end of the question to the answer.
            space = " " * text.endswith(" ")
            turns[-1]["value"] += text.rstrip(" ")
            answer = space + answer
            turns += [{"from": "gpt", "value": answer}, {"from": "human", "value": ""}]
        yield {"conversations": turns[:-1]}


def continuations(sources: list[Iterator[str]], rng: FactRng) -> Iterator[dict[str, Any]]:
    """Starts of texts and their continuations."""
    while True:
        source, text = rng.choice(sources), ""
        while len(text) < rng.read + rng.continued:
            text += next(source) + "\n\n"
        turns = [{"from": "human", "value": text[: rng.read]}, {"from": "gpt", "value": text[rng.read :]}]
        yield {"conversations": turns}


def main() -> None:
    """Write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=Path, action="append", required=True)
    parser.add_argument("--documents", type=int, default=200)
    kinds = {"documents": documents, "chats": chats, "plain": plain, "continuations": continuations}
    parser.add_argument("--as", dest="kind", choices=kinds, default="documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", type=int, default=READ, help="characters before a continuation")
    parser.add_argument("--continued", type=int, default=CONTINUED, help="characters of a continuation")
    options = parser.parse_args()
    rng = FactRng(options.seed)
    rng.read, rng.continued = options.read, options.continued
    made = kinds[options.kind](list(map(paragraphs, options.texts)), rng)
    with options.output.open("w", encoding="utf-8") as file:
        for entry in islice(made, options.documents):
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{options.documents} documents in {options.output}\n")


if __name__ == "__main__":
    main()

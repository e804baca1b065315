"""Writes documents of real text with facts hidden in it, and questions about them further on: FoT's warming up.

    python recipes/hidden_facts.py FACTS.jsonl --texts DOCUMENTS [--texts ...] [--documents 200]
    python recipes/hidden_facts.py CHATS.jsonl --texts DOCUMENTS [--texts ...] [--documents 2000] --as chats
    python recipes/hidden_facts.py PLAIN.jsonl --texts DOCUMENTS [--texts ...] [--documents 2000] --as plain
    python recipes/hidden_facts.py TEXT.jsonl --texts DOCUMENTS [--texts ...] [--documents 500] --as continuations

What stands between the facts is the text of one of the DOCUMENTS, in order. A fact is a number, a date, a name, a word
or a sentence that belongs to something or somebody; it is stated in one of several ways and asked for in another, 600
to 6,500 characters further on: most often out of a row of 512 tokens, and within the three rows before it. The passkey
task's own words don't occur.

For instruction tuning: chats ask for the facts of a document through the chat template, plain ones in one of several
forms of plain text, continuations ask for nothing but how a text goes on.
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
APART = (150, 800)  # of facts
DISTANCE = (600, 6_500)  # of a question from its fact
SHORTEST, LONGEST = 80, 1_500  # paragraphs
CHAT_DOCUMENT, CHAT_FACTS, TURNS = (1_200, 8_000), (8, 24), 12
REPEATED = 0.15  # of those documents, a paragraph or two again and again
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

# What stands before a question and before its answer.
FORMS = [("Question: ", "\nAnswer: "), ("Q: ", "\nA: "), ("", "\n"), ("", " "), ("- ", " ")]

# A fact: how it is stated, how it is asked for, the answer, and the answer in a sentence.
Fact = tuple[str, str, str, str]


class Draw(random.Random):
    """Draws.

    Attributes:
        new_names: how often a name is one that nobody has, and a thing a place with a name.
        alike: what all things have in common but their owner; nothing if empty.
        read, continued: characters of a text, and of how it goes on.
    """

    new_names = 0.0
    alike = ""
    read, continued = READ, CONTINUED

    def often(self, share: float) -> bool:
        """True that often; where it is never, nothing is drawn."""
        return share > 0 and self.random() < share

    def new_name(self) -> str:
        """One that nobody has."""
        return capital("".join(self.choices(SYLLABLES, k=self.randint(1, 2))) + self.choice(ENDINGS))

    def owner(self) -> str:
        """Somebody's last name."""
        return self.new_name() if self.often(self.new_names) else self.choice(LAST)


def thing(draw: Draw) -> str:
    """Something that there is only one of in a document."""
    if draw.alike:
        return f"{draw.alike} {draw.owner()}" if draw.alike.startswith("the ") else f"{draw.owner()} {draw.alike}"
    if draw.often(draw.new_names):
        return f"{draw.owner()} {draw.choice(PLACES)}"
    return f"the {draw.choice(KINDS)} {draw.choice(THINGS)} of {draw.owner()}"


def person(draw: Draw) -> str:
    """Somebody; half of them have a name that nobody has."""
    last = draw.choice(LAST) if draw.random() < 0.5 else capital(draw.choice(SYLLABLES) + draw.choice(ENDINGS))
    return f"{draw.choice(FIRST)} {last}"


def number_of(draw: Draw) -> Fact:
    """A number of two to six digits."""
    what, whose, size = draw.choice(NUMBERS), thing(draw), draw.randint(2, 6)
    value = str(draw.randint(10 ** (size - 1), 10**size - 1))
    said = f"The {what} of {whose} is {value}."
    stated = draw.choice([said, f"Note that {value} is the {what} of {whose}.", f"{whose}: {what} {value}."])
    return stated, draw.choice([f"What is the {what} of {whose}?", f"Which {what} has {whose}?"]), value, said


def date_of(draw: Draw) -> Fact:
    """A day."""
    who, value = person(draw), day_of(draw)
    what, asked = draw.choice([("was born", "was {} born"), ("arrived", "did {} arrive"), ("died", "did {} die")])
    said = f"{who} {what} on {value}."
    return draw.choice([said, f"On {value} {who} {what}."]), f"When {asked.format(who)}?", value, said


def name_of(draw: Draw) -> Fact:
    """Somebody who has to do with something."""
    office, whose, value = draw.choice(OFFICES), thing(draw), person(draw)
    said = f"The {office} of {whose} is {value}."
    asked = draw.choice([f"Who is the {office} of {whose}?", f"What is the name of the {office} of {whose}?"])
    return draw.choice([said, f"{value} is the {office} of {whose}."]), asked, value, said


def role_of(draw: Draw) -> Fact:
    """Somebody who was something on some occasion."""
    what, value = f"the {draw.choice(ROLES)} {draw.choice(OCCASIONS)}", person(draw)
    if draw.often(draw.new_names):
        what += f" in {draw.new_name()}"
    verb = draw.choice(["was", "was", "is", "will be"])
    said = f"{what} {verb} {value}."
    asked = draw.choice([f"Who {verb} {what}?", f"Who {verb} {what}?", f"What is the name of {what}?"])
    return draw.choice([said, f"{value} {verb} {what}."]), asked, value, said


def done_by(draw: Draw) -> Fact:
    """Somebody who did something, or whom something was done to."""
    whose, what, value = thing(draw), draw.choice(DONE), person(draw)
    verb, preposition = what.split()
    said = f"{whose} was {what} {value}."
    return said, f"{'Who' if preposition == 'by' else 'Whom'} was {whose} {verb} {preposition}?", value, said


def changed_on(draw: Draw) -> Fact:
    """A day on which something was done to something."""
    whose, what, day = thing(draw), draw.choice(CHANGED), day_of(draw)
    said = f"{whose} was {what} on {day}."
    return draw.choice([said, f"On {day} {whose} was {what}."]), f"When was {whose} {what}?", day, said


def day_of(draw: Draw) -> str:
    """Any day of some centuries."""
    return f"{draw.randint(1, 28)} {draw.choice(MONTHS)} {draw.randint(1700, 2020)}"


def amount_of(draw: Draw) -> Fact:
    """How many there are of something."""
    whose, what, value = thing(draw), draw.choice(AMOUNTS), str(draw.randint(2, 9999))
    said = f"{whose} has {value} {what}."
    return said, f"How many {what} does {whose} have?", value, said


def writing_on(draw: Draw, sentences: list[str]) -> Fact:
    """Words of the texts that are written on something."""
    (what, verb), whose, value = draw.choice(WRITTEN), thing(draw), draw.choice(sentences)
    said = f'The {what} {whose} {verb}: "{value}"'
    return said, f"What does the {what} {whose} say?", value, said


def word_of(draw: Draw) -> Fact:
    """A password of one to three words."""
    whose, value = thing(draw), " ".join(draw.sample(WORDS, draw.randint(1, 3)))
    said = f'The password of {whose} is "{value}".'
    return said, f"What is the password of {whose}?", value, said


def saying_of(draw: Draw, sentences: list[str]) -> Fact:
    """Words of the texts that somebody is made to say."""
    who, value = person(draw), draw.choice(sentences)
    said = f'{who} said: "{value}"'
    return said, f"What did {who} say?", value, said


def fact(draw: Draw, sentences: list[str]) -> Fact:
    """Any of them; numbers are the most frequent."""
    kinds = [number_of, number_of, number_of, date_of, word_of, amount_of]
    quotes = [saying_of, writing_on]
    chosen = draw.choice([*kinds, *quotes, name_of, *[role_of] * 4, done_by])
    stated, asked, value, said = chosen(draw, sentences) if chosen in quotes else chosen(draw)
    return capital(stated), asked, value, capital(said)


def capital(text: str) -> str:
    """Begun with a capital."""
    return text[0].upper() + text[1:]


def asked_about(draw: Draw, facts: list[Fact]) -> str:
    """Questions and answers, all in one of several forms."""
    before, between = draw.choice(FORMS)
    whole = draw.random() < 0.3
    return "\n".join(f"{before}{asked}{between}{said if whole else value}" for _, asked, value, said in facts)


def sayings(text: str) -> list[str]:
    """The first eight words of a paragraph, if it is prose."""
    words = text.split()
    return [" ".join(words[:8])] if len(words) > 20 and text[0].isalpha() else []


def paragraphs(texts: Path) -> Iterator[str]:
    """Paragraphs of all documents of a folder, again and again."""
    while True:
        for path in find_files([texts]):
            for document in read_file(path):
                for block in document.blocks:
                    if len(block.text) > SHORTEST:
                        yield block.text[:LONGEST]


def documents(sources: list[Iterator[str]], draw: Draw) -> Iterator[dict[str, Any]]:
    """Long documents in which each fact is asked for so much further on."""
    while True:
        source = draw.choice(sources)
        parts: list[str] = []
        waiting: list[tuple[int, Fact]] = []  # and from which character on it is asked for
        sentences = [" ".join(draw.sample(WORDS, 5))]
        at = since = 0
        while at < DOCUMENT or waiting:
            text = next(source)
            parts.append(text)
            sentences = (sentences + sayings(text))[-20:]
            at += len(text)
            since += len(text)
            while since > 0 and at < DOCUMENT:
                new = fact(draw, sentences)
                parts.append(new[0])
                waiting.append((at + draw.randint(*DISTANCE), new))
                since -= draw.randint(*APART)
            due = [each for when, each in waiting if when <= at]
            if due:
                waiting = [(when, each) for when, each in waiting if when > at]
                parts.append(asked_about(draw, draw.sample(due, len(due))))
        yield {"text": "\n\n".join(parts)}


def with_facts(sources: list[Iterator[str]], draw: Draw) -> Iterator[tuple[str, list[Fact]]]:
    """Documents with facts in them, and those of them that are asked for."""
    while True:
        source = draw.choice(sources)
        body: list[str] = []
        room = draw.randint(*CHAT_DOCUMENT)
        again = [next(source) for _ in range(draw.randint(1, 2))] if draw.random() < REPEATED else []
        while sum(map(len, body)) < room:
            body += again or [next(source)]
        sentences = [" ".join(draw.sample(WORDS, 5))] + [each for text in body for each in sayings(text)]
        drawn = (fact(draw, sentences) for _ in range(draw.randint(*CHAT_FACTS)))
        facts = list({each[1]: each for each in drawn}.values())  # each question has one answer
        for stated, *_ in facts:
            body.insert(draw.randint(0, len(body)), stated)
        yield "\n\n".join(body), draw.sample(facts, min(len(facts), TURNS))


def chats(sources: list[Iterator[str]], draw: Draw) -> Iterator[dict[str, Any]]:
    """A document with facts in it, and a chat about these."""
    for document, facts in with_facts(sources, draw):
        messages = []
        for _, asked, value, said in facts:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": said if draw.random() < 0.7 else value})
        yield {"document": document, "messages": messages}


def plain(sources: list[Iterator[str]], draw: Draw) -> Iterator[dict[str, Any]]:
    """A document with facts in it, and questions about these in plain text, most of them with the answer begun."""
    for document, facts in with_facts(sources, draw):
        turns = [{"from": "human", "value": document + "\n"}]
        before, between = draw.choice([*FORMS, ("", " ")])
        often = max(draw.random(), draw.random())
        for _, asked, value, said in facts:
            begun = said[: said.rfind(value)] if draw.random() < often else ""
            text = f"\n{before}{asked}{between}{begun}"
            answer = (said if begun else value)[len(begun) :]
            # Tokens begin with a space; so does the answer, then.
            space = " " * text.endswith(" ")
            turns[-1]["value"] += text.rstrip(" ")
            answer = space + answer
            turns += [{"from": "gpt", "value": answer}, {"from": "human", "value": ""}]
        yield {"conversations": turns[:-1]}


def continuations(sources: list[Iterator[str]], draw: Draw) -> Iterator[dict[str, Any]]:
    """The beginning of a text, and how it goes on."""
    while True:
        source, text = draw.choice(sources), ""
        while len(text) < draw.read + draw.continued:
            text += next(source) + "\n\n"
        turns = [{"from": "human", "value": text[: draw.read]}, {"from": "gpt", "value": text[draw.read :]}]
        yield {"conversations": turns}


def main() -> None:
    """Write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--texts", type=Path, action="append", required=True)
    parser.add_argument("--documents", type=int, default=200)
    kinds = {"documents": documents, "chats": chats, "plain": plain, "continuations": continuations}
    parser.add_argument("--as", dest="kind", choices=kinds, default="documents")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", type=int, default=READ, help="characters before a continuation")
    parser.add_argument("--continued", type=int, default=CONTINUED, help="characters of it")
    options = parser.parse_args()
    draw = Draw(options.seed)
    draw.read, draw.continued = options.read, options.continued
    made = kinds[options.kind](list(map(paragraphs, options.texts)), draw)
    with options.output.open("w", encoding="utf-8") as file:
        for entry in islice(made, options.documents):
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
    sys.stdout.write(f"{options.documents} documents in {options.output}\n")


if __name__ == "__main__":
    main()

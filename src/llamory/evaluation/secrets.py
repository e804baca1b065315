"""What a needle may hide: a number, a name, a date or a sentence, drawn by chance, and how much of it an answer has."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any, Literal, get_args

# Numbers are drawn from 1 to this one, as published.
LARGEST_KEY = 49999
Kind = Literal["number", "name", "date", "sentence"]
KINDS: tuple[str, ...] = get_args(Kind)

_FIRST = (
    "Agnes Bernard Celia Dominic Esther Florian Gwen Harald Isobel Jasper Kamila Leopold Miriam Nikolai Ottilie Philip "
    "Quentin Ruth Stefan Theodora Ulrich Vivian Wendell Xenia Yvonne Zachary"
).split()
_LAST = (
    "Abernathy Bellweather Castellan Drummond Eastlake Farnham Galloway Hathersage Innsworth Jarrow Kettering Lockwood "
    "Merriweather Northcote Oakhurst Pemberton Quillfeather Ravenscroft Stanhope Thornbury Underwood Whitlock"
).split()
_MONTHS = ("January February March April May June July August September October November December").split()
_ADJECTIVES = "tired clever gentle nervous famous hungry silent cheerful stubborn curious".split()
_PEOPLE = "gardener violinist surgeon baker plumber senator tailor pilot juggler clerk".split()
_VERBS = "painted borrowed counted repaired buried polished forgot sold carried hid".split()
_COUNTS = "two three four five six seven eight nine eleven twelve".split()
_QUALITIES = "wooden heavy yellow ancient tiny foreign rusty crooked golden dusty".split()
_OBJECTS = "boats ladders teapots umbrellas trumpets carpets barrels kites mirrors wheels".split()


def draw(kind: str, chance: random.Random) -> str:
    """A secret of one of the `KINDS`."""
    return _MAKERS[kind](chance)


def longest(kind: str) -> str:
    """A secret that is as long as any, in characters."""
    return _MAKERS[kind](_Longest())


def score(answer: str, key: str, kind: str = "number") -> tuple[bool, float]:
    """How much of a secret an answer has.

    Of a number the first number in the answer counts, whole, and its digits in their places; of anything else the
    answer's first words, whatever their case and punctuation.

    Returns:
        whether it is the secret, and the share of its digits or words that stand in their places.
    """
    found: str | list[str]
    wanted: str | list[str]
    if kind == "number":
        number = re.search(r"\d+", answer)
        found, wanted = number.group() if number else "", key
        right = found == wanted
    else:
        found, wanted = _words(answer), _words(key)
        right = found[: len(wanted)] == wanted
    return right, sum(a == b for a, b in zip(found, wanted, strict=False)) / len(wanted)


class _Longest(random.Random):
    """Chance that always draws the longest."""

    def choice(self, seq: Any) -> Any:
        return max(seq, key=len)

    def randint(self, a: int, b: int) -> int:  # noqa: ARG002
        return b


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _sentence(chance: random.Random) -> str:
    parts = (_ADJECTIVES, _PEOPLE, _VERBS, _COUNTS, _QUALITIES, _OBJECTS)
    return f"The {' '.join(chance.choice(words) for words in parts)}."


_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "number": lambda chance: str(chance.randint(1, LARGEST_KEY)),
    "name": lambda chance: f"{chance.choice(_FIRST)} {chance.choice(_LAST)}",
    "date": lambda chance: f"{chance.randint(1, 28)} {chance.choice(_MONTHS)} {chance.randint(1500, 1999)}",
    "sentence": _sentence,
}

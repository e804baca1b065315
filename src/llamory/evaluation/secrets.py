"""What a needle may hide: a number, a name, a date or a sentence, drawn by rng, and how much of it an answer has."""

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


def draw_secret(kind: str, rng: random.Random) -> str:
    """A secret of one of the `KINDS`."""
    return _MAKERS[kind](rng)


def longest_secret(kind: str) -> str:
    """A secret that is as long as any, in characters."""
    return _MAKERS[kind](_Longest())


def score_answer(answer: str, key: str, kind: str = "number") -> tuple[bool, float]:
    """How much of a secret an answer has.

    Of a number the first number in the answer counts, whole, and its digits in their places; of anything else the
    answer's first words, whatever their case and punctuation.

    Returns:
        whether it is the secret, and the share of its digits or words that stand in their places.
    """
    found: str | list[str]
    expected: str | list[str]
    if kind == "number":
        number = re.search(r"\d+", answer)
        found, expected = number.group() if number else "", key
        correct = found == expected
    else:
        found, expected = _words(answer), _words(key)
        correct = found[: len(expected)] == expected
    return correct, sum(a == b for a, b in zip(found, expected, strict=False)) / len(expected)


class _Longest(random.Random):
    """Chance that always draws the longest_secret."""

    def choice(self, seq: Any) -> Any:
        return max(seq, key=len)

    def randint(self, a: int, b: int) -> int:  # noqa: ARG002
        return b


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _sentence(rng: random.Random) -> str:
    parts = (_ADJECTIVES, _PEOPLE, _VERBS, _COUNTS, _QUALITIES, _OBJECTS)
    return f"The {' '.join(rng.choice(words) for words in parts)}."


_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.randint(1, LARGEST_KEY)),
    "name": lambda rng: f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
    "date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1500, 1999)}",
    "sentence": _sentence,
}

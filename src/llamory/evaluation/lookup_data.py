"""The dictionary look-up task (Tworkowski et al. 2023, section 4.1): documents of made-up words and their meanings.

The first half of a document defines keys, the second asks for their values. A model whose local context is half a
document must find the definitions in its memory, among those of all other documents that memory holds.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.longllama.configuration import LongLlamaConfig
from llamory.longllama.losses import IGNORE_INDEX

EOS, BOS, DEFINE, VALUE, ASK, ANSWER = range(6)
FIRST_SYMBOL = 6


@dataclass(frozen=True)
class Dictionaries:
    """Keys and values of some documents.

    Attributes:
        keys: (documents, lines, key_length) symbols.
        values: (documents, lines, value_length) symbols.
    """

    keys: Tensor
    values: Tensor

    def first(self, documents: int) -> Dictionaries:
        """The first so many documents."""
        return Dictionaries(self.keys[:documents], self.values[:documents])


@dataclass(frozen=True)
class LookupTask:
    """The shape of the documents; the defaults are the paper's.

    A half is bos, as many lines as fit, and eos up to its end. A line is a mark, a key, a mark and its value.

    Attributes:
        vocabulary: symbols and the six marks.
        key_length: symbols of a key.
        value_length: symbols of a value.
        half: tokens of half a document, which is a row and the local context.

    Raises:
        LlamoryError: there is no room for a line, or no symbol.
    """

    vocabulary: int = 64
    key_length: int = 4
    value_length: int = 4
    half: int = 256

    def __post_init__(self) -> None:
        if self.vocabulary < FIRST_SYMBOL + 2 or min(self.key_length, self.value_length) < 1 or self.lines < 1:
            raise LlamoryError(
                f"A dictionary needs a vocabulary of at least {FIRST_SYMBOL + 2} tokens, keys and values of at least "
                f"one, and rows of at least {self.line + 1}, not {self.vocabulary}, {self.key_length}, "
                f"{self.value_length} and {self.half}."
            )

    @property
    def line(self) -> int:
        """Tokens of a line."""
        return self.key_length + self.value_length + 2

    @property
    def lines(self) -> int:
        """Lines of half a document."""
        return (self.half - 1) // self.line

    @property
    def all_keys(self) -> int:
        """How many different keys there are."""
        return (self.vocabulary - FIRST_SYMBOL) ** self.key_length

    def with_lines(self, lines: int) -> LookupTask:
        """The same with halves of so many lines."""
        return replace(self, half=1 + lines * self.line)

    @cached_property
    def value_columns(self) -> Tensor:
        """(lines × value_length,) columns of a row where values stand."""
        first = 1 + torch.arange(self.lines)[:, None] * self.line + self.key_length + 2
        return (first + torch.arange(self.value_length)).flatten()

    def draw(self, documents: int, generator: torch.Generator) -> Dictionaries:
        """Keys and values at random; two documents may happen to define the same key."""
        return Dictionaries(
            *(
                torch.randint(FIRST_SYMBOL, self.vocabulary, (documents, self.lines, length), generator=generator)
                for length in (self.key_length, self.value_length)
            )
        )

    def draw_confusable(self, documents: int, generator: torch.Generator) -> Dictionaries:
        """Keys of so few symbols that half of all possible ones are defined, each once.

        Among millions of keys each has many that differ in a symbol or two. Here it has as many among hundreds.
        """
        count, symbols = documents * self.lines, 1
        while symbols**self.key_length < 2 * count:
            symbols += 1
        symbols = min(symbols, self.vocabulary - FIRST_SYMBOL)
        if symbols**self.key_length < count:
            raise LlamoryError(f"{count:,} different keys can't be made; take longer keys or fewer documents.")
        used = torch.randperm(self.vocabulary - FIRST_SYMBOL, generator=generator)[:symbols] + FIRST_SYMBOL
        chosen = torch.randperm(symbols**self.key_length, generator=generator)[:count]
        return Dictionaries(self._keys_from_indices(chosen, used), self.draw(documents, generator).values)

    def draw_distinct(self, documents: int, generator: torch.Generator) -> Dictionaries:
        """As `draw`, but no key is defined twice, so that every question has one right answer.

        Of the same generator's state, more documents begin with the same ones as fewer do.

        Raises:
            LlamoryError: there aren't so many keys.
        """
        count = documents * self.lines
        if count > self.all_keys // 2:
            raise LlamoryError(
                f"{documents} documents need {count:,} different keys, but there are only {self.all_keys:,}; take "
                "longer keys or a smaller memory."
            )
        value_generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        drawn = torch.randint(self.all_keys, (2 * count + 64,), generator=generator)
        # The first appearance of each, in the order they were drawn.
        numbers, inverse = drawn.unique(return_inverse=True)
        first = torch.full((len(numbers),), len(drawn)).scatter_reduce_(0, inverse, torch.arange(len(drawn)), "amin")
        chosen = drawn[first.sort().values[:count]]
        keys = self._keys_from_indices(chosen, torch.arange(FIRST_SYMBOL, self.vocabulary))
        shape = (documents, self.lines, self.value_length)
        return Dictionaries(keys, torch.randint(FIRST_SYMBOL, self.vocabulary, shape, generator=value_generator))

    def _keys_from_indices(self, numbers: Tensor, symbols: Tensor) -> Tensor:
        """Keys (documents, lines, key_length) from their numbers, written with these symbols."""
        digit_weights = len(symbols) ** torch.arange(self.key_length)
        return symbols[numbers[:, None] // digit_weights % len(symbols)].view(-1, self.lines, self.key_length)

    def definitions(self, dictionaries: Dictionaries) -> Tensor:
        """(documents, half) token ids of the first halves."""
        return self._half(dictionaries.keys, dictionaries.values, DEFINE, VALUE)

    def questions(self, dictionaries: Dictionaries, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The second halves: every line once more, in another order.

        Returns:
            (documents, half) token ids, and what to predict at each of them: a value's token, or -100.
        """
        order = torch.rand(dictionaries.keys.shape[:2], generator=generator).argsort(1)[..., None]
        keys, values = (
            part.gather(1, order.expand(-1, -1, part.shape[2])) for part in (dictionaries.keys, dictionaries.values)
        )
        rows = self._half(keys, values, ASK, ANSWER)
        targets = torch.full_like(rows, IGNORE_INDEX)
        targets[:, self.value_columns - 1] = rows[:, self.value_columns]
        return rows, targets

    def _half(self, keys: Tensor, values: Tensor, before_key: int, before_value: int) -> Tensor:
        mark = torch.ones_like(keys[..., :1])
        lines = torch.cat([mark * before_key, keys, mark * before_value, values], -1).flatten(1)
        rows = torch.full((len(keys), self.half), EOS)
        rows[:, 0] = BOS
        rows[:, 1 : 1 + lines.shape[1]] = lines
        return rows


CONFIG_KEY = "lookup"


def save_task(config: LongLlamaConfig, task: LookupTask) -> None:
    """Keep the task in a model's configuration, which is saved with it."""
    setattr(config, CONFIG_KEY, asdict(task))


def load_task(config: LongLlamaConfig) -> LookupTask:
    """The task that a model was trained for.

    Raises:
        LlamoryError: none.
    """
    saved = getattr(config, CONFIG_KEY, None)
    if not isinstance(saved, dict):
        raise LlamoryError("This model wasn't trained for dictionary look-up; train one with `llamory train lookup`.")
    return LookupTask(**saved)

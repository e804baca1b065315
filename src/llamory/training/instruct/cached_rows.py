"""Batches for training memory on what was read apart: contexts that many questions share, and the questions."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llamory.errors import LlamoryError
from llamory.longllama.losses import IGNORED
from llamory.training.fot.batches import between
from llamory.training.instruct.rows import InstructBatches, MemorySplit


@dataclass(frozen=True)
class Asked:
    """A row that predicts something.

    Attributes:
        ids: its tokens.
        targets: what each of them should predict, -100 where nothing is asked for.
        sees: how many of its document's rows, the first ones, are in its memory.
    """

    ids: Sequence[int]
    targets: Sequence[int]
    sees: int


@dataclass(frozen=True)
class Mounted:
    """A document's rows, each read by itself, and what is asked with them in memory."""

    rows: Sequence[Sequence[int]]
    asked: Sequence[Asked]
    source: str = ""


def mount(examples: Sequence[Mapping[str, Any]], split: MemorySplit, chance: random.Random) -> Mounted:
    """Make rows of a document's examples.

    Where examples ask about a document, it is in memory, in rows as `read` makes them, and each chat or question is a
    row of its own. Any other example is cut by `split`; each of its rows that has answers is asked with those before
    it in memory.

    Args:
        examples: all of one document, or a single one.
        split: how others are cut; `row_length` and the length of the last row hold for all.
        chance: draws the cut.
    """
    first = examples[0]
    document, source = first["document"], first.get("source", "")
    if document:
        ids, step = first["input_ids"][:document], split.row_length
        rows = [ids[start : start + step] for start in range(0, document, step)]
        asked = [
            Asked(
                each["input_ids"][document:][: split.last_context_length],
                [*each["labels"][document + 1 :], IGNORED][: split.last_context_length],
                len(rows),
            )
            for each in examples
        ]
        return Mounted(rows, [each for each in asked if _asks(each.targets)], source)
    following = [*first["labels"][1:], IGNORED]
    cut = split.cut(len(first["input_ids"]), chance)
    asked = [
        Asked(first["input_ids"][start:stop], following[start:stop], number)
        for number, (start, stop) in enumerate(cut)
        if _asks(following[start:stop])
    ]
    rows = [first["input_ids"][start:stop] for start, stop in cut]
    return Mounted(rows[: max((each.sees for each in asked), default=0)], asked, source)


def _asks(targets: Sequence[int]) -> bool:
    return any(target != IGNORED for target in targets)


def collate_mounted(
    documents: Sequence[Mounted],
    pad_token_id: int | None,
    *,
    most_asked: int,
    negatives: int = 0,
    copies: tuple[float, float] = (1, 1),
    chance: random.Random,
) -> dict[str, Any]:
    """Make one batch, padded on the right.

    Args:
        documents: their rows and what is asked.
        pad_token_id: fills up rows.
        most_asked: tokens, with padding, of the rows that are asked; which ones is drawn. One is asked at least.
        negatives: rows of other documents that are in memory as well, where there are so many.
        copies: how many of its kind each of these counts as in the softmax, the least and the most; each document draws
            one number, evenly on a logarithmic scale.
        chance: draws all that is drawn.

    Returns:
        `context_ids`: (rows, longest) what is in memory; `context_lengths`: real tokens of each. `input_ids`,
        `attention_mask`, `shift_labels`: (asked rows, longest); `contexts`: per asked row, what it sees of the first;
        `context_weights`, with copies: what each of these counts as; `sources`: per document, where it is from.
    """
    rows = [torch.as_tensor(row, dtype=torch.long) for each in documents for row in each.rows]
    owners = [number for number, each in enumerate(documents) for _ in each.rows]
    chosen = _within(documents, most_asked, chance)
    asked: list[Asked] = []
    contexts: list[list[int]] = []
    weights: list[list[float]] = []
    for number, document in enumerate(documents):
        first = owners.index(number) if document.rows else 0
        others = [at for at, owner in enumerate(owners) if owner != number]
        seen = sorted(chance.sample(others, min(negatives, len(others))))
        weight = between(copies, chance.random())
        for place, each in enumerate(document.asked):
            if (number, place) in chosen:
                asked.append(each)
                contexts.append([*range(first, first + each.sees), *seen])
                weights.append([1.0] * each.sees + [weight] * len(seen))
    ids = [torch.as_tensor(each.ids, dtype=torch.long) for each in asked]
    targets = [torch.as_tensor(each.targets, dtype=torch.long) for each in asked]
    return {
        "context_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id or 0),
        "context_lengths": list(map(len, rows)),
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "shift_labels": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        "contexts": contexts,
        **({"context_weights": weights} if copies != (1, 1) else {}),
        "sources": [each.source for each in documents],
    }


def _within(documents: Sequence[Mounted], most: int, chance: random.Random) -> set[tuple[int, int]]:
    """Document and place of the rows that are asked."""
    all_rows = [(number, place) for number, each in enumerate(documents) for place in range(len(each.asked))]
    chance.shuffle(all_rows)
    chosen: set[tuple[int, int]] = set()
    longest = 0
    for number, place in all_rows:
        longest = max(longest, len(documents[number].asked[place].ids))
        if chosen and (len(chosen) + 1) * longest > most:
            break
        chosen.add((number, place))
    return chosen


class Documents(Sequence[list[dict[str, Any]]]):
    """The examples of a dataset, those that ask about one document together."""

    def __init__(self, examples: Any) -> None:
        self.examples, self._starts = examples, [0]
        keys = zip(examples["document"], examples["source"], strict=True)
        for about, group in groupby(keys, lambda key: key[1] if key[0] else ""):
            first, count = self._starts[-1], len(list(group))
            # Examples of no document stand alone.
            self._starts += [first + count] if about else range(first + 1, first + count + 1)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: Any) -> Any:
        start, stop = self._starts[number], self._starts[number + 1]
        return [self.examples[at] for at in range(start, stop)]


class MountedBatches(InstructBatches):
    """Endless batches as of `collate_mounted`, each of one dataset's documents, of at most `rows` rows in memory.

    Args:
        datasets, proportions, split, rows, negatives, copies: as for `InstructBatches`, but that a dataset's proportion
            is its share in the batches.
        most_asked: tokens of the rows that are asked, with padding.
        more: as there.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        proportions: Sequence[float],
        split: MemorySplit,
        *,
        most_asked: int,
        **more: Any,
    ) -> None:
        if most_asked < 1:
            raise LlamoryError(f"The rows that are asked need at least 1 token, not {most_asked}.")
        super().__init__([Documents(each) for each in datasets], proportions, split, **more)
        self.most_asked = most_asked

    def __next__(self) -> dict[str, Any]:
        """The next batch; see `collate_mounted`."""
        chance = random.Random(f"{self.seed}/{self.stream}/{sum(self._drawn)}/batch")
        source = chance.choices(range(len(self.datasets)), self.proportions)[0]
        documents: list[Mounted] = []
        room = self.rows
        while True:
            document = mount(self._draw(source), self.split, chance)
            room -= len(document.rows)
            if documents and room < 0:
                break
            documents.append(document)
            self._drawn[source] += 1
        copies = self.copies[0], between(self.copies, self.grown)
        settings: dict[str, Any] = {"most_asked": self.most_asked, "negatives": self.negatives, "copies": copies}
        return collate_mounted(documents, self.pad_token_id, **settings, chance=chance)

    def _draw(self, source: int) -> list[dict[str, Any]]:
        dataset = self.datasets[source]
        epoch, place = divmod(self._drawn[source] * self.streams + self.stream, len(dataset))
        examples: list[dict[str, Any]] = dataset[int(self._order(source, epoch)[place])]
        return examples

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"most_asked": self.most_asked}

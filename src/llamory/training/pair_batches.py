"""Batches of a retriever's training data: which documents go with a query, and which queries go together."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any

from torch.utils.data import BatchSampler, Dataset

from llamory.errors import LlamoryError
from llamory.training.pairs import Example, Pairs

QUERY, POSITIVE, SCORES = "anchor", "positive", "scores"
# How many queries are looked through for one batch, in batches: data in which nearly all queries share their positives
# would otherwise be looked through whole for each.
_LOOKED_THROUGH = 64
# Draws for each document that a query without negatives gets, as some answer it.
_TRIES = 20
# How often an epoch's queries are shuffled anew until there are as many batches as in the first epoch.
_PASSES = 10


def negative_columns(group_size: int) -> list[str]:
    """Names of the columns that hold a query's negatives."""
    return [f"negative_{i}" for i in range(1, group_size)]


class DrawnGroups(Dataset[dict[str, Any]]):
    """Groups of one query, one of its positives and `group_size - 1` negatives, drawn anew in each epoch.

    Number `epoch * len(pairs) + i` is example `i` as drawn in that epoch, the same at every call, in every process.
    """

    def __init__(self, pairs: Pairs, group_size: int, seed: int, *, scored: bool = False) -> None:
        """Set how groups are drawn.

        Args:
            pairs: the data.
            group_size: documents per query. A query with too few negatives gets its own again, as in the published
                code; one without any gets those of other queries.
            seed: of all draws.
            scored: give teacher's scores too.
        """
        self.pairs, self.group_size, self.seed, self.scored = pairs, group_size, seed, scored

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The group's columns: `anchor`, `positive`, `negative_1` and so on, and maybe `scores`."""
        epoch, index = divmod(number, len(self.pairs))
        example = self.pairs.examples[index]
        chance = random.Random(f"{self.seed} {epoch} {index}")
        positive = chance.randrange(len(example.positives))
        negatives, scores = self._negatives(example, chance)
        group: dict[str, Any] = {QUERY: example.query, POSITIVE: example.positives[positive]}
        group |= zip(negative_columns(self.group_size), negatives, strict=True)
        if self.scored:
            assert example.positive_scores is not None
            group[SCORES] = [example.positive_scores[positive], *scores]
        return group

    def documents(self, number: int) -> list[str]:
        """The documents of a group."""
        group = self[number]
        return [group[POSITIVE], *(group[name] for name in negative_columns(self.group_size))]

    def _negatives(self, example: Example, chance: random.Random) -> tuple[list[str], list[float]]:
        wanted, own = self.group_size - 1, range(len(example.negatives))
        if wanted and not own:
            return self._others(example, wanted, chance), []
        chosen: list[int] = []
        while len(chosen) < wanted:
            chosen += chance.sample(own, min(wanted - len(chosen), len(own)))
        scores = example.negative_scores if self.scored else None
        return [example.negatives[i] for i in chosen], [] if scores is None else [scores[i] for i in chosen]

    def _others(self, example: Example, wanted: int, chance: random.Random) -> list[str]:
        """Negatives of other queries that aren't known to answer this one, different ones if there are enough.

        Raises:
            LlamoryError: there is none.
        """
        unfit, documents = self.pairs.answers[example.query] | {example.query}, self.pairs.negatives
        tried = (documents[chance.randrange(len(documents))] for _ in range(_TRIES * wanted))
        found = list(dict.fromkeys(text for text in tried if text not in unfit))
        fit = found or [text for text in documents if text not in unfit]
        if not fit:
            raise LlamoryError(
                f"{example.place}: the query has no negatives, and all those of other queries answer it; add a `neg`."
            )
        while len(found) < wanted:
            found.append(chance.choice(fit))
        return found[:wanted]


class NoFalseNegatives(BatchSampler):
    """Batches in which no document is another query's positive, or its very text; the Trainer's steps are made of them.

    Every document of a batch is a negative of every query that it wasn't drawn for. So two queries go together only if
    no document of the one is a positive of the other, in all the data; queries that can't wait for a later batch. With
    several processes that share their documents, this holds for all of their batches of a step together.
    """

    def __init__(self, groups: DrawnGroups, batch_size: int, *, process: int = 0, processes: int = 1) -> None:
        """Set the batches' size.

        Args:
            groups: what batches are made of.
            batch_size: queries in one process's batch; smaller where so many don't go together.
            process: whose batches these are.
            processes: how many share a step.
        """
        self.groups, self.batch_size, self.drop_last = groups, batch_size, False
        self.process, self.processes, self.epoch = process, processes, 0
        self._length = len(list(self._pass(random.Random(f"{groups.seed} 0"), 0)))

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch comes next; the Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches of the epoch: as many in each, if it can be."""
        chance = random.Random(f"{self.groups.seed} {self.epoch}")
        passes = (self._pass(chance, self.epoch) for _ in range(_PASSES))
        for batch in islice(chain.from_iterable(passes), self._length):
            yield batch[self.process :: self.processes]

    def _pass(self, chance: random.Random, epoch: int) -> Iterator[list[int]]:
        """Batches for all processes together, until no query is left."""
        count = len(self.groups)
        numbers = list(range(epoch * count, (epoch + 1) * count))
        chance.shuffle(numbers)
        waiting = deque(numbers)
        fewest = self.processes if self.groups.group_size > 1 else max(2, self.processes)
        while waiting:
            batch = self._take(waiting, self.batch_size * self.processes)
            even = len(batch) - len(batch) % self.processes
            # A lone query without negatives has nothing to be told apart from.
            if even >= fewest:
                yield batch[:even]

    def _take(self, waiting: deque[int], full: int) -> list[int]:
        """The next batch; those that don't go with it wait on, in their order."""
        batch: list[int] = []
        left: list[int] = []
        documents: set[str] = set()
        unfit: set[str] = set()
        while waiting and len(batch) < full and len(left) < _LOOKED_THROUGH * full:
            number = waiting.popleft()
            own = self.groups.documents(number)
            example = self.groups.pairs.examples[number % len(self.groups)]
            answers = self.groups.pairs.answers[example.query]
            if unfit.isdisjoint(own) and documents.isdisjoint(answers) and example.query not in documents:
                batch.append(number)
                documents.update(own)
                unfit.update(answers)
                unfit.add(example.query)
            else:
                left.append(number)
        waiting.extendleft(reversed(left))
        return batch

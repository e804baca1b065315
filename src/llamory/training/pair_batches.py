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
_MAX_LOOKAHEAD_BATCHES = 64
# Draws for each document that a query without negatives gets, as some answer it.
_DRAWS_PER_NEGATIVE = 20
# How often an epoch's queries are shuffled anew until there are as many batches as in the first epoch.
_MAX_RESHUFFLES = 10


def negative_columns(group_size: int) -> list[str]:
    """Names of the columns that hold a query's negatives."""
    return [f"negative_{i}" for i in range(1, group_size)]


class GroupDataset(Dataset[dict[str, Any]]):
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
        rng = random.Random(f"{self.seed} {epoch} {index}")
        positive = rng.randrange(len(example.positives))
        negatives, scores = self._negatives(example, rng)
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

    def _negatives(self, example: Example, rng: random.Random) -> tuple[list[str], list[float]]:
        wanted, own = self.group_size - 1, range(len(example.negatives))
        if wanted and not own:
            return self._sample_other_negatives(example, wanted, rng), []
        chosen: list[int] = []
        while len(chosen) < wanted:
            chosen += rng.sample(own, min(wanted - len(chosen), len(own)))
        scores = example.negative_scores if self.scored else None
        return [example.negatives[i] for i in chosen], [] if scores is None else [scores[i] for i in chosen]

    def _sample_other_negatives(self, example: Example, wanted: int, rng: random.Random) -> list[str]:
        """Negatives of other queries that aren't known to answer this one, different ones if there are enough.

        Raises:
            LlamoryError: there is none.
        """
        excluded, documents = self.pairs.answers[example.query] | {example.query}, self.pairs.negatives
        sampled = (documents[rng.randrange(len(documents))] for _ in range(_DRAWS_PER_NEGATIVE * wanted))
        found = list(dict.fromkeys(text for text in sampled if text not in excluded))
        candidates = found or [text for text in documents if text not in excluded]
        if not candidates:
            raise LlamoryError(
                f"{example.location}: the query has no negatives, and all those of other queries answer it; add a `neg`."
            )
        while len(found) < wanted:
            found.append(rng.choice(candidates))
        return found[:wanted]


class FalseNegativeFreeSampler(BatchSampler):
    """Batches in which no document is another query's positive, or its very text; the Trainer's steps are made of them.

    Every document of a batch is a negative of every query that it wasn't drawn for. So two queries go together only if
    no document of the one is a positive of the other, in all the data; queries that can't wait for a later batch. With
    several processes that share their documents, this holds for all of their batches of a step together.
    """

    def __init__(self, groups: GroupDataset, batch_size: int, *, process: int = 0, processes: int = 1) -> None:
        """Set the batches' size.

        Args:
            groups: what batches are made of.
            batch_size: queries in one process's batch; smaller where so many don't go together.
            process: whose batches these are.
            processes: how many share a step.
        """
        self.groups, self.batch_size, self.drop_last = groups, batch_size, False
        self.process, self.processes, self.epoch = process, processes, 0
        self._length = len(list(self._epoch_batches(random.Random(f"{groups.seed} 0"), 0)))

    def __len__(self) -> int:
        return self._length

    def set_epoch(self, epoch: int) -> None:
        """Tell which epoch comes next; the Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches of the epoch: as many in each, if it can be."""
        rng = random.Random(f"{self.groups.seed} {self.epoch}")
        passes = (self._epoch_batches(rng, self.epoch) for _ in range(_MAX_RESHUFFLES))
        for batch in islice(chain.from_iterable(passes), self._length):
            yield batch[self.process :: self.processes]

    def _epoch_batches(self, rng: random.Random, epoch: int) -> Iterator[list[int]]:
        """Batches for all processes together, until no query is deferred."""
        count = len(self.groups)
        numbers = list(range(epoch * count, (epoch + 1) * count))
        rng.shuffle(numbers)
        queue = deque(numbers)
        min_size = self.processes if self.groups.group_size > 1 else max(2, self.processes)
        while queue:
            batch = self._next_batch(queue, self.batch_size * self.processes)
            divisible = len(batch) - len(batch) % self.processes
            # A lone query without negatives has nothing to be told apart from.
            if divisible >= min_size:
                yield batch[:divisible]

    def _next_batch(self, queue: deque[int], max_size: int) -> list[int]:
        """The next batch; those that don't go with it wait on, in their order."""
        batch: list[int] = []
        deferred: list[int] = []
        documents: set[str] = set()
        excluded: set[str] = set()
        while queue and len(batch) < max_size and len(deferred) < _MAX_LOOKAHEAD_BATCHES * max_size:
            number = queue.popleft()
            own = self.groups.documents(number)
            example = self.groups.pairs.examples[number % len(self.groups)]
            answers = self.groups.pairs.answers[example.query]
            if excluded.isdisjoint(own) and documents.isdisjoint(answers) and example.query not in documents:
                batch.append(number)
                documents.update(own)
                excluded.update(answers)
                excluded.add(example.query)
            else:
                deferred.append(number)
        queue.extendleft(reversed(deferred))
        return batch

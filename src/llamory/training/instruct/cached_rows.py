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
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.fot.batches import log_interpolate
from llamory.training.instruct.rows import InstructBatches, MemorySplit


@dataclass(frozen=True)
class Query:
    """A row that predicts something.

    Attributes:
        ids: its tokens.
        targets: what each of them should predict, -100 where nothing is queries for.
        num_visible_rows: how many of its document's rows, the first ones, are in its memory.
    """

    ids: Sequence[int]
    targets: Sequence[int]
    num_visible_rows: int


@dataclass(frozen=True)
class Context:
    """A document's rows, each read by itself, and what is queries with them in memory."""

    rows: Sequence[Sequence[int]]
    queries: Sequence[Query]
    source: str = ""


def build_context(examples: Sequence[Mapping[str, Any]], split: MemorySplit, rng: random.Random) -> Context:
    """Make rows of a document's examples.

    Where examples ask about a document, it is in memory, in rows as `read` makes them, and each chat or question is a
    row of its own. Any other example is cut by `split`; each of its rows that has answers is queries with those before
    it in memory.

    Args:
        examples: all of one document, or a single one.
        split: how others are cut; `row_length` and the length of the last row hold for all.
        rng: draws the cut.
    """
    first = examples[0]
    document, source = first["document"], first.get("source", "")
    if document:
        ids, step = first["input_ids"][:document], split.row_length
        rows = [ids[start : start + step] for start in range(0, document, step)]
        queries = [
            Query(
                each["input_ids"][document:][: split.last_context_length],
                [*each["labels"][document + 1 :], IGNORE_INDEX][: split.last_context_length],
                len(rows),
            )
            for each in examples
        ]
        return Context(rows, [each for each in queries if _has_targets(each.targets)], source)
    next_labels = [*first["labels"][1:], IGNORE_INDEX]
    cut = split.split_rows(len(first["input_ids"]), rng)
    queries = [
        Query(first["input_ids"][start:stop], next_labels[start:stop], number)
        for number, (start, stop) in enumerate(cut)
        if _has_targets(next_labels[start:stop])
    ]
    rows = [first["input_ids"][start:stop] for start, stop in cut]
    return Context(rows[: max((each.num_visible_rows for each in queries), default=0)], queries, source)


def _has_targets(targets: Sequence[int]) -> bool:
    return any(target != IGNORE_INDEX for target in targets)


def collate_frozen_contexts(
    documents: Sequence[Context],
    pad_token_id: int | None,
    *,
    query_token_budget: int,
    negatives: int = 0,
    negative_weight: tuple[float, float] = (1, 1),
    rng: random.Random,
) -> dict[str, Any]:
    """Make one batch, padded on the right.

    Args:
        documents: their rows and what is queries.
        pad_token_id: fills up rows.
        query_token_budget: tokens, with padding, of the rows that are queries; which ones is drawn. One is queries at least.
        negatives: rows of other documents that are in memory as well, where there are so many.
        negative_weight: how many of its kind each of these counts as in the softmax, the least and the most; each document draws
            one number, evenly on a logarithmic scale.
        rng: draws all that is drawn.

    Returns:
        `context_ids`: (rows, longest) what is in memory; `context_lengths`: real tokens of each. `input_ids`,
        `attention_mask`, `shift_labels`: (queries rows, longest); `contexts`: per queries row, what it num_visible_rows of the first;
        `context_weights`, with negative_weight: what each of these counts as; `sources`: per document, where it is from.
    """
    rows = [torch.as_tensor(row, dtype=torch.long) for each in documents for row in each.rows]
    document_indices = [number for number, each in enumerate(documents) for _ in each.rows]
    chosen = _sample_queries(documents, query_token_budget, rng)
    queries: list[Query] = []
    contexts: list[list[int]] = []
    weights: list[list[float]] = []
    for number, document in enumerate(documents):
        first = document_indices.index(number) if document.rows else 0
        others = [at for at, document_index in enumerate(document_indices) if document_index != number]
        seen = sorted(rng.sample(others, min(negatives, len(others))))
        weight = log_interpolate(negative_weight, rng.random())
        for index, each in enumerate(document.queries):
            if (number, index) in chosen:
                queries.append(each)
                contexts.append([*range(first, first + each.num_visible_rows), *seen])
                weights.append([1.0] * each.num_visible_rows + [weight] * len(seen))
    ids = [torch.as_tensor(each.ids, dtype=torch.long) for each in queries]
    targets = [torch.as_tensor(each.targets, dtype=torch.long) for each in queries]
    return {
        "context_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id or 0),
        "context_lengths": list(map(len, rows)),
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "shift_labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
        "contexts": contexts,
        **({"context_weights": weights} if negative_weight != (1, 1) else {}),
        "sources": [each.source for each in documents],
    }


def _sample_queries(documents: Sequence[Context], token_budget: int, rng: random.Random) -> set[tuple[int, int]]:
    """Document and index of the rows that are queries."""
    all_rows = [(number, index) for number, each in enumerate(documents) for index in range(len(each.queries))]
    rng.shuffle(all_rows)
    chosen: set[tuple[int, int]] = set()
    longest = 0
    for number, index in all_rows:
        longest = max(longest, len(documents[number].queries[index].ids))
        if chosen and (len(chosen) + 1) * longest > token_budget:
            break
        chosen.add((number, index))
    return chosen


class DocumentExamples(Sequence[list[dict[str, Any]]]):
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


class FrozenContextBatches(InstructBatches):
    """Endless batches as of `collate_frozen_contexts`, each of one dataset's documents, of at most `rows` rows in memory.

    Args:
        datasets, proportions, split, rows, negatives, negative_weight: as for `InstructBatches`, but that a dataset's proportion
            is its share in the batches.
        query_token_budget: tokens of the rows that are queries, with padding.
        more: as there.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        proportions: Sequence[float],
        split: MemorySplit,
        *,
        query_token_budget: int,
        **more: Any,
    ) -> None:
        if query_token_budget < 1:
            raise LlamoryError(f"The rows that are queries need at least 1 token, not {query_token_budget}.")
        super().__init__([DocumentExamples(each) for each in datasets], proportions, split, **more)
        self.query_token_budget = query_token_budget

    def __next__(self) -> dict[str, Any]:
        """The next batch; see `collate_frozen_contexts`."""
        rng = random.Random(f"{self.seed}/{self.stream}/{sum(self._num_drawn)}/batch")
        source = rng.choices(range(len(self.datasets)), self.proportions)[0]
        documents: list[Context] = []
        remaining_rows = self.rows
        while True:
            document = build_context(self._draw(source), self.split, rng)
            remaining_rows -= len(document.rows)
            if documents and remaining_rows < 0:
                break
            documents.append(document)
            self._num_drawn[source] += 1
        negative_weight = self.negative_weight[0], log_interpolate(self.negative_weight, self.negative_weight_progress)
        settings: dict[str, Any] = {
            "query_token_budget": self.query_token_budget,
            "negatives": self.negatives,
            "negative_weight": negative_weight,
        }
        return collate_frozen_contexts(documents, self.pad_token_id, **settings, rng=rng)

    def _draw(self, source: int) -> list[dict[str, Any]]:
        dataset = self.datasets[source]
        epoch, index = divmod(self._num_drawn[source] * self.streams + self.stream, len(dataset))
        examples: list[dict[str, Any]] = dataset[int(self._order(source, epoch)[index])]
        return examples

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"query_token_budget": self.query_token_budget}

"""Which rows look at which in one call of cross-batch attention, so that few calls do the work."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.longllama.flash_backward import AttentionPart

Contexts = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]]


@dataclass(frozen=True)
class _RowGroup:
    """Consecutive rows that look at others.

    Attributes:
        rows: the rows that look.
        seen: the rows that are looked at.
        length: how many of their tokens are real; None for all.
        weight: how many of their kind they count as.
    """

    rows: slice
    seen: Any
    length: int | None
    weight: float = 1.0

    @property
    def log_weight(self) -> float:
        """What the weight adds to scores."""
        return math.log(self.weight)


@dataclass(frozen=True)
class ContiguousGroup(_RowGroup):
    """Consecutive rows that see as many consecutive rows, one each: `seen` is a slice."""

    seen: slice

    def part(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionPart:
        """The queries, keys and values of it, out of all."""
        return AttentionPart(
            self.select(query), key[self.seen, :, : self.length], value[self.seen, :, : self.length], causal=False
        )

    def select(self, tensor: Tensor) -> Tensor:
        """A query-like tensor's rows, as they are in `part`."""
        return tensor[self.rows]

    def ungroup(self, tensor: Tensor) -> Tensor:
        """What is shaped as in `part`, as rows."""
        return tensor

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add the gradient of the part's keys or values to that of all."""
        total[self.seen, :, : self.length] += grad


@dataclass(frozen=True)
class SharedContextGroup(_RowGroup):
    """Consecutive rows that all see the same rows, as one long row that sees one long row: `seen` are numbers."""

    seen: tuple[int, ...]

    def part(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionPart:
        """The queries, keys and values of it, out of all."""
        key, value = (_concat_rows(tensor[list(self.seen), :, : self.length]) for tensor in (key, value))
        return AttentionPart(self.select(query), key, value, causal=False)

    def select(self, tensor: Tensor) -> Tensor:
        """A query-like tensor's rows, as they are in `part`."""
        return _concat_rows(tensor[self.rows])

    def ungroup(self, tensor: Tensor) -> Tensor:
        """What is shaped as in `part`, as rows."""
        return _split_rows(tensor, self.rows.stop - self.rows.start)

    def add(self, total: Tensor, grad: Tensor) -> None:
        """Add the gradient of the part's keys or values to that of all."""
        at = torch.tensor(self.seen, device=total.device)
        total[:, :, : self.length].index_add_(0, at, _split_rows(grad, len(self.seen)))


def _concat_rows(tensor: Tensor) -> Tensor:
    """(rows, heads, width, …) as (1, heads, rows * width, …)."""
    return tensor.transpose(0, 1).flatten(1, 2)[None]


def _split_rows(tensor: Tensor, rows: int) -> Tensor:
    """(1, heads, rows * width, …) as (rows, heads, width, …)."""
    return tensor[0].unflatten(1, (rows, -1)).transpose(0, 1)


def plan_contexts(
    contexts: Contexts,
    batch: int,
    lengths: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    weights: Weights | None = None,
) -> list[ContiguousGroup]:
    """Put pairs of a row and a row it sees together where both go on in step, so that few calls do the work.

    Raises:
        LlamoryError: not one list per row, a row that isn't there, that sees itself, or that is named twice, or
            weights that aren't one positive number for each context.
    """
    numbers = range(batch) if rows is None else rows
    weights = _check_contexts(contexts, numbers, batch, lengths, weights)
    buckets: dict[tuple[int, float], list[int]] = defaultdict(list)
    for at, seen in enumerate(contexts):
        for other, weight in zip(seen, weights[at], strict=True):
            buckets[at - other, weight].append(at)
    groups = []
    for (distance, weight), query_rows in sorted(buckets.items()):
        start = 0
        for at in range(1, len(query_rows) + 1):
            length = None if lengths is None else lengths[query_rows[start] - distance]
            continues = at < len(query_rows) and query_rows[at] == query_rows[at - 1] + 1
            if continues and (lengths is None or lengths[query_rows[at] - distance] == length):
                continue
            first, last = query_rows[start], query_rows[at - 1] + 1
            if length != 0:
                groups.append(
                    ContiguousGroup(slice(first, last), slice(first - distance, last - distance), length, weight)
                )
            start = at
    return groups


def plan_frozen_contexts(
    contexts: Contexts,
    rows: int,
    context_rows: int,
    lengths: Sequence[int] | None = None,
    weights: Weights | None = None,
) -> list[SharedContextGroup]:
    """Put rows together that see the same rows, none of which is one of them.

    Args:
        contexts: per row, the rows context_rows the batch that it sees.
        rows: of the batch.
        context_rows: rows that can be seen.
        lengths: real tokens of these.
        weights: as for `plan_contexts`.

    Raises:
        LlamoryError: as for `plan_contexts`.
    """
    weights = _check_contexts(contexts, range(context_rows, context_rows + rows), context_rows, lengths, weights)
    groups, start = [], 0
    for at in range(1, rows + 1):
        if at < rows and list(contexts[at]) == list(contexts[start]) and list(weights[at]) == list(weights[start]):
            continue
        buckets: dict[tuple[int | None, float], list[int]] = defaultdict(list)
        for other, weight in zip(contexts[start], weights[start], strict=True):
            buckets[None if lengths is None else lengths[other], weight].append(other)
        for (length, weight), seen in buckets.items():
            if length != 0:
                groups.append(SharedContextGroup(slice(start, at), tuple(seen), length, weight))
        start = at
    return groups


def _check_contexts(
    contexts: Contexts, numbers: Sequence[int], seen_rows: int, lengths: Sequence[int] | None, weights: Weights | None
) -> Weights:
    """The weights, if all fits."""
    if len(contexts) != len(numbers):
        raise LlamoryError(f"There are {len(numbers)} rows, but contexts for {len(contexts)}.")
    if lengths is not None and len(lengths) != seen_rows:
        raise LlamoryError(f"There are {seen_rows} rows, but lengths of {len(lengths)}.")
    weights = [[1.0] * len(seen) for seen in contexts] if weights is None else weights
    if [len(each) for each in weights] != [len(seen) for seen in contexts] or any(
        not 0 < weight < math.inf for each in weights for weight in each
    ):
        raise LlamoryError("Each context a row sees needs a weight, a number above 0; give as many as there are.")
    for number, seen in zip(numbers, contexts, strict=True):
        for other in seen:
            if not 0 <= other < seen_rows or other == number:
                raise LlamoryError(f"Row {number} can't see row {other}: other rows are meant, 0 to {seen_rows - 1}.")
        if len(set(seen)) != len(seen):
            raise LlamoryError(f"Row {number} names a row twice: {list(seen)}.")
    return weights

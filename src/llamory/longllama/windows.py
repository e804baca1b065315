"""How a prompt is cut: windows that go into memory one by one, and a last one that stays in the local context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One pass through the layers: some rows' next real tokens.

    Attributes:
        rows: indices of the batch's rows that take part.
        starts: per row, the first of its real tokens in this step.
        stops: per row, behind the last one.
        stays: whether the tokens stay in the local context (else they go into memory).
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    stays: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens per row."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @property
    def is_even(self) -> bool:
        """Whether all rows have as many tokens."""
        return len(set(self.lengths)) == 1


def cut_prompt(lengths: Sequence[int], context: int, last: int, stays: bool) -> list[Step]:
    """Cut the rows of a new prompt into windows (the paper's section 3; `last_context_length` in the published code).

    All but the last `last` tokens are cut into windows of `context` tokens, which go into memory; then comes the last
    window. Rows are cut each by its own length, so what a row sees doesn't depend on the rest of the batch.

    Args:
        lengths: real tokens per row; rows without any take no part.
        context: the length of a window.
        last: the length of the last window.
        stays: whether the last window stays in the local context.
    """
    ahead = [max(length - last, 0) for length in lengths]
    steps = [
        _step([(row, start, min(start + context, end)) for row, end in enumerate(ahead) if start < end], stays=False)
        for start in range(0, max(ahead, default=0), context)
    ]
    final = [(row, start, length) for row, (start, length) in enumerate(zip(ahead, lengths, strict=True)) if length]
    return [*steps, _step(final, stays)] if final else steps


def cut_continuation(lengths: Sequence[int], chunk: int) -> list[Step]:
    """Cut what follows on a local context into chunks; all of them stay."""
    return [
        _step(
            [(row, start, min(start + chunk, length)) for row, length in enumerate(lengths) if start < length],
            stays=True,
        )
        for start in range(0, max(lengths, default=0), chunk)
    ]


def _step(parts: list[tuple[int, int, int]], stays: bool) -> Step:
    rows, starts, stops = zip(*parts, strict=True)
    return Step(rows, starts, stops, stays)


class RealTokens:
    """Where the real tokens of a padded batch stand.

    Args:
        attention_mask: (batch, length), not 0 at real tokens; None where all are real.
        batch: rows.
        length: columns.
    """

    def __init__(self, attention_mask: Tensor | None, batch: int, length: int):
        self.columns: list[Tensor] | None = None
        self.lengths = [length] * batch
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            self.columns = [row.nonzero().flatten() for row in attention_mask != 0]
            self.lengths = [len(columns) for columns in self.columns]

    def gather(self, step: Step, batch: Tensor) -> Tensor:
        """A step's part of (batch, length, ...), (rows, width, ...); short rows are filled up behind with zeros."""
        if self.columns is None and step.is_even and len(step.rows) == len(batch):
            return batch[:, step.starts[0] : step.stops[0]]
        part = batch.new_zeros((len(step.rows), step.width, *batch.shape[2:]))
        for target, row, columns in self._rows(step, batch.device):
            part[target, : len(columns)] = batch[row, columns]
        return part

    def scatter(self, step: Step, part: Tensor, batch: Tensor, offset: int) -> None:
        """Write a step's results (rows, width, ...) to their columns of `batch`, whose first column is `offset`."""
        if self.columns is None and step.is_even and len(step.rows) == len(batch):
            start = max(step.starts[0], offset)
            if start < step.stops[0]:
                batch[:, start - offset : step.stops[0] - offset] = part[:, start - step.starts[0] :]
            return
        for source, row, columns in self._rows(step, batch.device):
            wanted = columns >= offset
            batch[row, columns[wanted] - offset] = part[source, : len(columns)][wanted]

    def reaches(self, step: Step, offset: int) -> bool:
        """Whether a step has tokens at column `offset` or behind it."""
        if self.columns is None:
            return max(step.stops) > offset
        last = [int(self.columns[row][stop - 1]) for row, stop in zip(step.rows, step.stops, strict=True)]
        return max(last) >= offset

    def _rows(self, step: Step, device: torch.device) -> list[tuple[int, int, Tensor]]:
        parts = []
        for index, (row, start, stop) in enumerate(zip(step.rows, step.starts, step.stops, strict=True)):
            columns = (
                torch.arange(start, stop, device=device)
                if self.columns is None
                else self.columns[row][start:stop].to(device)
            )
            parts.append((index, row, columns))
        return parts

"""How a prompt is cut: windows that go into memory one by one, and a last one that keep_local in the local context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """One pass through the layers: some rows' next real tokens.

    Attributes:
        rows: indices of the batch's rows that take part.
        starts: per row, the first of its real tokens in this window.
        stops: per row, behind the last one.
        keep_local: whether the tokens stay in the local context (else they go into memory).
    """

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    keep_local: bool

    @property
    def lengths(self) -> tuple[int, ...]:
        """Real tokens per row."""
        return tuple(stop - start for start, stop in zip(self.starts, self.stops, strict=True))

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have as many tokens."""
        return len(set(self.lengths)) == 1


def split_prompt(lengths: Sequence[int], context: int, last: int, keep_local: bool) -> list[Window]:
    """Cut the rows of a new prompt into windows (the paper's section 3; `last_context_length` in the published code).

    All but the last `last` tokens are cut into windows of `context` tokens, which go into memory; then comes the last
    window. Rows are cut each by its own length, so what a row sees doesn't depend on the rest of the batch.

    Args:
        lengths: real tokens per row; rows without any take no part.
        context: the length of a window.
        last: the length of the last window.
        keep_local: whether the last window keep_local in the local context.
    """
    memory_stops = [max(length - last, 0) for length in lengths]
    windows = [
        _window(
            [(row, start, min(start + context, end)) for row, end in enumerate(memory_stops) if start < end],
            keep_local=False,
        )
        for start in range(0, max(memory_stops, default=0), context)
    ]
    final = [
        (row, start, length) for row, (start, length) in enumerate(zip(memory_stops, lengths, strict=True)) if length
    ]
    return [*windows, _window(final, keep_local)] if final else windows


def split_continuation(lengths: Sequence[int], chunk: int) -> list[Window]:
    """Cut what follows on a local context into chunks; all of them stay."""
    return [
        _window(
            [(row, start, min(start + chunk, length)) for row, length in enumerate(lengths) if start < length],
            keep_local=True,
        )
        for start in range(0, max(lengths, default=0), chunk)
    ]


def _window(parts: list[tuple[int, int, int]], keep_local: bool) -> Window:
    rows, starts, stops = zip(*parts, strict=True)
    return Window(rows, starts, stops, keep_local)


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

    def gather(self, window: Window, batch: Tensor) -> Tensor:
        """A window's part of (batch, length, ...), (rows, width, ...); short rows are filled up behind with zeros."""
        if self.columns is None and window.is_uniform and len(window.rows) == len(batch):
            return batch[:, window.starts[0] : window.stops[0]]
        part = batch.new_zeros((len(window.rows), window.width, *batch.shape[2:]))
        for target, row, columns in self._rows(window, batch.device):
            part[target, : len(columns)] = batch[row, columns]
        return part

    def scatter(self, window: Window, part: Tensor, batch: Tensor, offset: int) -> None:
        """Write a window's results (rows, width, ...) to their columns of `batch`, whose first column is `offset`."""
        if self.columns is None and window.is_uniform and len(window.rows) == len(batch):
            start = max(window.starts[0], offset)
            if start < window.stops[0]:
                batch[:, start - offset : window.stops[0] - offset] = part[:, start - window.starts[0] :]
            return
        for source, row, columns in self._rows(window, batch.device):
            wanted = columns >= offset
            batch[row, columns[wanted] - offset] = part[source, : len(columns)][wanted]

    def reaches(self, window: Window, offset: int) -> bool:
        """Whether a window has tokens at column `offset` or behind it."""
        if self.columns is None:
            return max(window.stops) > offset
        last = [int(self.columns[row][stop - 1]) for row, stop in zip(window.rows, window.stops, strict=True)]
        return max(last) >= offset

    def _rows(self, window: Window, device: torch.device) -> list[tuple[int, int, Tensor]]:
        parts = []
        for index, (row, start, stop) in enumerate(zip(window.rows, window.starts, window.stops, strict=True)):
            columns = (
                torch.arange(start, stop, device=device)
                if self.columns is None
                else self.columns[row][start:stop].to(device)
            )
            parts.append((index, row, columns))
        return parts

"""Windows: how an input is split, and which tokens of the local context a window reads and evicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Window:
    """One pass through the layers: the real tokens from `starts` to `stops` of some batch rows."""

    rows: tuple[int, ...]
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    keep_local: bool  # whether the tokens stay in the local context or go into memory

    @property
    def lengths(self) -> list[int]:
        """Real tokens per row."""
        return [stop - start for start, stop in zip(self.starts, self.stops, strict=True)]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @property
    def is_uniform(self) -> bool:
        """Whether all rows have the same number of tokens."""
        return len(set(self.lengths)) == 1


def split_prompt(lengths: Sequence[int], context: int, last: int, keep_local: bool) -> list[Window]:
    """Split the rows of a new prompt into windows (section 3 of the paper).

    All but the last `last` tokens (`last_context_length` in the published code) become windows of `context` tokens that
    go into memory; then comes the last window. Each row is split by its own length, so its result doesn't depend on
    the rest of the batch.

    Args:
        lengths: real tokens per row; rows without any are left out.
        keep_local: whether the last window stays in the local context.
    """
    memory_stops = [max(length - last, 0) for length in lengths]
    final = [(row, max(length - last, 0), length) for row, length in enumerate(lengths) if length]
    windows = split_evenly(memory_stops, context, keep_local=False)
    return [*windows, _window(final, keep_local)] if final else windows


def split_evenly(lengths: Sequence[int], width: int, keep_local: bool) -> list[Window]:
    """Split rows into windows of `width` tokens."""
    windows = []
    for start in range(0, max(lengths, default=0), width):
        parts = [(row, start, min(start + width, length)) for row, length in enumerate(lengths) if start < length]
        windows.append(_window(parts, keep_local))
    return windows


def _window(parts: list[tuple[int, int, int]], keep_local: bool) -> Window:
    rows, starts, stops = zip(*parts, strict=True)
    return Window(rows, starts, stops, keep_local)


class RealTokens:
    """The columns of the real tokens of a batch (batch, length); `attention_mask` is 0 at padding, None for none."""

    def __init__(self, attention_mask: Tensor | None, batch: int, length: int):
        self.columns: list[Tensor] | None = None
        self.lengths = [length] * batch
        if attention_mask is not None and not bool((attention_mask != 0).all()):
            self.columns = [row.nonzero().flatten() for row in attention_mask != 0]
            self.lengths = [len(columns) for columns in self.columns]

    def gather(self, window: Window, batch: Tensor) -> Tensor:
        """The window of a tensor (batch, length, ...) as (rows, width, ...), zeros behind shorter rows."""
        if self.columns is None and window.is_uniform and len(window.rows) == len(batch):
            return batch[:, window.starts[0] : window.stops[0]]
        part = batch.new_zeros((len(window.rows), window.width, *batch.shape[2:]))
        for index, row in enumerate(window.rows):
            columns = self._columns(window, index).to(batch.device)
            part[index, : len(columns)] = batch[row, columns]
        return part

    def scatter(self, window: Window, part: Tensor, batch: Tensor, offset: int) -> None:
        """Write a window's results (rows, width, ...) to their columns of `batch`, which starts at column `offset`."""
        if self.columns is None and window.is_uniform and len(window.rows) == len(batch):
            start = max(window.starts[0], offset)
            if start < window.stops[0]:
                batch[:, start - offset : window.stops[0] - offset] = part[:, start - window.starts[0] :]
            return
        for index, row in enumerate(window.rows):
            columns = self._columns(window, index).to(batch.device)
            wanted = columns >= offset
            batch[row, columns[wanted] - offset] = part[index, : len(columns)][wanted]

    def reaches(self, window: Window, offset: int) -> bool:
        """Whether a window has tokens at or after column `offset`."""
        if self.columns is None:
            return max(window.stops) > offset
        return any(int(self._columns(window, index)[-1]) >= offset for index in range(len(window.rows)))

    def _columns(self, window: Window, index: int) -> Tensor:
        row, start, stop = window.rows[index], window.starts[index], window.stops[index]
        return torch.arange(start, stop) if self.columns is None else self.columns[row][start:stop]


# Positions grow as the local context slides; far beyond this, float32 angles of the rotary embedding lose precision.
REBASE_THRESHOLD = 65536


@dataclass
class LocalUpdate:
    """How the next tokens continue a local context: what they see, and what they evict.

    Slots are columns of the layers' buffers. Masks are True where a query sees a key.
    """

    write: slice  # slots of the new tokens
    seen: slice  # slots of the local context that are attended to, old and new
    mask: Tensor | None  # (rows or 1, 1, width, seen); None if every query sees all of `seen`
    position_ids: Tensor  # (rows or 1, width) of the new tokens
    memory_position_ids: Tensor | None  # the same for queries to memory, limited to the context; None if equal
    evicted_before: list[Tensor | slice] | None = None  # per row, slots to evict before attention
    evicted: slice | None = None  # slots of which some are evicted during the update; later queries see them as memory
    evicted_mask: Tensor | None = None  # (rows or 1, 1, width, evicted)
    evicted_after: list[Tensor | slice] | None = None  # per row, slots to evict after attention
    # For `Slots.commit`.
    rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    start: int = 0
    flushed: list[bool] = field(default_factory=list)


class Slots:
    """Which tokens of each row are in which columns of the local buffers, the same for all layers.

    Args:
        batch: number of rows.
        context: maximum local tokens per row.
        flush: on overflow evict all local tokens instead of the oldest ones.

    Attributes:
        columns: input columns processed so far.
    """

    def __init__(self, batch: int, context: int, flush: bool):
        self.context, self.flush = context, flush
        self.clear(batch)

    def clear(self, batch: int) -> None:
        """Start anew with `batch` rows."""
        self.batch, self.next = batch, [0] * batch
        self.start = self.end = self.capacity = self.columns = 0
        # (batch, capacity) position of the token in each slot, -1 for none. None while all rows are equal: slot j then
        # has the position next - (end - j).
        self.table: Tensor | None = None

    def length(self, row: int) -> int:
        """Local tokens of a row."""
        if self.table is None:
            return self.end - self.start
        return int((self.table[row, self.start : self.end] >= 0).sum())

    @property
    def longest(self) -> int:
        """Local tokens of the longest row."""
        return max((self.length(row) for row in range(self.batch)), default=0)

    def fill(self, rows: Sequence[int], counts: Sequence[int]) -> slice:
        """Add a first window and return its slots, from 0."""
        width = max(counts)
        self.start, self.end = 0, width
        self.capacity = max(self.capacity, width + min(256, self.context))
        if len(rows) == self.batch and len(set(counts)) == 1:
            self.table, self.next = None, [width] * self.batch
        else:
            self.table = torch.full((self.batch, self.capacity), -1)
            self.next = [0] * self.batch
            for row, count in zip(rows, counts, strict=True):
                self.table[row, :count] = torch.arange(count)
                self.next[row] = count
        return slice(0, width)

    def reserve_columns(self, width: int) -> tuple[slice, int] | None:
        """Reserve `width` more columns; gives the slots to move to the front of new buffers and their capacity."""
        if self.end + width <= self.capacity:
            return None
        kept = slice(self.start, self.end)
        used = self.end - self.start + width
        # Spare columns, so that moving to the front stays rare.
        self.capacity = max(used, min(2 * used, self.context + width + max(64, self.context // 8)))
        if self.table is not None:
            table = torch.full((self.batch, self.capacity), -1)
            table[:, : kept.stop - kept.start] = self.table[:, kept]
            self.table = table
        self.start, self.end = 0, kept.stop - kept.start
        return kept, self.capacity

    def plan(self, rows: Sequence[int], counts: Sequence[int]) -> LocalUpdate:
        """Plan the next `counts` tokens of `rows`; their columns must be reserved."""
        if self.table is None and len(rows) == self.batch and len(set(counts)) == 1:
            return self._plan_uniform(list(rows), counts[0])
        return self._plan_ragged(list(rows), list(counts), self._ensure_table())

    def commit(self, update: LocalUpdate) -> None:
        """Record that an update was computed."""
        if self.table is None:
            if update.flushed[0]:
                self.next = [0] * self.batch
            self.next = [position + count for position, count in zip(self.next, update.counts, strict=True)]
            self.start, self.end = update.start, update.write.stop
            return
        for index, (row, count) in enumerate(zip(update.rows, update.counts, strict=True)):
            if update.flushed[index]:
                self.table[row, self.start : self.end] = -1
                self.next[row] = 0
            self.table[row, self.end : self.end + count] = torch.arange(self.next[row], self.next[row] + count)
            self.next[row] += count
            if not self.flush:
                expired = self.table[row] < self.next[row] - self.context
                self.table[row, expired] = -1
        self.end = update.write.stop
        occupied = (self.table[:, : self.end] >= 0).any(0).nonzero()
        self.start = int(occupied[0]) if len(occupied) else self.end

    def select(self, indices: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self.batch = len(indices)
        self.next = [self.next[index] for index in indices]
        if self.table is not None:
            self.table = self.table[list(indices)]

    def crop(self, tokens: int) -> None:
        """Remove the last columns of all rows; evicted tokens don't return."""
        table = self._ensure_table()
        for row in range(self.batch):
            self.next[row] -= int((table[row, self.end - tokens : self.end] >= 0).sum())
        table[:, self.end - tokens :] = -1
        self.end -= tokens
        expected = torch.arange(self.next[0] - (self.end - self.start), self.next[0])
        if len(set(self.next)) == 1 and bool((table[:, self.start : self.end] == expected).all()):
            self.table = None

    def rebase_positions(self) -> int:
        """Subtract from large positions so that they start near 0 again; gives the difference."""
        if max(self.next, default=0) < max(REBASE_THRESHOLD, 2 * self.context):
            return 0
        shift = min(self.next) - self.context
        if self.table is not None:
            occupied = self.table[self.table >= 0]
            shift = min(shift, int(occupied.min())) if len(occupied) else shift
        if shift <= 0:
            return 0
        self.next = [position - shift for position in self.next]
        if self.table is not None:
            self.table[self.table >= 0] -= shift
        return shift

    def _ensure_table(self) -> Tensor:
        if self.table is None:
            self.table = torch.full((self.batch, self.capacity), -1)
            for row, position in enumerate(self.next):
                self.table[row, self.start : self.end] = torch.arange(position - (self.end - self.start), position)
        return self.table

    def _plan_uniform(self, rows: list[int], width: int) -> LocalUpdate:
        length, position = self.end - self.start, self.next[0]
        new = slice(self.end, self.end + width)
        counts = [width] * len(rows)
        if self.flush and length + width > self.context:
            positions = torch.arange(width)[None]
            causal = torch.ones(width, width, dtype=torch.bool).tril()[None, None] if width > 1 else None
            return LocalUpdate(
                new, new, causal, positions, None,
                [slice(self.start, self.end)] * len(rows),
                rows=rows, counts=counts, start=self.end, flushed=[True] * len(rows),
            )  # fmt: skip
        positions = torch.arange(position, position + width)[None]
        first = min(max(length + 1 - self.context, 0), length)
        last = max(length + width - self.context, 0)
        seen = slice(self.start + first, self.end + width)
        update = LocalUpdate(
            new, seen, None, positions, self._clamp_positions(positions),
            [slice(self.start, self.start + first)] * len(rows) if first else None,
            rows=rows, counts=counts, start=self.start + last, flushed=[False] * len(rows),
        )  # fmt: skip
        if width > 1:
            distance = torch.arange(width)[:, None] + (length - first) - torch.arange(length - first + width)
            update.mask = ((distance >= 0) & (distance < self.context))[None, None]
            if last > first:
                update.evicted = slice(self.start + first, self.start + last)
                update.evicted_mask = (distance >= self.context)[None, None, :, : last - first]
                update.evicted_after = [update.evicted] * len(rows)
        return update

    def _plan_ragged(self, rows: list[int], counts: list[int], table: Tensor) -> LocalUpdate:
        width, old = max(counts), table[rows, self.start : self.end]
        next_positions, token_counts = torch.tensor([self.next[row] for row in rows]), torch.tensor(counts)
        flushed = [False] * len(rows)
        if self.flush:
            flushed = ((old >= 0).sum(1) + token_counts > self.context).tolist()
            expired = (old >= 0) & torch.tensor(flushed)[:, None]
            next_positions = next_positions.masked_fill(torch.tensor(flushed), 0)
        else:
            expired = (old >= 0) & (old <= next_positions[:, None] - self.context)
        steps = torch.arange(width)
        queries = next_positions[:, None] + steps
        new = queries.masked_fill(steps >= token_counts[:, None], -1)
        keys = torch.cat([old.masked_fill(expired, -1), new], 1)
        distance = queries[:, :, None] - keys[:, None, :]
        valid = (keys >= 0)[:, None, :]
        update = LocalUpdate(
            slice(self.end, self.end + width), slice(self.start, self.end + width),
            (valid & (distance >= 0) & (distance < self.context))[:, None], queries, self._clamp_positions(queries),
            self._slots(expired) if bool(expired.any()) else None, rows=rows, counts=counts, flushed=flushed,
        )  # fmt: skip
        evicted = (keys >= 0) & (keys <= (next_positions + token_counts - 1)[:, None] - self.context)
        if not self.flush and bool(evicted.any()):
            update.evicted = update.seen
            update.evicted_mask = (valid & (distance >= self.context))[:, None]
            update.evicted_after = self._slots(evicted)
        return update

    def _slots(self, slot_mask: Tensor) -> list[Tensor | slice]:
        return [row.nonzero().flatten() + self.start for row in slot_mask]

    def _clamp_positions(self, positions: Tensor) -> Tensor | None:
        """Positions of queries to memory, limited to the context, as in training."""
        return positions.clamp(max=self.context - 1) if int(positions.max()) >= self.context else None

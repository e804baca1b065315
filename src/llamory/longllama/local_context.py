"""The local context while it goes on: which slot holds which position, what a step may see, and what leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Positions grow as the local context slides; far beyond this float32 angles of the rotary embedding get coarse.
REBASE_AT = 65536


@dataclass
class Chunk:
    """What attention needs to go on from a local context with a few tokens per row.

    Slots are columns of the layers' buffers. Masks are True where a query may look.

    Attributes:
        write: slots of the new tokens.
        seen: slots that are attended to in the local context, old and new.
        mask: (rows or 1, 1, width, seen) or None where every query sees all of `seen`.
        leaves_first: per row, slots that leave before attention (None: nothing leaves).
        leaving: slots among which some leave within the chunk: the queries far enough behind see them as memory.
        leaving_mask: (rows or 1, 1, width, leaving), for `leaving`.
        leaves_after: per row, slots that leave after attention.
        position_ids: (rows or 1, width) of the new tokens.
        memory_position_ids: the same for queries to memory, which stay within the context; None where equal.
    """

    write: slice
    seen: slice
    mask: Tensor | None
    position_ids: Tensor
    memory_position_ids: Tensor | None
    leaves_first: list[Tensor | slice] | None = None
    leaving: slice | None = None
    leaving_mask: Tensor | None = None
    leaves_after: list[Tensor | slice] | None = None
    # The table's entries after the chunk, kept for `Slots.commit`.
    rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    start: int = 0
    flushed: list[bool] = field(default_factory=list)


class Slots:
    """Which tokens of each row stand in which columns of the local buffers, the same for all layers.

    Args:
        batch: rows.
        context: the most tokens of a row that are local.
        flush: whether all local tokens leave when the next don't fit (else the oldest leave, one by one).
    """

    def __init__(self, batch: int, context: int, flush: bool):
        self.batch, self.context, self.flush = batch, context, flush
        self.start = self.end = self.capacity = 0
        self.next = [0] * batch
        # (batch, capacity) position of the token in each slot, -1 for none. None while all rows are alike: slot j then
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
        """Take in a first window; its tokens start at slot 0. Gives the slots to write."""
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

    def room_for(self, width: int) -> tuple[slice, int] | None:
        """Make room for `width` more columns: what of the buffers must move to the front of buffers of which capacity.

        None if there is room enough.
        """
        if self.end + width <= self.capacity:
            return None
        kept = slice(self.start, self.end)
        used = self.end - self.start + width
        # Some room to slide in, so that moving to the front stays rare.
        self.capacity = max(used, min(2 * used, self.context + width + max(64, self.context // 8)))
        if self.table is not None:
            table = torch.full((self.batch, self.capacity), -1)
            table[:, : kept.stop - kept.start] = self.table[:, kept]
            self.table = table
        self.start, self.end = 0, kept.stop - kept.start
        return kept, self.capacity

    def plan(self, rows: Sequence[int], counts: Sequence[int]) -> Chunk:
        """Plan the next tokens (`counts` of each of `rows`); there must be room for them."""
        if self.table is None and len(rows) == self.batch and len(set(counts)) == 1:
            return self._plan_even(list(rows), counts[0])
        self._need_table()
        return self._plan_uneven(list(rows), list(counts))

    def commit(self, chunk: Chunk) -> None:
        """The chunk's tokens are written and what left is gone."""
        if self.table is None:
            if chunk.flushed[0]:
                self.next = [0] * self.batch
            self.next = [position + count for position, count in zip(self.next, chunk.counts, strict=True)]
            self.start, self.end = chunk.start, chunk.write.stop
            return
        for index, (row, count) in enumerate(zip(chunk.rows, chunk.counts, strict=True)):
            if chunk.flushed[index]:
                self.table[row, self.start : self.end] = -1
                self.next[row] = 0
            self.table[row, self.end : self.end + count] = torch.arange(self.next[row], self.next[row] + count)
            self.next[row] += count
            if not self.flush:
                gone = self.table[row] < self.next[row] - self.context
                self.table[row, gone] = -1
        self.end = chunk.write.stop
        taken = (self.table[:, : self.end] >= 0).any(0).nonzero()
        self.start = int(taken[0]) if len(taken) else self.end

    def select(self, indices: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        self.batch = len(indices)
        self.next = [self.next[index] for index in indices]
        if self.table is not None:
            self.table = self.table[list(indices)]

    def crop(self, tokens: int) -> None:
        """Take back the last columns of all rows; what has left doesn't return."""
        self._need_table()
        assert self.table is not None
        for row in range(self.batch):
            self.next[row] -= int((self.table[row, self.end - tokens : self.end] >= 0).sum())
        self.table[:, self.end - tokens :] = -1
        self.end -= tokens
        if self._is_even():
            self.table = None

    def rebase(self) -> int:
        """Let positions start again near 0 once they are large; gives by how much they became smaller."""
        if max(self.next, default=0) < max(REBASE_AT, 2 * self.context):
            return 0
        shift = min(self.next) - self.context
        if self.table is not None:
            taken = self.table[self.table >= 0]
            shift = min(shift, int(taken.min())) if len(taken) else shift
        if shift <= 0:
            return 0
        self.next = [position - shift for position in self.next]
        if self.table is not None:
            self.table[self.table >= 0] -= shift
        return shift

    def _need_table(self) -> None:
        if self.table is None:
            self.table = torch.full((self.batch, self.capacity), -1)
            for row, position in enumerate(self.next):
                self.table[row, self.start : self.end] = torch.arange(position - (self.end - self.start), position)

    def _is_even(self) -> bool:
        assert self.table is not None
        part = self.table[:, self.start : self.end]
        expected = torch.arange(self.next[0] - (self.end - self.start), self.next[0])
        return len(set(self.next)) == 1 and bool((part == expected).all())

    def _plan_even(self, rows: list[int], width: int) -> Chunk:
        length, position = self.end - self.start, self.next[0]
        new = slice(self.end, self.end + width)
        counts = [width] * len(rows)
        if self.flush and length + width > self.context:
            positions = torch.arange(width)[None]
            return Chunk(
                new, new, _causal(width), positions, None,
                [slice(self.start, self.end)] * len(rows),
                rows=rows, counts=counts, start=self.end, flushed=[True] * len(rows),
            )  # fmt: skip
        positions = torch.arange(position, position + width)[None]
        first = min(max(length + 1 - self.context, 0), length)
        last = max(length + width - self.context, 0)
        seen = slice(self.start + first, self.end + width)
        chunk = Chunk(
            new, seen, None, positions, self._within(positions),
            [slice(self.start, self.start + first)] * len(rows) if first else None,
            rows=rows, counts=counts, start=self.start + last, flushed=[False] * len(rows),
        )  # fmt: skip
        if width > 1:
            age = torch.arange(width)[:, None] + (length - first) - torch.arange(length - first + width)
            chunk.mask = ((age >= 0) & (age < self.context))[None, None]
            if last > first:
                chunk.leaving = slice(self.start + first, self.start + last)
                chunk.leaving_mask = (age >= self.context)[None, None, :, : last - first]
                chunk.leaves_after = [chunk.leaving] * len(rows)
        return chunk

    def _plan_uneven(self, rows: list[int], counts: list[int]) -> Chunk:
        assert self.table is not None
        width = max(counts)
        old = self.table[rows, self.start : self.end]
        following, given = torch.tensor([self.next[row] for row in rows]), torch.tensor(counts)
        flushed = [False] * len(rows)
        if self.flush:
            flushed = ((old >= 0).sum(1) + given > self.context).tolist()
            gone = (old >= 0) & torch.tensor(flushed)[:, None]
            following = following.masked_fill(torch.tensor(flushed), 0)
        else:
            gone = (old >= 0) & (old <= following[:, None] - self.context)
        steps = torch.arange(width)
        queries = following[:, None] + steps
        new = queries.masked_fill(steps >= given[:, None], -1)
        keys = torch.cat([old.masked_fill(gone, -1), new], 1)
        age = queries[:, :, None] - keys[:, None, :]
        there = (keys >= 0)[:, None, :]
        chunk = Chunk(
            slice(self.end, self.end + width), slice(self.start, self.end + width),
            (there & (age >= 0) & (age < self.context))[:, None], queries, self._within(queries),
            self._slots(gone) if bool(gone.any()) else None, rows=rows, counts=counts, flushed=flushed,
        )  # fmt: skip
        leaving = (keys >= 0) & (keys <= (following + given - 1)[:, None] - self.context)
        if not self.flush and bool(leaving.any()):
            chunk.leaving = chunk.seen
            chunk.leaving_mask = (there & (age >= self.context))[:, None]
            chunk.leaves_after = self._slots(leaving)
        return chunk

    def _slots(self, chosen: Tensor) -> list[Tensor | slice]:
        return [row.nonzero().flatten() + self.start for row in chosen]

    def _within(self, positions: Tensor) -> Tensor | None:
        """Positions of queries to memory: as far as the local context reaches, which training saw, and no further."""
        if int(positions.max()) < self.context:
            return None
        return positions.clamp(max=self.context - 1)


def _causal(width: int) -> Tensor | None:
    return torch.ones(width, width, dtype=torch.bool).tril()[None, None] if width > 1 else None

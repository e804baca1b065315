"""Volumes: all stretches of a layer's memory, of however many documents, in which pages are looked up by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamory.memory.blocks import Block, Span
from llamory.memory.search.exact import converts
from llamory.memory.search.page_segments import CHAPTER, CHAPTER_PAGES, PAGE, Stretch, Tables, cut, joined_of, settle
from llamory.memory.search.workspace import scratch

KEPT_VOLUMES = 2  # of memories that begin with the same block, such as forks that went on


@dataclass
class Part:
    """The pages of one block.

    Attributes:
        block: where their tokens are.
        stretch: what is known of them.
        first, last: number of the first page in the volume, and of the one behind the last.
    """

    block: Block
    stretch: Stretch
    first: int
    last: int


@dataclass
class Volume:
    """Pages and chapters of a layer's memory, numbered part by part, and the tokens that are in no page.

    Only what is known of the chapters is joined, as all of them are looked at: pages stay where they are, so that
    mounting a large memory, whose tables come from files, doesn't mean reading it.
    """

    parts: list[Part]
    chapters: Tables
    rest: list[Span]

    @property
    def page_count(self) -> int:
        """Pages per head."""
        return self.parts[-1].last if self.parts else 0

    def open(self, numbers: Tensor) -> Tensor:
        """What is known of the pages of chapters (kv_heads, groups, chapters): (kv_heads, groups, pages, 3 * head_dim).

        In float32; the next call uses the same room.
        """
        width = self.parts[0].stretch.pages.shape[2]
        tables = [part.stretch.pages.unflatten(1, (-1, CHAPTER_PAGES)).flatten(2) for part in self.parts]
        picks = _Picks(numbers, [part.first // CHAPTER_PAGES for part in self.parts])
        found = picks.in_order(picks.select(tables, "tables"), "tables")
        return _converted(found, torch.float32, "tables").view(*numbers.shape[:2], -1, width)

    def gather(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, PAGE, head_dim) of all of these pages (kv_heads, groups, pages), one after another.

        In float32 where that is faster to read, else as the memory is kept. The next call uses the same room.
        """
        block = self.parts[0].block
        kind = torch.float32 if block.key_scales is not None or converts(block.keys) else block.keys.dtype
        picks = _Picks(numbers, [part.first for part in self.parts])
        rows = picks.select([part.stretch.rows for part in self.parts], "rows").view(-1)

        def gathered(name: str) -> Tensor:
            tensors = [getattr(part.block, name) for part in self.parts]
            found = _room(name, tensors[0], len(rows), *tensors[0].shape[2:])
            for tensor, part in zip(tensors, picks.parts(PAGE), strict=True):
                _select(tensor.flatten(0, 1), rows[part], found[part])
            return picks.in_order(found.view(numbers.numel(), -1), name)

        def pages(name: str) -> Tensor:
            return _converted(gathered(name), kind, name).view(-1, PAGE, block.keys.shape[2])

        keys, values = pages("keys"), pages("values")
        if block.key_scales is not None:
            keys *= gathered("key_scales").unsqueeze(-1)
            values *= gathered("value_scales").unsqueeze(-1)
        return keys, values


class _Picks:
    """What is picked out of several parts by number.

    Args:
        numbers: (kv_heads, groups, count).
        firsts: the first number of each part.
    """

    def __init__(self, numbers: Tensor, firsts: Sequence[int]):
        device, per_head = numbers.device, numbers[0].numel()
        picked = numbers.reshape(-1)
        heads = torch.arange(len(numbers), device=device).repeat_interleave(per_head)
        self._firsts, self._cuts, self._back = firsts, [0, len(picked)], None
        if len(firsts) > 1:
            # Sorted by their number, those of each part stand together.
            picked, order = picked.sort()
            heads = heads[order]
            edges = torch.tensor(firsts[1:], device=device)
            self._cuts = [0, *torch.searchsorted(picked, edges).tolist(), len(picked)]
            self._back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        self._picked, self._heads = picked, heads

    def parts(self, times: int = 1) -> list[slice]:
        """Where the picks of each part stand, if each takes so many places."""
        return [slice(start * times, stop * times) for start, stop in zip(self._cuts, self._cuts[1:], strict=False)]

    def select(self, tables: Sequence[Tensor], name: str) -> Tensor:
        """What was picked of the parts' tables (kv_heads, entries, width), part by part: (picks, width)."""
        found = _room(name, tables[0], len(self._picked), tables[0].shape[2])
        for table, first, part in zip(tables, self._firsts, self.parts(), strict=True):
            at = self._picked[part] - first + self._heads[part] * table.shape[1]
            _select(table.reshape(-1, table.shape[2]), at, found[part])
        return found

    def in_order(self, found: Tensor, name: str) -> Tensor:
        """What stands part by part, (picks, width), in the order of the numbers."""
        if self._back is None:
            return found
        return _select(found, self._back, scratch(f"ordered {name}", found.shape, found.dtype, found.device))


def volume_of(spans: Sequence[Span]) -> tuple[Volume | None, list[Span]]:
    """The stretches of some spans, None if they are too few tokens for one, and what is to be read besides.

    The order of the spans makes no difference. Volumes are kept, beside their first block's summaries, until memory
    has grown by a step: one new token costs nothing here.
    """
    settled, rest = settle(spans, CHAPTER)
    if not settled:
        return None, rest
    known = settled[0].block.summaries.setdefault("volumes", {})
    assert isinstance(known, dict)
    # Blocks stay alive as long as a volume that holds them, so their ids name them.
    name = tuple((id(span.block), span.start, span.stop) for span in settled)
    if name not in known:
        while len(known) >= KEPT_VOLUMES:
            known.pop(next(iter(known)), None)
        known[name] = _bind(settled)
    volume = known[name]
    return (volume if volume.parts else None), [*volume.rest, *rest]


def _bind(spans: Sequence[Span]) -> Volume:
    """One volume of what is in some spans."""
    parts: list[Part] = []
    rest: list[Span] = []
    at = 0
    for span in spans:
        places, left = cut(span)
        rest += left
        if places:
            stretch = joined_of(span.block, places)
            last = at + stretch.rows.shape[1]
            parts.append(Part(span.block, stretch, at, last))
            at = last
    tables = zip(*(part.stretch.chapters for part in parts), strict=True)
    return Volume(parts, tuple(torch.cat(each, 1) for each in tables), _copied(rest))


def _copied(spans: list[Span]) -> list[Span]:
    """The same tokens in a block of their own: what many documents leave over is then read at once."""
    if len(spans) < 2:
        return spans
    keys = spans[0].block.keys
    block = Block.allocate(len(keys), sum(map(len, spans)), keys.shape[2], keys.dtype, keys.device)
    for span in spans:
        block.take(span)
    return [Span(block, 0, block.filled)]


def _room(name: str, like: Tensor, *shape: int) -> Tensor:
    return scratch(f"picked {name}", shape, like.dtype, like.device)


def _select(table: Tensor, at: Tensor, target: Tensor) -> Tensor:
    """Rows of a table into a target, which is given back."""
    return torch.index_select(table, 0, at, out=target) if len(at) else target


def _converted(tensor: Tensor, kind: torch.dtype, name: str) -> Tensor:
    if tensor.dtype == kind:
        return tensor
    return scratch(f"converted {name}", tensor.shape, kind, tensor.device).copy_(tensor)

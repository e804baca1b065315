"""Stretches of memory: long runs of tokens sorted into pages of like keys, with the pages' means and spreads.

Tokens that stand side by side have less alike keys than one would think: pages of neighbours catch far less of a real
model's attention than as many pages sorted by likeness. So a stretch keeps its tokens where they are and remembers, per
head, an order in which neighbours are alike. Eight pages make a chapter, which is looked at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamory.memory.blocks import Block, Span
from llamory.memory.exact import converts
from llamory.memory.likeness import alike

PAGE = 32
CHAPTER_PAGES = 8
CHAPTER = PAGE * CHAPTER_PAGES
# Larger stretches sort better and smaller ones are ready earlier: four of one size become one of the next.
LENGTHS = (16384, 4096, 1024, 256)
STEP = 4096  # tokens behind the last multiple of it in a block that may still grow are read as they are

KEPT_VOLUMES = 2  # of memories that begin with the same block, such as forks that went on

Tables = tuple[Tensor, ...]


@dataclass
class Stretch:
    """What is known of a stretch's pages.

    Attributes:
        rows: (kv_heads, pages, PAGE) int32, where a page's tokens are in the block's (kv_heads * capacity) rows.
        pages: mean and variance of the keys and mean of the values, (kv_heads, pages, 3 * head_dim).
        chapters: the same of chapters, each (kv_heads, pages / CHAPTER_PAGES, head_dim) float32.
    """

    rows: Tensor
    pages: Tensor
    chapters: Tables


def cut(span: Span, lengths: Sequence[int] = LENGTHS) -> tuple[list[tuple[int, int]], list[Span]]:
    """A span as stretches (start, stop), as large as they fit, and the spans that are left over.

    Stretches lie at multiples of their length in the block, so that whoever shares the block shares them.
    """
    stretches: list[tuple[int, int]] = []
    rest: list[Span] = []
    at = span.start
    while at < span.stop:
        length = next((n for n in lengths if at % n == 0 and at + n <= span.stop), 0)
        if length:
            stretches.append((at, at + length))
            at += length
        else:
            stop = min(span.stop, at - at % lengths[-1] + lengths[-1])
            rest.append(Span(span.block, at, stop))
            at = stop
    return stretches, rest


def stretch_of(block: Block, start: int, stop: int) -> Stretch:
    """A block's stretch, made if it isn't yet known; it then stands for the smaller ones in it."""
    known = block.summaries.setdefault("stretches", {})
    assert isinstance(known, dict)
    if (start, stop) not in known:
        known[start, stop] = _make(block, start, stop)
        for other in [(a, b) for a, b in list(known) if start <= a and b <= stop and (a, b) != (start, stop)]:
            known.pop(other, None)
    return known[start, stop]


def know(block: Block, start: int, stop: int, stretch: Stretch) -> None:
    """Take over a stretch that was made before, of a block of the same content and capacity."""
    known = block.summaries.setdefault("stretches", {})
    assert isinstance(known, dict)
    known[start, stop] = stretch


def _make(block: Block, start: int, stop: int) -> Stretch:
    span = Span(block, start, stop)
    keys = span.keys(torch.float32)
    heads, tokens, head_dim = keys.shape
    order = alike(keys, PAGE)
    offsets = torch.arange(heads, device=keys.device).unsqueeze(1)
    rows = (order + offsets * tokens).view(-1)

    def sorted_pages(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, head_dim).index_select(0, rows).view(heads, -1, PAGE, head_dim)

    keys = sorted_pages(keys)
    means = keys.mean(2)
    pages = (means, keys.var(2, unbiased=False), sorted_pages(span.values(torch.float32)).mean(2))
    of_chapters = [table.unflatten(1, (-1, CHAPTER_PAGES)) for table in pages]
    chapters = (
        of_chapters[0].mean(2),
        of_chapters[1].mean(2) + of_chapters[0].var(2, unbiased=False),
        of_chapters[2].mean(2),
    )
    # Pages are many: unless the memory itself is more exact, half the bytes are enough for them.
    kind = torch.float32 if block.keys.dtype == torch.float32 else torch.bfloat16
    places = (order + start + offsets * block.capacity).view(heads, -1, PAGE).int()
    return Stretch(places, torch.cat(pages, -1).to(kind), chapters)


@dataclass
class Volume:
    """All stretches of a layer's memory as one: their tables joined, and what belongs to no stretch.

    Attributes:
        blocks: each block with the number of its first page and the one behind its last page.
        rows, pages, chapters: the stretches', joined along their pages.
        rest: tokens in no page.
    """

    blocks: list[tuple[Block, int, int]]
    rows: Tensor
    pages: Tensor
    chapters: Tables
    rest: list[Span]

    @property
    def page_count(self) -> int:
        """Pages per head."""
        return self.rows.shape[1]

    def gather(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, PAGE, head_dim) of all of these pages (kv_heads, groups, pages), one after another.

        In float32 where that is faster to read, else as the memory is kept.
        """
        heads, total = self.rows.shape[:2]
        first = torch.arange(heads, device=numbers.device).view(-1, 1, 1) * total
        rows = self.rows.reshape(-1, PAGE).index_select(0, (numbers + first).view(-1))
        if len(self.blocks) == 1:
            return _gather([self.blocks[0][0]], rows, [0, len(rows)])
        # Sorted by their number, the pages of each block stand together.
        in_order, order = numbers.reshape(-1).sort()
        rows = rows.index_select(0, order)
        edges = torch.tensor([first for _, first, _ in self.blocks[1:]], device=numbers.device)
        cuts = [0, *torch.searchsorted(in_order, edges).tolist(), len(order)]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return _gather([block for block, _, _ in self.blocks], rows, cuts, back)


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
    return (volume, [*volume.rest, *rest]) if volume.page_count else (None, [*volume.rest, *rest])


def settle(spans: Sequence[Span], least: int) -> tuple[list[Span], list[Span]]:
    """Spans as those that are settled and have at least so many tokens, and what is left of them.

    The last tokens in a block with room aren't settled: it pays to know more of them when there are more of them.
    """
    settled, rest = [], []
    for span in _joined(spans):
        stop = span.stop
        if stop == span.block.filled and span.block.free:
            stop = max(span.start, stop - stop % STEP)
        if stop - span.start < least:
            stop = span.start
        settled.append(Span(span.block, span.start, stop))
        rest.append(Span(span.block, stop, span.stop))
    return [span for span in settled if len(span)], [span for span in rest if len(span)]


def _joined(spans: Sequence[Span]) -> list[Span]:
    joined: list[Span] = []
    for span in sorted(spans, key=lambda span: (id(span.block), span.start)) if len(spans) > 1 else spans:
        if joined and joined[-1].block is span.block and joined[-1].stop == span.start:
            joined[-1] = Span(span.block, joined[-1].start, span.stop)
        else:
            joined.append(span)
    return joined


def _bind(spans: Sequence[Span]) -> Volume:
    """Join the stretches of spans; their own tables become views of the joined ones and take no memory twice."""
    blocks: list[tuple[Block, int, int]] = []
    stretches: list[Stretch] = []
    rest: list[Span] = []
    at = 0
    for span in spans:
        places, left = cut(span)
        rest += left
        stretches += [stretch_of(span.block, *place) for place in places]
        last = sum(stop - start for start, stop in places) // PAGE + at
        if blocks and blocks[-1][0] is span.block:
            blocks[-1] = (span.block, blocks[-1][1], last)
        else:
            blocks.append((span.block, at, last))
        at = last
    if not stretches:
        nothing = torch.empty(len(spans[0].block.keys), 0, 0)
        return Volume([], nothing, nothing, (), rest)
    volume = Volume(
        blocks,
        torch.cat([stretch.rows for stretch in stretches], 1),
        torch.cat([stretch.pages for stretch in stretches], 1),
        tuple(torch.cat(tables, 1) for tables in zip(*(s.chapters for s in stretches), strict=True)),
        rest,
    )
    at = 0
    for stretch in stretches:
        of_pages = slice(at, at + stretch.rows.shape[1])
        of_chapters = slice(of_pages.start // CHAPTER_PAGES, of_pages.stop // CHAPTER_PAGES)
        stretch.rows = volume.rows[:, of_pages]
        stretch.pages = volume.pages[:, of_pages]
        stretch.chapters = tuple(table[:, of_chapters] for table in volume.chapters)
        at = of_pages.stop
    return volume


def _gather(blocks: list[Block], rows: Tensor, cuts: list[int], order: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values (pages, PAGE, head_dim) of pages whose rows (pages, PAGE) are given.

    Args:
        blocks: where the pages are.
        rows: block after block.
        cuts: the first page of each block, and behind the last.
        order: to put the pages in.
    """
    block, flat, head_dim = blocks[0], rows.view(-1), blocks[0].keys.shape[-1]
    kind = torch.float32 if block.key_scales is not None or converts(block.keys) else block.keys.dtype

    def gathered(name: str) -> Tensor:
        tensors = [getattr(block, name) for block in blocks]
        target = tensors[0].new_empty(rows.numel(), *tensors[0].shape[2:])
        for tensor, start, stop in zip(tensors, cuts, cuts[1:], strict=False):
            if stop > start:
                at = slice(start * PAGE, stop * PAGE)
                torch.index_select(tensor.flatten(0, 1), 0, flat[at], out=target[at])
        target = target.view(len(rows), -1)
        return target if order is None else target.index_select(0, order)

    keys, values = (gathered(name).to(kind).view(-1, PAGE, head_dim) for name in ("keys", "values"))
    if block.key_scales is not None:
        keys *= gathered("key_scales").unsqueeze(-1)
        values *= gathered("value_scales").unsqueeze(-1)
    return keys, values

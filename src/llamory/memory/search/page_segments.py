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
from llamory.memory.search.clustering import alike

PAGE = 32
CHAPTER_PAGES = 8
CHAPTER = PAGE * CHAPTER_PAGES
# Larger stretches sort better and smaller ones are ready earlier: four of one size become one of the next.
LENGTHS = (16384, 4096, 1024, 256)
STEP = 4096  # tokens behind the last multiple of it in a block that may still grow are read as they are

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


def joined_of(block: Block, places: Sequence[tuple[int, int]]) -> Stretch:
    """Stretches that lie one behind the other, as one: what single ones hold then are views of its tables."""
    known = _joined_in(block)
    place = places[0][0], places[-1][1]
    if place not in known:
        stretches = [stretch_of(block, *each) for each in places]
        if len(stretches) == 1:
            return stretches[0]
        chapters = zip(*(stretch.chapters for stretch in stretches), strict=True)
        whole = Stretch(
            torch.cat([stretch.rows for stretch in stretches], 1),
            torch.cat([stretch.pages for stretch in stretches], 1),
            tuple(torch.cat(tables, 1) for tables in chapters),
        )
        at = 0
        for stretch in stretches:
            pages = slice(at, at + stretch.rows.shape[1])
            stretch.rows, stretch.pages = whole.rows[:, pages], whole.pages[:, pages]
            at = pages.stop
        # A longer one takes the place of those before it, which would take as much room again.
        known.clear()
        known[place] = whole
    return known[place]


def know(block: Block, places: Sequence[tuple[int, int]], whole: Stretch) -> None:
    """Take over, as one, stretches that were made before, of a block of the same content and capacity."""
    _joined_in(block)[places[0][0], places[-1][1]] = whole


def _joined_in(block: Block) -> dict[tuple[int, int], Stretch]:
    known = block.summaries.setdefault("joined", {})
    assert isinstance(known, dict)
    return known


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

"""Stretches of memory: long runs of tokens sorted into pages of like keys, with the pages' means and spreads.

Tokens that stand side by side have less alike keys than one would think: pages of neighbours catch far less of a real
model's attention than as many pages sorted by likeness. So a paged_segment keeps its tokens where they are and remembers, per
head, an order in which neighbours are alike. Eight pages make a superpage, which is looked at first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamory.memory.blocks import Block, Span
from llamory.memory.search.clustering import balanced_pca_partition

PAGE_SIZE = 32
PAGES_PER_SUPERPAGE = 8
SUPERPAGE_SIZE = PAGE_SIZE * PAGES_PER_SUPERPAGE
# Larger paged_segments sort better and smaller ones are ready earlier: four of one size become one of the next.
LENGTHS = (16384, 4096, 1024, 256)
STABLE_STEP = 4096  # tokens behind the last multiple of it in a block that may still grow are read as they are

PageTables = tuple[Tensor, ...]


@dataclass
class PagedSegment:
    """What is cache of a paged_segment's pages.

    Attributes:
        rows: (kv_heads, pages, PAGE_SIZE) int32, where a page's tokens are in the block's (kv_heads * capacity) rows.
        pages: mean and variance of the keys and mean of the values, (kv_heads, pages, 3 * head_dim).
        superpages: the same of superpages, each (kv_heads, pages / PAGES_PER_SUPERPAGE, head_dim) float32.
    """

    rows: Tensor
    pages: Tensor
    superpages: PageTables


def aligned_ranges(span: Span, lengths: Sequence[int] = LENGTHS) -> tuple[list[tuple[int, int]], list[Span]]:
    """A span as paged_segments (start, stop), as large as they fit, and the spans that are left over.

    Stretches lie at multiples of their length in the block, so that whoever shares the block shares them.
    """
    ranges: list[tuple[int, int]] = []
    rest: list[Span] = []
    at = span.start
    while at < span.stop:
        length = next((n for n in lengths if at % n == 0 and at + n <= span.stop), 0)
        if length:
            ranges.append((at, at + length))
            at += length
        else:
            stop = min(span.stop, at - at % lengths[-1] + lengths[-1])
            rest.append(Span(span.block, at, stop))
            at = stop
    return ranges, rest


def get_or_build(block: Block, start: int, stop: int) -> PagedSegment:
    """A block's paged_segment, made if it isn't yet cache; it then stands for the smaller ones in it."""
    cache = block.search_cache.setdefault("page_segments", {})
    assert isinstance(cache, dict)
    if (start, stop) not in cache:
        cache[start, stop] = _build(block, start, stop)
        for other in [(a, b) for a, b in list(cache) if start <= a and b <= stop and (a, b) != (start, stop)]:
            cache.pop(other, None)
    return cache[start, stop]


def get_or_merge(block: Block, ranges: Sequence[tuple[int, int]]) -> PagedSegment:
    """Stretches that lie one behind the other, as one: what single ones hold then are views of its tables."""
    cache = _merged_cache(block)
    key = ranges[0][0], ranges[-1][1]
    if key not in cache:
        paged_segments = [get_or_build(block, *each) for each in ranges]
        if len(paged_segments) == 1:
            return paged_segments[0]
        superpages = zip(*(paged_segment.superpages for paged_segment in paged_segments), strict=True)
        merged = PagedSegment(
            torch.cat([paged_segment.rows for paged_segment in paged_segments], 1),
            torch.cat([paged_segment.pages for paged_segment in paged_segments], 1),
            tuple(torch.cat(tables, 1) for tables in superpages),
        )
        at = 0
        for paged_segment in paged_segments:
            pages = slice(at, at + paged_segment.rows.shape[1])
            paged_segment.rows, paged_segment.pages = merged.rows[:, pages], merged.pages[:, pages]
            at = pages.stop
        # A longer one takes the key of those before it, which would take as much room again.
        cache.clear()
        cache[key] = merged
    return cache[key]


def install(block: Block, ranges: Sequence[tuple[int, int]], merged: PagedSegment) -> None:
    """Take over, as one, paged_segments that were made before, of a block of the same content and capacity."""
    _merged_cache(block)[ranges[0][0], ranges[-1][1]] = merged


def _merged_cache(block: Block) -> dict[tuple[int, int], PagedSegment]:
    cache = block.search_cache.setdefault("merged_page_segments", {})
    assert isinstance(cache, dict)
    return cache


def _build(block: Block, start: int, stop: int) -> PagedSegment:
    span = Span(block, start, stop)
    keys = span.keys(torch.float32)
    heads, tokens, head_dim = keys.shape
    order = balanced_pca_partition(keys, PAGE_SIZE)
    offsets = torch.arange(heads, device=keys.device).unsqueeze(1)
    rows = (order + offsets * tokens).view(-1)

    def sorted_pages(tensor: Tensor) -> Tensor:
        return tensor.reshape(-1, head_dim).index_select(0, rows).view(heads, -1, PAGE_SIZE, head_dim)

    keys = sorted_pages(keys)
    means = keys.mean(2)
    pages = (means, keys.var(2, unbiased=False), sorted_pages(span.values(torch.float32)).mean(2))
    superpage_tables = [table.unflatten(1, (-1, PAGES_PER_SUPERPAGE)) for table in pages]
    superpages = (
        superpage_tables[0].mean(2),
        superpage_tables[1].mean(2) + superpage_tables[0].var(2, unbiased=False),
        superpage_tables[2].mean(2),
    )
    # Pages are many: unless the memory itself is more exact, half the bytes are enough for them.
    table_dtype = torch.float32 if block.keys.dtype == torch.float32 else torch.bfloat16
    token_rows = (order + start + offsets * block.capacity).view(heads, -1, PAGE_SIZE).int()
    return PagedSegment(token_rows, torch.cat(pages, -1).to(table_dtype), superpages)


def stable_spans(spans: Sequence[Span], min_tokens: int) -> tuple[list[Span], list[Span]]:
    """Spans as those that are stable and have at min_tokens so many tokens, and what is left of them.

    The last tokens in a block with room aren't stable: it pays to know more of them when there are more of them.
    """
    stable, rest = [], []
    for span in _merge_adjacent(spans):
        stop = span.stop
        if stop == span.block.filled and span.block.free:
            stop = max(span.start, stop - stop % STABLE_STEP)
        if stop - span.start < min_tokens:
            stop = span.start
        stable.append(Span(span.block, span.start, stop))
        rest.append(Span(span.block, stop, span.stop))
    return [span for span in stable if len(span)], [span for span in rest if len(span)]


def _merge_adjacent(spans: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for span in sorted(spans, key=lambda span: (id(span.block), span.start)) if len(spans) > 1 else spans:
        if merged and merged[-1].block is span.block and merged[-1].stop == span.start:
            merged[-1] = Span(span.block, merged[-1].start, span.stop)
        else:
            merged.append(span)
    return merged

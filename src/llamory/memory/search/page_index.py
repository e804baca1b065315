"""Volumes: all stretches of a layer's memory, of however many documents, in which pages are looked up by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamory.memory.blocks import Block, Span
from llamory.memory.search.exact import needs_conversion
from llamory.memory.search.page_segments import (
    PAGE_SIZE,
    PAGES_PER_SUPERPAGE,
    SUPERPAGE_SIZE,
    PagedSegment,
    PageTables,
    aligned_ranges,
    get_or_merge,
    stable_spans,
)
from llamory.memory.search.workspace import workspace

MAX_CACHED_INDEXES = 2  # of memories that begin with the same block, such as forks that went on


@dataclass
class BlockPages:
    """The pages of one block.

    Attributes:
        block: where their tokens are.
        paged_segment: what is cache of them.
        first, last: number of the first page in the page_index, and of the one behind the last.
    """

    block: Block
    paged_segment: PagedSegment
    first: int
    last: int


@dataclass
class LayerPageIndex:
    """Pages and superpages of a layer's memory, numbered part by part, and the tokens that are in no page.

    Only what is cache of the superpages is joined, as all of them are looked at: pages stay where they are, so that
    mounting a large memory, whose tables come from files, doesn't mean reading it.
    """

    parts: list[BlockPages]
    superpages: PageTables
    rest: list[Span]

    @property
    def page_count(self) -> int:
        """Pages per head."""
        return self.parts[-1].last if self.parts else 0

    def superpage_tables(self, page_ids: Tensor) -> Tensor:
        """What is cache of the pages of superpages (kv_heads, groups, superpages): (kv_heads, groups, pages, 3 * head_dim).

        In float32; the next call uses the same room.
        """
        width = self.parts[0].paged_segment.pages.shape[2]
        tables = [part.paged_segment.pages.unflatten(1, (-1, PAGES_PER_SUPERPAGE)).flatten(2) for part in self.parts]
        page_gather = _PageGather(page_ids, [part.first // PAGES_PER_SUPERPAGE for part in self.parts])
        selected = page_gather.restore_order(page_gather.select(tables, "tables"), "tables")
        return _convert(selected, torch.float32, "tables").view(*page_ids.shape[:2], -1, width)

    def gather(self, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, PAGE_SIZE, head_dim) of all of these pages (kv_heads, groups, pages), one after another.

        In float32 where that is faster to read, else as the memory is kept. The next call uses the same room.
        """
        block = self.parts[0].block
        dtype = torch.float32 if block.key_scales is not None or needs_conversion(block.keys) else block.keys.dtype
        page_gather = _PageGather(page_ids, [part.first for part in self.parts])
        rows = page_gather.select([part.paged_segment.rows for part in self.parts], "rows").view(-1)

        def gathered(name: str) -> Tensor:
            tensors = [getattr(part.block, name) for part in self.parts]
            selected = _workspace_for(name, tensors[0], len(rows), *tensors[0].shape[2:])
            for tensor, part in zip(tensors, page_gather.parts(PAGE_SIZE), strict=True):
                _select(tensor.flatten(0, 1), rows[part], selected[part])
            return page_gather.restore_order(selected.view(page_ids.numel(), -1), name)

        def pages(name: str) -> Tensor:
            return _convert(gathered(name), dtype, name).view(-1, PAGE_SIZE, block.keys.shape[2])

        keys, values = pages("keys"), pages("values")
        if block.key_scales is not None:
            keys *= gathered("key_scales").unsqueeze(-1)
            values *= gathered("value_scales").unsqueeze(-1)
        return keys, values


class _PageGather:
    """What is sorted_ids out of several parts by number.

    Args:
        page_ids: (kv_heads, groups, count).
        offsets: the first number of each part.
    """

    def __init__(self, page_ids: Tensor, offsets: Sequence[int]):
        device, per_head = page_ids.device, page_ids[0].numel()
        sorted_ids = page_ids.reshape(-1)
        heads = torch.arange(len(page_ids), device=device).repeat_interleave(per_head)
        self._offsets, self._bounds, self._inverse = offsets, [0, len(sorted_ids)], None
        if len(offsets) > 1:
            # Sorted by their number, those of each part stand together.
            sorted_ids, order = sorted_ids.sort()
            heads = heads[order]
            edges = torch.tensor(offsets[1:], device=device)
            self._bounds = [0, *torch.searchsorted(sorted_ids, edges).tolist(), len(sorted_ids)]
            self._inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        self._sorted_ids, self._heads = sorted_ids, heads

    def parts(self, repeats: int = 1) -> list[slice]:
        """Where the page_gather of each part stand, if each takes so many ranges."""
        return [
            slice(start * repeats, stop * repeats) for start, stop in zip(self._bounds, self._bounds[1:], strict=False)
        ]

    def select(self, tables: Sequence[Tensor], name: str) -> Tensor:
        """What was sorted_ids of the parts' tables (kv_heads, entries, width), part by part: (page_gather, width)."""
        selected = _workspace_for(name, tables[0], len(self._sorted_ids), tables[0].shape[2])
        for table, first, part in zip(tables, self._offsets, self.parts(), strict=True):
            at = self._sorted_ids[part] - first + self._heads[part] * table.shape[1]
            _select(table.reshape(-1, table.shape[2]), at, selected[part])
        return selected

    def restore_order(self, selected: Tensor, name: str) -> Tensor:
        """What stands part by part, (page_gather, width), in the order of the page_ids."""
        if self._inverse is None:
            return selected
        return _select(
            selected, self._inverse, workspace(f"ordered {name}", selected.shape, selected.dtype, selected.device)
        )


def get_or_build_index(spans: Sequence[Span]) -> tuple[LayerPageIndex | None, list[Span]]:
    """The stretches of some spans, None if they are too few tokens for one, and what is to be read besides.

    The order of the spans makes no difference. Volumes are kept, beside their first block's search_cache, until memory
    has grown by a step: one new token costs nothing here.
    """
    stable, rest = stable_spans(spans, SUPERPAGE_SIZE)
    if not stable:
        return None, rest
    cache = stable[0].block.search_cache.setdefault("page_indexes", {})
    assert isinstance(cache, dict)
    # Blocks stay alive as long as a page_index that holds them, so their ids name them.
    name = tuple((id(span.block), span.start, span.stop) for span in stable)
    if name not in cache:
        while len(cache) >= MAX_CACHED_INDEXES:
            cache.pop(next(iter(cache)), None)
        cache[name] = _build(stable)
    page_index = cache[name]
    return (page_index if page_index.parts else None), [*page_index.rest, *rest]


def _build(spans: Sequence[Span]) -> LayerPageIndex:
    """One page_index of what is in some spans."""
    parts: list[BlockPages] = []
    rest: list[Span] = []
    at = 0
    for span in spans:
        ranges, remaining = aligned_ranges(span)
        rest += remaining
        if ranges:
            paged_segment = get_or_merge(span.block, ranges)
            last = at + paged_segment.rows.shape[1]
            parts.append(BlockPages(span.block, paged_segment, at, last))
            at = last
    tables = zip(*(part.paged_segment.superpages for part in parts), strict=True)
    return LayerPageIndex(parts, tuple(torch.cat(each, 1) for each in tables), _compact(rest))


def _compact(spans: list[Span]) -> list[Span]:
    """The same tokens in a block of their own: what many documents leave over is then read at once."""
    if len(spans) < 2:
        return spans
    keys = spans[0].block.keys
    block = Block.allocate(len(keys), sum(map(len, spans)), keys.shape[2], keys.dtype, keys.device)
    for span in spans:
        block.append_span(span)
    return [Span(block, 0, block.filled)]


def _workspace_for(name: str, like: Tensor, *shape: int) -> Tensor:
    return workspace(f"sorted_ids {name}", shape, like.dtype, like.device)


def _select(table: Tensor, at: Tensor, target: Tensor) -> Tensor:
    """Rows of a table into a target, which is given back."""
    return torch.index_select(table, 0, at, out=target) if len(at) else target


def _convert(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    return workspace(f"converted {name}", tensor.shape, dtype, tensor.device).copy_(tensor)

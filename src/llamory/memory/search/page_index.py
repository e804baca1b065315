"""The index of the paged search: tokens grouped by similar keys into pages, and pages into superpages.

Per head it stores an order in which neighbours are similar; tokens stay where they are in their block. Ranges of a
block are indexed once, for all banks that share it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llamory.common.io import atomic_file
from llamory.memory.bank import MemoryBank
from llamory.memory.blocks import Block, Span, SpanList, merge_spans
from llamory.memory.files import tensor_bytes
from llamory.memory.search.base import workspace
from llamory.memory.search.exact import needs_conversion

PAGE_SIZE = 32
PAGES_PER_SUPERPAGE = 8
SUPERPAGE_SIZE = PAGE_SIZE * PAGES_PER_SUPERPAGE
# Tokens of a range. Longer ranges group better and shorter ones are ready earlier: four of one length become one.
LENGTHS = (16384, 4096, 1024, 256)
STABLE_STEP = 4096  # tokens after the last multiple of it in a block that may still grow are not indexed
MAX_CACHED_INDEXES = 2  # of memories that begin with the same block, such as forks that were continued
DIRECTION_SAMPLE = 128  # vectors of a group that its principal direction is computed from
POWER_STEPS = 3  # more make the direction more exact, but not the groups better
FILE_VERSION = 2
_TABLES = ("rows", "pages", "means", "variances", "values")

Range = tuple[int, int]
T = TypeVar("T")


@dataclass
class PagedRange:
    """The pages of a range of a block."""

    rows: Tensor  # (kv_heads, pages, PAGE_SIZE) int32: a page's tokens in the block's (kv_heads * capacity) rows
    pages: Tensor  # mean and variance of the keys and mean of the values, (kv_heads, pages, 3 * head_dim)
    superpages: tuple[Tensor, ...]  # the same three, each (kv_heads, superpages, head_dim) float32


def stable_spans(spans: Sequence[Span], min_tokens: int) -> tuple[list[Span], list[Span]]:
    """The parts of spans worth indexing (at least `min_tokens` tokens that won't change), and the rest."""
    stable, rest = [], []
    for span in merge_spans(sorted(spans, key=lambda span: (id(span.block), span.start))):
        stop = span.stop
        if stop == span.block.filled and span.block.free:
            stop = max(span.start, stop - stop % STABLE_STEP)
        if stop - span.start < min_tokens:
            stop = span.start
        stable.append(Span(span.block, span.start, stop))
        rest.append(Span(span.block, stop, span.stop))
    return [span for span in stable if len(span)], [span for span in rest if len(span)]


def aligned_ranges(span: Span, lengths: Sequence[int] = LENGTHS) -> tuple[list[Range], list[Span]]:
    """A span as ranges (start, stop) at multiples of their length, the largest that fits, and the spans left over."""
    ranges: list[Range] = []
    rest: list[Span] = []
    start = span.start
    while start < span.stop:
        length = next((n for n in lengths if start % n == 0 and start + n <= span.stop), 0)
        stop = start + length
        if length:
            ranges.append((start, stop))
        else:
            stop = min(span.stop, start - start % lengths[-1] + lengths[-1])
            rest.append(Span(span.block, start, stop))
        start = stop
    return ranges, rest


def get_or_build_range(cache: dict[Any, T], start: int, stop: int, build: Callable[[], T]) -> T:
    """The cached index of a range, built on demand; it replaces those of the ranges in it."""
    if (start, stop) not in cache:
        cache[start, stop] = build()
        for other in list(cache):
            if start <= other[0] and other[1] <= stop and other != (start, stop):
                cache.pop(other, None)
    return cache[start, stop]


def get_or_merge(block: Block, ranges: Sequence[Range]) -> PagedRange:
    """The pages of adjacent ranges as one; the tables of the single ranges become views of it."""
    cache = block.search_cache.setdefault("merged_paged_ranges", {})
    key = ranges[0][0], ranges[-1][1]
    if key not in cache:
        built = block.search_cache.setdefault("paged_ranges", {})
        parts = [get_or_build_range(built, *each, partial(_build, block, *each)) for each in ranges]
        if len(parts) == 1:
            return parts[0]
        superpages = zip(*(part.superpages for part in parts), strict=True)
        rows, pages = (torch.cat([getattr(part, name) for part in parts], 1) for name in ("rows", "pages"))
        merged = PagedRange(rows, pages, tuple(torch.cat(tables, 1) for tables in superpages))
        counts = [part.rows.shape[1] for part in parts]
        for part, *tables in zip(parts, rows.split(counts, 1), pages.split(counts, 1), strict=True):
            part.rows, part.pages = tables
        cache.clear()  # a longer one replaces those before it, which would take as much memory again
        cache[key] = merged
    return cache[key]


def _build(block: Block, start: int, stop: int) -> PagedRange:
    span = Span(block, start, stop)
    keys = span.keys(torch.float32)
    heads, tokens, head_dim = keys.shape
    order = balanced_pca_partition(keys, PAGE_SIZE)
    offsets = torch.arange(heads, device=keys.device).unsqueeze(1)
    rows = (order + offsets * tokens).view(-1)

    def sorted_pages(tensor: Tensor) -> Tensor:  # (kv_heads, pages, PAGE_SIZE, head_dim)
        return tensor.reshape(-1, head_dim).index_select(0, rows).view(heads, -1, PAGE_SIZE, head_dim)

    keys = sorted_pages(keys)
    pages = (keys.mean(2), keys.var(2, unbiased=False), sorted_pages(span.values(torch.float32)).mean(2))
    means, variances, values = (table.unflatten(1, (-1, PAGES_PER_SUPERPAGE)) for table in pages)
    superpages = (means.mean(2), variances.mean(2) + means.var(2, unbiased=False), values.mean(2))
    # Pages are many: unless the memory itself is more exact, half the bytes are enough for them.
    table_dtype = torch.float32 if block.keys.dtype == torch.float32 else torch.bfloat16
    token_rows = (order + start + offsets * block.capacity).view(heads, -1, PAGE_SIZE).int()
    return PagedRange(token_rows, torch.cat(pages, -1).to(table_dtype), superpages)


def balanced_pca_partition(vectors: Tensor, size: int) -> Tensor:
    """An order of vectors (heads, count, head_dim) in which every `size` neighbours are similar: (heads, count) int64.

    Groups are halved at the median of their projection on the first principal direction until they have `size` vectors;
    count must be `size` times a power of two.
    """
    heads, count, head_dim = vectors.shape
    order = torch.arange(count, device=vectors.device).expand(heads, count)
    groups = vectors  # (heads * groups, vectors of a group, head_dim)
    while groups.shape[1] > size:
        within = (groups @ _directions(groups)).squeeze(-1).argsort(1)
        half = (2 * len(groups), groups.shape[1] // 2)
        order = order.reshape(groups.shape[:2]).gather(1, within).view(half)
        flat = (within + torch.arange(len(groups), device=within.device).unsqueeze(1) * groups.shape[1]).view(-1)
        groups = groups.reshape(-1, head_dim).index_select(0, flat).view(*half, head_dim)
    return order.reshape(heads, count)


def _directions(groups: Tensor) -> Tensor:
    """Each group's direction of largest variance, (groups, head_dim, 1), by power iteration on some of its vectors."""
    sample = groups[:, :: max(1, groups.shape[1] // DIRECTION_SAMPLE)]
    centered = sample - sample.mean(1, keepdim=True)
    farthest = centered.square().sum(-1).argmax(1)
    direction = centered[torch.arange(len(groups), device=groups.device), farthest].unsqueeze(-1)
    for _ in range(POWER_STEPS):
        direction = centered.transpose(1, 2) @ (centered @ direction)
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return direction


@dataclass
class LayerPageIndex:
    """All pages and superpages of a layer's memory, numbered block by block, and the tokens that are in no page."""

    blocks: list[Block]
    ranges: list[PagedRange]
    offsets: list[int]  # number of the first page of each block, and the number of all pages of a head
    superpages: tuple[Tensor, ...]
    rest: list[Span]

    @property
    def page_count(self) -> int:
        """Pages per head."""
        return self.offsets[-1]

    def superpage_tables(self, page_ids: Tensor) -> Tensor:
        """Tables (kv_heads, groups, pages, 3 * head_dim) of the pages of superpages (kv_heads, groups, superpages).

        In float32; the next call reuses the storage.
        """
        tables = [each.pages.unflatten(1, (-1, PAGES_PER_SUPERPAGE)).flatten(2) for each in self.ranges]
        page_gather = _PageGather(page_ids, [offset // PAGES_PER_SUPERPAGE for offset in self.offsets])
        selected = page_gather.restore_order(page_gather.select(tables, "tables"), "tables")
        return _convert(selected, torch.float32, "tables").view(*page_ids.shape[:2], -1, self.ranges[0].pages.shape[2])

    def gather(self, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (pages, PAGE_SIZE, head_dim) of all these pages (kv_heads, groups, pages), flattened.

        In float32 where that is faster to read, else in the memory's type. The next call reuses the storage.
        """
        block = self.blocks[0]
        dtype = torch.float32 if block.key_scales is not None or needs_conversion(block.keys) else block.keys.dtype
        page_gather = _PageGather(page_ids, self.offsets)
        rows = page_gather.select([each.rows for each in self.ranges], "rows").view(-1)

        def gathered(name: str) -> Tensor:
            tensors = [getattr(block, name) for block in self.blocks]
            selected = _workspace_like(name, tensors[0], len(rows), *tensors[0].shape[2:])
            for tensor, part in zip(tensors, page_gather.parts(PAGE_SIZE), strict=True):
                _select(tensor.flatten(0, 1), rows[part], selected[part])
            return page_gather.restore_order(selected.view(page_ids.numel(), -1), name)

        shape = -1, PAGE_SIZE, block.keys.shape[2]
        keys, values = (_convert(gathered(name), dtype, name).view(shape) for name in ("keys", "values"))
        if block.key_scales is not None:
            keys *= gathered("key_scales").unsqueeze(-1)
            values *= gathered("value_scales").unsqueeze(-1)
        return keys, values


def get_or_build_index(spans: SpanList) -> tuple[LayerPageIndex | None, list[Span]]:
    """The (cached) page index of spans on one device, None if they are too short, and the spans to read besides."""
    key = ("pages", STABLE_STEP)
    if key not in spans.derived:
        stable, rest = stable_spans(spans, SUPERPAGE_SIZE)
        cache = stable[0].block.search_cache.setdefault("page_indexes", {}) if stable else {}
        # An index keeps its blocks alive, so their ids identify them.
        name = tuple((id(span.block), span.start, span.stop) for span in stable)
        if name not in cache:
            while len(cache) >= MAX_CACHED_INDEXES:
                cache.pop(next(iter(cache)), None)
            cache[name] = _build_index(stable)
        index = cache[name]
        spans.derived[key] = (index if index.blocks else None), [*index.rest, *rest]
    return spans.derived[key]


def _build_index(spans: Sequence[Span]) -> LayerPageIndex:
    index = LayerPageIndex([], [], [0], (), [])
    for span in spans:
        ranges, remaining = aligned_ranges(span)
        index.rest += remaining
        if ranges:
            index.blocks.append(span.block)
            index.ranges.append(get_or_merge(span.block, ranges))
            index.offsets.append(index.page_count + index.ranges[-1].rows.shape[1])
    tables = zip(*(each.superpages for each in index.ranges), strict=True)
    index.superpages, index.rest = tuple(torch.cat(each, 1) for each in tables), _compact(index.rest)
    return index


def _compact(spans: list[Span]) -> list[Span]:
    """The same tokens in a block of their own: one read for what many documents leave over."""
    if len(spans) < 2:
        return spans
    keys = spans[0].block.keys
    block = Block.allocate(len(keys), sum(map(len, spans)), keys.shape[2], keys.dtype, keys.device)
    for span in spans:
        block.append_span(span)
    return [Span(block, 0, block.filled)]


class _PageGather:
    """Selects entries, by their numbers `ids` (kv_heads, groups, count), from tables between the `offsets`."""

    def __init__(self, ids: Tensor, offsets: Sequence[int]):
        sorted_ids, device = ids.reshape(-1), ids.device
        heads = torch.arange(len(ids), device=device).repeat_interleave(ids[0].numel())
        self._offsets, self._bounds, self._inverse = offsets, [0, len(sorted_ids)], None
        if len(offsets) > 2:
            # Sorted by their number, those of each part are adjacent.
            sorted_ids, order = sorted_ids.sort()
            heads = heads[order]
            edges = torch.tensor(offsets[1:-1], device=device)
            self._bounds = [0, *torch.searchsorted(sorted_ids, edges).tolist(), len(sorted_ids)]
            self._inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=device))
        self._sorted_ids, self._heads = sorted_ids, heads

    def parts(self, repeats: int = 1) -> list[slice]:
        """The positions of each part's entries, if each entry takes `repeats` positions."""
        return [slice(a * repeats, b * repeats) for a, b in zip(self._bounds, self._bounds[1:], strict=False)]

    def select(self, tables: Sequence[Tensor], name: str) -> Tensor:
        """The entries from the parts' tables (kv_heads, entries, width), sorted by part: (entries, width)."""
        selected = _workspace_like(name, tables[0], len(self._sorted_ids), tables[0].shape[2])
        for table, offset, part in zip(tables, self._offsets, self.parts(), strict=False):
            indices = self._sorted_ids[part] - offset + self._heads[part] * table.shape[1]
            _select(table.reshape(-1, table.shape[2]), indices, selected[part])
        return selected

    def restore_order(self, selected: Tensor, name: str) -> Tensor:
        """Entries (entries, width) in the order of the ids instead of sorted by part."""
        if self._inverse is None:
            return selected
        target = _workspace_like(f"ordered {name}", selected, *selected.shape)
        return _select(selected, self._inverse, target)


def _workspace_like(name: str, like: Tensor, *shape: int) -> Tensor:
    return workspace(f"selected {name}", shape, like.dtype, like.device)


def _select(table: Tensor, indices: Tensor, target: Tensor) -> Tensor:
    return torch.index_select(table, 0, indices, out=target) if len(indices) else target


def _convert(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    return workspace(f"converted {name}", tensor.shape, dtype, tensor.device).copy_(tensor)


def save_pages(bank: MemoryBank, path: Path) -> None:
    """Build the pages of a memory of one document, as loaded from a file, and write them to a file, atomically."""
    tensors: dict[str, Tensor] = {}
    for layer, block, ranges in _layer_ranges(bank):
        if ranges:
            paged = get_or_merge(block, ranges)
            parts = (paged.rows, paged.pages, *paged.superpages)
            tensors |= {f"layers.{layer}.{name}": part for name, part in zip(_TABLES, parts, strict=True)}
    with atomic_file(path) as file:
        file.write(save(tensors, {"pages": _identity(bank), "checksum": _checksum(tensors)}))


def load_pages(bank: MemoryBank, path: Path) -> bool:
    """Read the pages of a memory of one document from a file; False if it hasn't the pages of exactly this memory."""
    with suppress(OSError, SafetensorError, KeyError), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("pages") != _identity(bank):
            return False
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 -- it is no dictionary
        if metadata.get("checksum") != _checksum(tensors):
            return False
        layer_ranges = [each for each in _layer_ranges(bank) if each[2]]
        tables = [[tensors[f"layers.{layer}.{name}"] for name in _TABLES] for layer, _, _ in layer_ranges]
        for (_, block, ranges), (rows, pages, *superpages) in zip(layer_ranges, tables, strict=True):
            cache = block.search_cache.setdefault("merged_paged_ranges", {})
            cache[ranges[0][0], ranges[-1][1]] = PagedRange(rows, pages, tuple(superpages))
        return True
    return False


def page_bytes(bank: MemoryBank, tokens: int) -> int:
    """Bytes of the pages' tables, at most, for so many tokens of a memory of this kind, without the file's header."""
    element_bytes = 4 if bank.dtype == torch.float32 else 2
    # The row of each token, three vectors per page, and three per superpage.
    per_token = 4 + 3 * bank.head_dim * (element_bytes / PAGE_SIZE + 4 / SUPERPAGE_SIZE)
    return int(len(bank.layers) * bank.kv_heads * tokens * per_token)


def _layer_ranges(bank: MemoryBank) -> list[tuple[int, Block, list[Range]]]:
    """Each layer's block and its ranges; nothing for layers whose tokens aren't one span."""
    spans = [(layer, bank.spans(layer)) for layer in bank.layers]
    return [(layer, each[0].block, aligned_ranges(each[0])[0]) for layer, each in spans if len(each) == 1]


def _identity(bank: MemoryBank) -> str:
    """What the pages depend on: the memory's content and the constants of the index."""
    constants = [FILE_VERSION, PAGE_SIZE, PAGES_PER_SUPERPAGE, LENGTHS, bank.fingerprint, str(bank.dtype)]
    layers = [(layer, block.capacity, len(ranges), _content(block)) for layer, block, ranges in _layer_ranges(bank)]
    return json.dumps([*constants, bank.kv_heads, bank.head_dim, layers])


def _content(block: Block) -> str:
    """Identifies the tokens of a block: the checksums of its file, or those that a file of it would have."""
    tensors = (tensor_bytes(each[:, : block.filled]) for each in block.tensors)
    return block.checksum or "-".join(map(xxhash.xxh3_64_hexdigest, tensors))


def _checksum(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_64()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()

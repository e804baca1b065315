"""Exact attention over spans of memory: everything is read, in the way that suits the machine and the memory's type."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llamory.memory.attention import AttentionAccumulator, empty_attention, flash
from llamory.memory.blocks import Span
from llamory.memory.search.workspace import workspace

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

CHUNK = 4096  # tokens per head that are converted and read while they are in the processor's cache
TOLERANCE = 0.1  # expected error, as a share of the values' size, from which a query reads everything after all
EXACT_QUERIES = 8  # so many of a row's queries may at once, per key-value head,
MAX_EXACT_FRACTION = 16  # or one in so many
MAX_TRANSFERRED_QUERIES = 512  # per head: more than selected stay where they are, and the memory travels to them


class AttentionResult(NamedTuple):
    """Attention of folded queries.

    Attributes:
        output: (kv_heads, queries, head_dim).
        lse: log-sum-exp of all tokens, (kv_heads, queries).
        read_lse: log-sum-exp of those that were read, the same shape: exp(read_lse - lse) of the attention.
    """

    output: Tensor
    lse: Tensor
    read_lse: Tensor


class ExactSearch:
    """Reads all keys and values."""

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`."""
        spans = bank.spans(layer)
        if not spans:
            return empty_attention(query)
        grouped_query = group_heads(query, spans[0].block.keys.shape[0])
        return ungroup_heads(*attend_spans(grouped_query, spans, scaling), query)


def group_heads(query: Tensor, kv_heads: int) -> Tensor:
    """Query (rows, heads, queries, head_dim) as (kv_heads, all queries that read that head, head_dim)."""
    rows, head_dim = len(query), query.shape[-1]
    return query.reshape(rows, kv_heads, -1, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)


def ungroup_heads(output: Tensor, lse: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `group_heads` for an output and its log-sum-exp."""
    rows = len(query)
    output = output.view(len(output), rows, -1, query.shape[-1]).transpose(0, 1).reshape(query.shape)
    lse = lse.view(len(lse), rows, -1).transpose(0, 1).reshape(query.shape[:-1])
    return output.to(query.dtype), lse


def attend_spans(
    query: Tensor, spans: Sequence[Span], scaling: float, head: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of folded queries over all tokens of some spans.

    Args:
        query: (kv_heads, queries, head_dim), or (1, queries, head_dim) with `head`.
        spans: what to read, on whatever devices.
        scaling: what scores are multiplied by.
        head: the only key-value head to read.

    Returns:
        Output of the query's shape, and the log-sum-exp (kv_heads, queries) in float32.
    """
    parts, heads = AttentionAccumulator(), slice(None) if head is None else slice(head, head + 1)
    for span in spans:
        if (device := span.block.keys.device) == query.device:
            _attend_span(query, span, scaling, heads, parts)
        elif query.shape[1] <= MAX_TRANSFERRED_QUERIES:
            device_parts = AttentionAccumulator()
            _attend_span(query.to(device), span, scaling, heads, device_parts)
            output, lse = device_parts.result(query)
            parts.add(output.to(query.device), lse.to(query.device))
        else:
            for part in span.split(CHUNK * 4):
                keys, values = (t[heads].to(query.device) for t in (part.keys(), part.values()))
                output, lse = flash(query[None], keys[None], values[None], scaling=scaling)
                parts.add(output[0], lse[0])
    return parts.result(query)


def refine_uncertain(
    estimate: AttentionResult,
    error: Tensor,
    tolerance: float,
    query: Tensor,
    rows: int,
    spans: Sequence[Span],
    scaling: float,
) -> AttentionResult:
    """Put exact attention in the place of estimates that may be far off: the worst of a row, but not too many at once.

    Args:
        estimate: what was found; changed in place.
        error: what is expected of it, as a share of the values' size, (kv_heads, queries).
        tolerance: error from which a query reads everything.
        query, spans, scaling: as for `read`.
        rows: of the batch, that the queries are of.
    """
    error = error.view(len(error), rows, -1)
    queries = error.shape[2]
    limit = min(queries, max(EXACT_QUERIES, queries // MAX_EXACT_FRACTION))
    largest, at = error.topk(limit, 2)
    at = at + torch.arange(rows, device=at.device).unsqueeze(1) * queries
    uncertain = largest > tolerance
    for head, any_uncertain in enumerate(uncertain.flatten(1).any(1).tolist()):
        if any_uncertain:
            selected = at[head][uncertain[head]]
            exact_output, exact_lse = attend_spans(query[head : head + 1, selected], spans, scaling, head)
            estimate.output[head, selected] = exact_output[0]
            estimate.lse[head, selected] = estimate.read_lse[head, selected] = exact_lse[0]
    return estimate


def _attend_span(query: Tensor, span: Span, scaling: float, heads: slice, parts: AttentionAccumulator) -> None:
    block = span.block
    if not needs_conversion(block.keys):
        subspans = span.split(CHUNK * 4) if block.keys.dtype == torch.int8 else [span]
        for subspan in subspans:
            keys, values = subspan.keys()[heads], subspan.values()[heads]
            output, lse = flash(query[None], keys[None], values[None], scaling=scaling)
            parts.add(output[0], lse[0])
        return
    query = query.float()
    splits = _num_splits(len(query))
    repeated = query.repeat_interleave(splits, 0)[None]
    # Tokens that can't be split evenly come last, in a call of their own.
    even = span.stop - len(span) % splits
    for start in range(span.start, even, CHUNK * splits):
        tokens = slice(start, min(start + CHUNK * splits, even))
        shape = (1, len(query) * splits, (tokens.stop - tokens.start) // splits, query.shape[-1])
        keys = _to_float32(block.keys, block.key_scales, heads, tokens, "keys").view(shape)
        values = _to_float32(block.values, block.value_scales, heads, tokens, "values").view(shape)
        output, lse = flash(repeated, keys, values, scaling=scaling)
        for split in range(splits):
            parts.add(output[0, split::splits], lse[0, split::splits])
    if even < span.stop:
        last = Span(block, even, span.stop)
        keys, values = last.keys(torch.float32)[heads], last.values(torch.float32)[heads]
        output, lse = flash(query[None], keys[None], values[None], scaling=scaling)
        parts.add(output[0], lse[0])


def needs_conversion(memory: Tensor) -> bool:
    """Whether memory is converted to float32, chunk by chunk, before it is read.

    Only on a CPU: its kernels are fast on bfloat16 where it has matrix tiles (AMX). Without them they read one query's
    bfloat16 memory at 5 GB/s, and reading a chunk twice, the second time out of the cache, is 2 to 3.5 times faster
    and, with many queries, no slower. Matrix products in float16 are slow on all of them, and int8 has to be scaled.
    """
    if memory.device.type != "cpu" or memory.dtype == torch.float32:
        return False
    return memory.dtype != torch.bfloat16 or not _has_amx_tiles()


@cache
def _has_amx_tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _num_splits(heads: int) -> int:
    """In how many parts a head's keys are read at once, so that all threads get the same work."""
    threads = torch.get_num_threads()
    return next(splits for splits in range(1, threads + 1) if heads * splits % threads == 0)


def _to_float32(tensor: Tensor, scales: Tensor | None, heads: slice, tokens: slice, name: str) -> Tensor:
    """Tokens of a block in float32."""
    source = tensor[heads, tokens]
    target = workspace(name, source.shape, torch.float32).copy_(source)
    if scales is not None:
        target *= scales[heads, tokens].unsqueeze(-1)
    return target

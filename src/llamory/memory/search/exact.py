"""Exact attention over spans of memory: everything is read, in the way that suits the machine and the memory's type."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llamory.memory.attention import Parts, flash, nothing
from llamory.memory.blocks import Span
from llamory.memory.search.workspace import scratch

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

CHUNK = 4096  # tokens per head that are converted and read while they are in the processor's cache
TOLERANCE = 0.1  # expected error, as a share of the values' size, from which a query reads everything after all
EXACT_QUERIES = 8  # so many of a row's queries may at once, per key-value head,
EXACT_SHARE = 16  # or one in so many
TRAVELLING_QUERIES = 512  # per head: more than these stay where they are, and the memory travels to them


class Found(NamedTuple):
    """Attention of folded queries.

    Attributes:
        output: (kv_heads, queries, head_dim).
        log_sum: log-sum-exp of all tokens, (kv_heads, queries).
        read_sum: log-sum-exp of those that were read, the same shape: exp(read_sum - log_sum) of the attention.
    """

    output: Tensor
    log_sum: Tensor
    read_sum: Tensor


class ExactSearch:
    """Reads all keys and values."""

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`."""
        spans = bank.spans(layer)
        if not spans:
            return nothing(query)
        folded = fold(query, spans[0].block.keys.shape[0])
        return unfold(*read(folded, spans, scaling), query)


def fold(query: Tensor, kv_heads: int) -> Tensor:
    """Query (rows, heads, queries, head_dim) as (kv_heads, all queries that read that head, head_dim)."""
    rows, head_dim = len(query), query.shape[-1]
    return query.reshape(rows, kv_heads, -1, head_dim).transpose(0, 1).reshape(kv_heads, -1, head_dim)


def unfold(output: Tensor, log_sum: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `fold` for an output and its log-sum-exp."""
    rows = len(query)
    output = output.view(len(output), rows, -1, query.shape[-1]).transpose(0, 1).reshape(query.shape)
    log_sum = log_sum.view(len(log_sum), rows, -1).transpose(0, 1).reshape(query.shape[:-1])
    return output.to(query.dtype), log_sum


def read(query: Tensor, spans: Sequence[Span], scaling: float, head: int | None = None) -> tuple[Tensor, Tensor]:
    """Attention of folded queries over all tokens of some spans.

    Args:
        query: (kv_heads, queries, head_dim), or (1, queries, head_dim) with `head`.
        spans: what to read, on whatever devices.
        scaling: what scores are multiplied by.
        head: the only key-value head to read.

    Returns:
        Output of the query's shape, and the log-sum-exp (kv_heads, queries) in float32.
    """
    parts, heads = Parts(), slice(None) if head is None else slice(head, head + 1)
    for span in spans:
        if (device := span.block.keys.device) == query.device:
            _read_span(query, span, scaling, heads, parts)
        elif query.shape[1] <= TRAVELLING_QUERIES:
            there = Parts()
            _read_span(query.to(device), span, scaling, heads, there)
            output, log_sum = there.result(query)
            parts.add(output.to(query.device), log_sum.to(query.device))
        else:
            for part in span.parts(CHUNK * 4):
                keys, values = (t[heads].to(query.device) for t in (part.keys(), part.values()))
                output, log_sum = flash(query[None], keys[None], values[None], scaling=scaling)
                parts.add(output[0], log_sum[0])
    return parts.result(query)


def read_uncertain(
    estimate: Found, error: Tensor, tolerance: float, query: Tensor, rows: int, spans: Sequence[Span], scaling: float
) -> Found:
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
    limit = min(queries, max(EXACT_QUERIES, queries // EXACT_SHARE))
    largest, at = error.topk(limit, 2)
    at = at + torch.arange(rows, device=at.device).unsqueeze(1) * queries
    uncertain = largest > tolerance
    for head, any_uncertain in enumerate(uncertain.flatten(1).any(1).tolist()):
        if any_uncertain:
            these = at[head][uncertain[head]]
            exactly, exact_sum = read(query[head : head + 1, these], spans, scaling, head)
            estimate.output[head, these] = exactly[0]
            estimate.log_sum[head, these] = estimate.read_sum[head, these] = exact_sum[0]
    return estimate


def _read_span(query: Tensor, span: Span, scaling: float, heads: slice, parts: Parts) -> None:
    block = span.block
    if not converts(block.keys):
        pieces = span.parts(CHUNK * 4) if block.keys.dtype == torch.int8 else [span]
        for piece in pieces:
            keys, values = piece.keys()[heads], piece.values()[heads]
            output, log_sum = flash(query[None], keys[None], values[None], scaling=scaling)
            parts.add(output[0], log_sum[0])
        return
    query = query.float()
    splits = _splits(len(query))
    repeated = query.repeat_interleave(splits, 0)[None]
    # Tokens that can't be split evenly come last, in a call of their own.
    even = span.stop - len(span) % splits
    for start in range(span.start, even, CHUNK * splits):
        tokens = slice(start, min(start + CHUNK * splits, even))
        shape = (1, len(query) * splits, (tokens.stop - tokens.start) // splits, query.shape[-1])
        keys = _converted(block.keys, block.key_scales, heads, tokens, "keys").view(shape)
        values = _converted(block.values, block.value_scales, heads, tokens, "values").view(shape)
        output, log_sum = flash(repeated, keys, values, scaling=scaling)
        for split in range(splits):
            parts.add(output[0, split::splits], log_sum[0, split::splits])
    if even < span.stop:
        last = Span(block, even, span.stop)
        keys, values = last.keys(torch.float32)[heads], last.values(torch.float32)[heads]
        output, log_sum = flash(query[None], keys[None], values[None], scaling=scaling)
        parts.add(output[0], log_sum[0])


def converts(memory: Tensor) -> bool:
    """Whether memory is converted to float32, chunk by chunk, before it is read.

    Only on a CPU: its kernels are fast on bfloat16 where it has matrix tiles (AMX). Without them they read one query's
    bfloat16 memory at 5 GB/s, and reading a chunk twice, the second time out of the cache, is 2 to 3.5 times faster
    and, with many queries, no slower. Matrix products in float16 are slow on all of them, and int8 has to be scaled.
    """
    if memory.device.type != "cpu" or memory.dtype == torch.float32:
        return False
    return memory.dtype != torch.bfloat16 or not _has_tiles()


@cache
def _has_tiles() -> bool:
    return torch.cpu._is_amx_tile_supported()


def _splits(heads: int) -> int:
    """In how many parts a head's keys are read at once, so that all threads get the same work."""
    threads = torch.get_num_threads()
    return next(splits for splits in range(1, threads + 1) if heads * splits % threads == 0)


def _converted(tensor: Tensor, scales: Tensor | None, heads: slice, tokens: slice, name: str) -> Tensor:
    """Tokens of a block in float32."""
    source = tensor[heads, tokens]
    target = scratch(name, source.shape, torch.float32).copy_(source)
    if scales is not None:
        target *= scales[heads, tokens].unsqueeze(-1)
    return target

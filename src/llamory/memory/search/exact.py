"""Exact attention over spans of memory, in the way that suits the device and the memory's type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from llamory.memory.blocks import Span, SpanList
from llamory.memory.search.base import AttentionAccumulator, AttentionResult, Search, flash, workspace

CHUNK = 4096  # tokens per head that are converted and read while they are in the processor's cache
TOLERANCE = 0.1  # default expected error, relative to the values' size, from which a query reads everything
EXACT_QUERIES = 8  # queries per row and key-value head that may read everything at once,
MAX_EXACT_FRACTION = 16  # or one in so many if that is more
MAX_TRANSFERRED_QUERIES = 512  # per head: more stay on their device, and the memory is copied to them


class ExactSearch(Search):
    """Reads all keys and values; `top_k` means nothing here."""

    def attend_grouped(self, query: Tensor, spans: SpanList, scaling: float, rows: int) -> AttentionResult:  # noqa: ARG002
        """See `Search.attend_grouped`."""
        output, lse = attend_spans(query, spans, scaling)
        return AttentionResult(output, lse, lse)


def attend_spans(query: Tensor, spans: Sequence[Span], scaling: float, head: int | None = None) -> tuple[Tensor, ...]:
    """Attention of grouped queries over all tokens of some spans, on whatever devices.

    `query` is (kv_heads, queries, head_dim), or (1, queries, head_dim) with `head`, the only head to read. Returns the
    output in its shape, and the log-sum-exp (kv_heads, queries) in float32.
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
                keys, values = (tensor[heads].to(query.device) for tensor in (part.keys(), part.values()))
                _add(query, keys, values, scaling, parts)
    return parts.result(query)


def refine_uncertain(
    result: AttentionResult, error: Tensor, tolerance: float, query: Tensor, rows: int, spans: SpanList, scaling: float
) -> AttentionResult:
    """Replace, in `result`, the most uncertain queries of each row by exact attention, up to a limited number.

    `error` (kv_heads, queries) is expected, relative to the values' size; from `tolerance` on a query reads everything.
    """
    error = error.view(len(error), rows, -1)
    queries = error.shape[2]
    largest, indices = error.topk(min(queries, max(EXACT_QUERIES, queries // MAX_EXACT_FRACTION)), 2)
    indices = indices + torch.arange(rows, device=indices.device).unsqueeze(1) * queries
    uncertain = largest > tolerance  # (kv_heads, rows, limit)
    for head, any_uncertain in enumerate(uncertain.flatten(1).any(1).tolist()):
        if any_uncertain:
            selected = indices[head][uncertain[head]]
            output, lse = attend_spans(query[head : head + 1, selected], spans, scaling, head)
            result.output[head, selected] = output[0]
            result.lse[head, selected] = result.read_lse[head, selected] = lse[0]
    return result


def _attend_span(query: Tensor, span: Span, scaling: float, heads: slice, parts: AttentionAccumulator) -> None:
    block = span.block
    if not needs_conversion(block.keys):
        for subspan in span.split(CHUNK * 4) if block.keys.dtype == torch.int8 else [span]:
            _add(query, subspan.keys()[heads], subspan.values()[heads], scaling, parts)
        return
    query = query.float()
    # A head's keys are read in so many parts at once that all threads get the same work.
    threads = torch.get_num_threads()
    splits = threads // math.gcd(threads, len(query))
    repeated = query.repeat_interleave(splits, 0)[None]
    # The tokens that can't be split evenly come last, in a call of their own.
    even_stop = span.stop - len(span) % splits
    for start in range(span.start, even_stop, CHUNK * splits):
        tokens = slice(start, min(start + CHUNK * splits, even_stop))
        shape = (1, len(query) * splits, (tokens.stop - tokens.start) // splits, query.shape[-1])
        keys = _to_float32(block.keys, block.key_scales, heads, tokens, "keys").view(shape)
        values = _to_float32(block.values, block.value_scales, heads, tokens, "values").view(shape)
        output, lse = flash(repeated, keys, values, scaling=scaling)
        for split in range(splits):
            parts.add(output[0, split::splits], lse[0, split::splits])
    if even_stop < span.stop:
        last = Span(block, even_stop, span.stop)
        _add(query, last.keys(torch.float32)[heads], last.values(torch.float32)[heads], scaling, parts)


def _add(query: Tensor, keys: Tensor, values: Tensor, scaling: float, parts: AttentionAccumulator) -> None:
    output, lse = flash(query[None], keys[None], values[None], scaling=scaling)
    parts.add(output[0], lse[0])


def needs_conversion(memory: Tensor) -> bool:
    """Whether a CPU reads memory faster once converted to float32 by chunks: all but float32, and bfloat16 with AMX."""
    if memory.device.type != "cpu" or memory.dtype == torch.float32:
        return False
    return memory.dtype != torch.bfloat16 or not _has_amx_tiles()


@cache
def _has_amx_tiles() -> bool:
    is_supported = getattr(torch.cpu, "_is_amx_tile_supported", None)  # torch has no public name for it
    return bool(is_supported and is_supported())


def _to_float32(tensor: Tensor, scales: Tensor | None, heads: slice, tokens: slice, name: str) -> Tensor:
    source = tensor[heads, tokens]
    target = workspace(name, source.shape, torch.float32).copy_(source)
    if scales is not None:
        target *= scales[heads, tokens].unsqueeze(-1)
    return target

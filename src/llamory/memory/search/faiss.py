"""Search by Faiss: nearest neighbours by inner product are read exactly, the rest through the means of their lists.

Every long part of a block has, per head, an inverted file (IVF): its lists hold like keys, and what isn't found in a
list keeps an estimated share, from the list's means less what was found.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.memory.attention import empty_attention, merge
from llamory.memory.blocks import Block, Span
from llamory.memory.search.estimates import log_error_bound, log_sum_exp, score_moments, softmax_shares
from llamory.memory.search.exact import (
    TOLERANCE,
    AttentionResult,
    attend_spans,
    group_heads,
    refine_uncertain,
    ungroup_heads,
)
from llamory.memory.search.faiss_parts import LENGTHS, IndexedPart, get_or_build_part
from llamory.memory.search.page_segments import aligned_ranges, stable_spans

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

DEFAULT_NEIGHBOURS = 128
MAX_GATHERED_ELEMENTS = 1 << 22  # numbers of keys, and of values, that are gathered at once


class FaissSearch:
    """Reads the nearest neighbours of each query.

    Args:
        top_k: neighbours that a query reads per head, of each part of memory that has an index.
        folder: where indexes are kept; they are then read from disk piece by piece. None for in memory.
        tolerance: expected error of the output, as a share of the values' size, from which a query reads everything.
    """

    def __init__(self, top_k: int | None = None, folder: str | Path | None = None, tolerance: float = TOLERANCE):
        self.top_k = DEFAULT_NEIGHBOURS if top_k is None else top_k
        self.folder = None if folder is None else Path(folder)
        self.tolerance = tolerance

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`."""
        return self.attend_with_stats(query, bank, layer, scaling)[:2]

    def attend_with_stats(
        self, query: Tensor, bank: MemoryBank, layer: int, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend`, and the log-sum-exp of the tokens that were read, to see what was found."""
        spans = bank.spans(layer)
        if not spans or query.numel() == 0:
            output, lse = empty_attention(query)
            return output, lse, lse
        found = self._attend(group_heads(query, spans[0].block.keys.shape[0]), spans, scaling, len(query))
        output, lse = ungroup_heads(found.output, found.lse, query)
        return output, lse, ungroup_heads(found.output, found.read_lse, query)[1]

    def _attend(self, query: Tensor, spans: list[Span], scaling: float, rows: int) -> AttentionResult:
        stable, rest = stable_spans(spans, LENGTHS[-1])
        index_ranges: list[tuple[Block, int, int]] = []
        if sum(map(len, spans)) > self.top_k:
            for span in stable:
                parts, remaining = aligned_ranges(span, LENGTHS)
                rest += remaining
                index_ranges += [(span.block, *part) for part in parts]
        if not index_ranges:
            output, lse = attend_spans(query, spans, scaling)
            return AttentionResult(output, lse, lse)
        query = query.float()
        found = [self._search(query * scaling, *index_range) for index_range in index_ranges]
        rest_output, rest_lse = attend_spans(query, rest, scaling)
        neighbors, neighbor_lses, estimated, estimated_lses, log_errors = zip(*found, strict=True)
        output, lse = merge((rest_output, *neighbors, *estimated), (rest_lse, *neighbor_lses, *estimated_lses))
        read_lse = torch.stack([rest_lse, *neighbor_lses]).logsumexp(0)
        error = (torch.stack(log_errors).logsumexp(0) - lse).exp_()
        return refine_uncertain(
            AttentionResult(output, lse, read_lse), error, self.tolerance, query, rows, spans, scaling
        )

    def _search(self, query: Tensor, block: Block, start: int, stop: int) -> tuple[Tensor, ...]:
        """Attention of scaled queries (kv_heads, queries, head_dim) to a part of a block.

        Returns:
            Output and log-sum-exp of the neighbours, those of the rest, and the logarithm of the error that the rest
            may have, not yet divided by the whole sum.
        """
        part = get_or_build_part(block, start, stop, self.folder)
        device_query = query.to(block.keys.device)
        count = min(self.top_k, stop - start)
        step = max(1, MAX_GATHERED_ELEMENTS // (len(query) * count * query.shape[-1]))
        chunks = [
            _attend_part(device_query[:, at : at + step], Span(block, start, stop), part, count)
            for at in range(0, device_query.shape[1], step)
        ]
        return tuple(torch.cat(tensors, 1).to(query.device) for tensors in zip(*chunks, strict=True))


def _attend_part(query: Tensor, span: Span, part: IndexedPart, count: int) -> tuple[Tensor, ...]:
    heads = len(query)
    tokens = part.search(query, count)
    missing = tokens < 0
    tokens = tokens.clamp_min(0)
    keys, values = gather(span, tokens)
    scores = (keys @ query.unsqueeze(-1)).squeeze(-1).masked_fill_(missing, -torch.inf)
    neighbor_lse = scores.logsumexp(-1)
    neighbors = (softmax_shares(scores.clone(), neighbor_lse).unsqueeze(2) @ values).squeeze(2)

    # What is remaining of each list, when what was found is taken out.
    found_mask = (~missing).float()
    lists = part.lists.gather(1, tokens.view(heads, -1)).view(tokens.shape).long()
    mean, variance = score_moments(query, part.means, part.variances)
    counts = part.counts.unsqueeze(1).expand_as(mean)
    remaining = counts.scatter_add(2, lists, -found_mask)
    mean = (mean * counts).scatter_add(2, lists, -scores.masked_fill(missing, 0)) / remaining.clamp_min(1)
    empty = remaining < 0.5
    remaining = remaining.clamp_min(1)
    rest = log_sum_exp(mean, variance, remaining).masked_fill_(empty, -torch.inf)
    # In a list that was looked into, no score is higher than the min_score that was found.
    min_score = scores.masked_fill(missing, torch.inf).amin(-1, keepdim=True)
    log_errors = log_error_bound(mean, variance, remaining)
    log_errors = torch.where(remaining < counts - 0.5, torch.minimum(log_errors, (rest + min_score) / 2), log_errors)
    log_error = (2 * log_errors.masked_fill_(empty, -torch.inf)).logsumexp(-1) / 2
    estimated_lse = rest.logsumexp(-1)
    per_token = softmax_shares(rest, estimated_lse) / remaining
    estimated = (per_token * counts) @ part.values
    estimated = estimated - ((per_token.gather(2, lists) * found_mask).unsqueeze(2) @ values).squeeze(2)
    return neighbors, neighbor_lse, estimated, estimated_lse, log_error


def gather(span: Span, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (kv_heads, queries, count, head_dim) in float32 of some tokens, numbered within their span."""
    block = span.block
    first = torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1) * block.capacity + span.start
    rows = (tokens + first).view(-1)
    gathered = []
    for tensor, scales in ((block.keys, block.key_scales), (block.values, block.value_scales)):
        numbers = tensor.reshape(-1, tensor.shape[-1]).index_select(0, rows).float()
        if scales is not None:
            numbers *= scales.reshape(-1).index_select(0, rows).unsqueeze(-1)
        gathered.append(numbers.view(*tokens.shape, -1))
    return gathered[0], gathered[1]

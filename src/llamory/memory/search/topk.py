"""The paper's way of reading memory: the best few tokens per query and head, and nothing else of it.

What isn't among them is left out of the softmax, not estimated (Tworkowski et al. 2023, section 3.1: the k keys with
the highest scores). Long parts of memory are searched by their Faiss indexes, what is too short for one is scanned.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.memory.attention import empty_attention
from llamory.memory.blocks import Span
from llamory.memory.search.exact import group_heads, ungroup_heads
from llamory.memory.search.faiss import MAX_GATHERED_ELEMENTS, gather
from llamory.memory.search.faiss_parts import LENGTHS, get_or_build_part
from llamory.memory.search.page_segments import aligned_ranges, stable_spans

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

DEFAULT_TOP_K = 32
CANDIDATE_FACTOR = (
    2  # times top_k, and a few more, are taken of each index, whose keys are rounded; their exact scores decide
)
EXTRA_CANDIDATES = 16
MAX_SCANNED_TOKENS = 1 << 14  # tokens whose scores are held at once


class TopKSearch:
    """Reads the best tokens only.

    Args:
        top_k: tokens that a query reads per head.
        indexed: search long parts of memory by index, or scan all of it, which misses nothing.
        folder: where indexes are kept, see `FaissSearch`.
    """

    def __init__(self, top_k: int | None = None, indexed: bool = True, folder: str | Path | None = None):
        self.top_k = DEFAULT_TOP_K if top_k is None else top_k
        self.indexed = indexed
        self.folder = None if folder is None else Path(folder)

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`; the softmax is over the tokens that are read."""
        spans = bank.spans(layer)
        if not spans or query.numel() == 0:
            return empty_attention(query)
        grouped_query = group_heads(query, spans[0].block.keys.shape[0]).float() * scaling
        candidates = CANDIDATE_FACTOR * self.top_k + EXTRA_CANDIDATES
        step = max(1, MAX_GATHERED_ELEMENTS // (len(grouped_query) * candidates * grouped_query.shape[-1]))
        chunks = [
            self._attend(grouped_query[:, at : at + step], spans) for at in range(0, grouped_query.shape[1], step)
        ]
        outputs, lses = zip(*chunks, strict=True)
        return ungroup_heads(torch.cat(outputs, 1), torch.cat(lses, 1), query)

    def _attend(self, query: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor]:
        """Of scaled queries (kv_heads, queries, head_dim)."""
        stable, rest = stable_spans(spans, LENGTHS[-1]) if self.indexed else ([], spans)
        running = _RunningTopK(self.top_k)
        for span in stable:
            parts, remaining = aligned_ranges(span, LENGTHS)
            rest = rest + remaining
            for start, stop in parts:
                part = get_or_build_part(span.block, start, stop, self.folder)
                device_query = query.to(span.block.keys.device)
                tokens = part.search(device_query, min(CANDIDATE_FACTOR * self.top_k + EXTRA_CANDIDATES, stop - start))
                running.add(*_score_tokens(device_query, Span(span.block, start, stop), tokens), query)
        for span in rest:
            for subspan in span.split(MAX_SCANNED_TOKENS):
                device_query = query.to(subspan.block.keys.device)
                scores = device_query @ subspan.keys(torch.float32).transpose(1, 2)
                tokens = scores.topk(min(self.top_k, len(subspan)), -1, sorted=False).indices
                running.add(*_score_tokens(device_query, subspan, tokens), query)
        return running.attention()


class _RunningTopK:
    """The best scores so far, (kv_heads, queries, at most top_k), and the values that belong to them."""

    def __init__(self, top_k: int):
        self.top_k = top_k
        self.scores: Tensor | None = None
        self.values: Tensor | None = None

    def add(self, scores: Tensor, values: Tensor, like: Tensor) -> None:
        scores, values = scores.to(like.device), values.to(like.device)
        if self.scores is not None and self.values is not None:
            scores, values = torch.cat([self.scores, scores], 2), torch.cat([self.values, values], 2)
        if scores.shape[2] > self.top_k:
            scores, at = scores.topk(self.top_k, -1, sorted=False)
            values = values.gather(2, at.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1]))
        self.scores, self.values = scores, values

    def attention(self) -> tuple[Tensor, Tensor]:
        assert self.scores is not None and self.values is not None
        weights = self.scores.softmax(-1).nan_to_num(0.0)  # no token was found at all
        return (weights.unsqueeze(2) @ self.values).squeeze(2), self.scores.logsumexp(-1)


def _score_tokens(query: Tensor, span: Span, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (kv_heads, queries, count) and values of tokens of a span; -inf where there is none (-1)."""
    keys, values = gather(span, tokens.clamp_min(0))
    scores = (keys @ query.unsqueeze(-1)).squeeze(-1)
    return scores.masked_fill(tokens < 0, -torch.inf), values

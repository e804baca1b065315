"""Top-k attention: each query attends to its best few tokens per head only (Tworkowski et al. 2023, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from llamory.memory.blocks import Span, SpanList
from llamory.memory.search.base import AttentionResult, Search, in_steps
from llamory.memory.search.faiss import MAX_GATHERED_ELEMENTS, gather, get_or_build_part, indexed_ranges

CANDIDATE_FACTOR = 2  # an index rounds keys, so it gives this times top_k candidates
EXTRA_CANDIDATES = 16  # and this many more, whose exact scores decide
MAX_SCANNED_TOKENS = 1 << 14  # tokens whose scores are held at once


class TopKSearch(Search):
    """Reads the `top_k` best tokens of each query and head, found by computing all scores."""

    default_top_k = 32

    def attend_grouped(self, query: Tensor, spans: SpanList, scaling: float, rows: int) -> AttentionResult:  # noqa: ARG002
        """See `Search.attend_grouped`; the softmax is over the tokens that are read."""
        query = query.float() * scaling
        step = MAX_GATHERED_ELEMENTS // (len(query) * self._num_candidates * query.shape[-1])

        def attention(query: Tensor) -> tuple[Tensor, Tensor]:
            best = _BestTokens(self.top_k, query)
            self._find(query, spans, best)
            return best.attention()

        output, lse = in_steps(attention, step, query)
        return AttentionResult(output, lse, lse)

    @property
    def _num_candidates(self) -> int:
        return CANDIDATE_FACTOR * self.top_k + EXTRA_CANDIDATES

    def _find(self, query: Tensor, spans: SpanList, best: _BestTokens) -> None:
        """Add the best tokens of scaled queries (kv_heads, queries, head_dim)."""
        for span in spans:
            for subspan in span.split(MAX_SCANNED_TOKENS):
                device_query = query.to(subspan.block.keys.device)
                scores = device_query @ subspan.keys(torch.float32).transpose(1, 2)
                tokens = scores.topk(min(self.top_k, len(subspan)), -1, sorted=False).indices
                best.add(*_score_tokens(device_query, subspan, tokens))


class IndexedTopKSearch(TopKSearch):
    """Reads about the `top_k` best tokens, found by the Faiss indexes of long ranges and by scanning the rest."""

    def _find(self, query: Tensor, spans: SpanList, best: _BestTokens) -> None:
        ranges, rest = indexed_ranges(spans)
        for span in ranges:
            part = get_or_build_part(span, self.folder)
            device_query = query.to(span.block.keys.device)
            tokens = part.search(device_query, min(self._num_candidates, len(span)))
            best.add(*_score_tokens(device_query, span, tokens))
        super()._find(query, SpanList(rest), best)


class _BestTokens:
    """The best scores so far, (kv_heads, queries, at most top_k), and their values."""

    def __init__(self, top_k: int, like: Tensor):
        self._top_k, self._device = top_k, like.device
        self._scores: Tensor | None = None
        self._values: Tensor | None = None

    def add(self, scores: Tensor, values: Tensor) -> None:
        scores, values = scores.to(self._device), values.to(self._device)
        if self._scores is not None and self._values is not None:
            scores, values = torch.cat([self._scores, scores], 2), torch.cat([self._values, values], 2)
        if scores.shape[2] > self._top_k:
            scores, indices = scores.topk(self._top_k, -1, sorted=False)
            values = values.gather(2, indices.unsqueeze(-1).expand(-1, -1, -1, values.shape[-1]))
        self._scores, self._values = scores, values

    def attention(self) -> tuple[Tensor, Tensor]:
        assert self._scores is not None and self._values is not None
        weights = self._scores.softmax(-1).nan_to_num(0.0)  # NaN where no token was found
        return (weights.unsqueeze(2) @ self._values).squeeze(2), self._scores.logsumexp(-1)


def _score_tokens(query: Tensor, span: Span, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (kv_heads, queries, count) and values of a span's tokens; -inf where there is none (-1)."""
    keys, values = gather(span, tokens.clamp_min(0))
    scores = (keys @ query.unsqueeze(-1)).squeeze(-1)
    return scores.masked_fill(tokens < 0, -torch.inf), values

"""The paper's way of reading memory: the best few tokens per query and head, and nothing else of it.

What isn't among them is left out of the softmax, not estimated (Tworkowski et al. 2023, section 3.1: the k keys with
the highest scores). Long parts of memory are searched by their Faiss indexes, what is too short for one is scanned.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.memory.attention import nothing
from llamory.memory.blocks import Span
from llamory.memory.search.exact import fold, unfold
from llamory.memory.search.faiss import GATHERED, gather
from llamory.memory.search.faiss_parts import LENGTHS, part_of
from llamory.memory.search.page_segments import cut, settle

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

DEFAULT_NEAREST = 32
CANDIDATES = (
    2  # times top_k, and a few more, are taken of each index, whose keys are rounded; their exact scores decide
)
SPARE = 16
SCANNED = 1 << 14  # tokens whose scores are held at once


class NearestSearch:
    """Reads the best tokens only.

    Args:
        top_k: tokens that a query reads per head.
        indexed: search long parts of memory by index, or scan all of it, which misses nothing.
        folder: where indexes are kept, see `FaissSearch`.
    """

    def __init__(self, top_k: int | None = None, indexed: bool = True, folder: str | Path | None = None):
        self.top_k = DEFAULT_NEAREST if top_k is None else top_k
        self.indexed = indexed
        self.folder = None if folder is None else Path(folder)

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`; the softmax is over the tokens that are read."""
        spans = bank.spans(layer)
        if not spans or query.numel() == 0:
            return nothing(query)
        folded = fold(query, spans[0].block.keys.shape[0]).float() * scaling
        candidates = CANDIDATES * self.top_k + SPARE
        step = max(1, GATHERED // (len(folded) * candidates * folded.shape[-1]))
        pieces = [self._attend(folded[:, at : at + step], spans) for at in range(0, folded.shape[1], step)]
        outputs, log_sums = zip(*pieces, strict=True)
        return unfold(torch.cat(outputs, 1), torch.cat(log_sums, 1), query)

    def _attend(self, query: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor]:
        """Of scaled queries (kv_heads, queries, head_dim)."""
        settled, rest = settle(spans, LENGTHS[-1]) if self.indexed else ([], spans)
        best = _Best(self.top_k)
        for span in settled:
            parts, left = cut(span, LENGTHS)
            rest = rest + left
            for start, stop in parts:
                part = part_of(span.block, start, stop, self.folder)
                here = query.to(span.block.keys.device)
                tokens = part.search(here, min(CANDIDATES * self.top_k + SPARE, stop - start))
                best.add(*_scored(here, Span(span.block, start, stop), tokens), query)
        for span in rest:
            for piece in span.parts(SCANNED):
                here = query.to(piece.block.keys.device)
                scores = here @ piece.keys(torch.float32).transpose(1, 2)
                tokens = scores.topk(min(self.top_k, len(piece)), -1, sorted=False).indices
                best.add(*_scored(here, piece, tokens), query)
        return best.attention()


class _Best:
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


def _scored(query: Tensor, span: Span, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (kv_heads, queries, count) and values of tokens of a span; -inf where there is none (-1)."""
    keys, values = gather(span, tokens.clamp_min(0))
    scores = (keys @ query.unsqueeze(-1)).squeeze(-1)
    return scores.masked_fill(tokens < 0, -torch.inf), values

"""Attention to each token of a memory, and the citations computed from it.

Most attention to memory goes to a few tokens, whatever the question (`benchmarks/citations.py`). So there is a second
measure, the baseline-corrected mass: the attention of question and answer to a token beyond BASELINE_FACTOR times the
mean attention of the prompt's fixed tokens to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from llamory.memory.bank import MemoryBank
from llamory.memory.blocks import Span

if TYPE_CHECKING:
    from llamory.documents import Chunk

SCORE_BATCH_TOKENS = 2048  # memory tokens to score at a time
BASELINE_FACTOR = 4.0
# Maximum scores per answer: of a long answer over a large memory only some queries, at least MIN_STEPS, are measured.
MAX_SCORES = 1 << 30
MIN_STEPS = 8
MAX_QUERIES = 16384  # recorded per layer; a longer question isn't measured
_EPSILON = 1e-300


class AttentionMass(NamedTuple):
    """Attention to each token, summed over queries, memory layers and heads; both (tokens,) float64."""

    attention_mass: Tensor  # probabilities of the queries that predict the answer's tokens
    baseline_corrected_mass: Tensor  # probabilities of all queries of question and answer beyond the baseline


class AttentionRecorder:
    """Records a question's and answer's queries to memory, as `LongLlamaCache.observer`; of the first row only."""

    def __init__(self) -> None:
        self._recorded: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._num_queries: dict[int, int] = defaultdict(int)

    def __call__(self, layer: int, query: Tensor, lse: Tensor) -> None:
        """Record a layer's queries (rows, heads, width, head_dim) and log-sum-exp (rows, heads, width)."""
        if self._num_queries[layer] < MAX_QUERIES:
            self._recorded[layer].append((query[0].detach().float().cpu(), lse[0].detach().float().cpu()))
            self._num_queries[layer] += query.shape[2]

    def clear(self) -> None:
        """Remove all queries."""
        self._recorded.clear()
        self._num_queries.clear()

    def mass(
        self,
        bank: MemoryBank,
        segments: Sequence[str],
        scalings: Mapping[int, float],
        *,
        baseline_tokens: int,
        question: int,
        answer: int,
    ) -> AttentionMass:
        """Attention to each token of segments, segment after segment.

        A probability belongs to the one softmax over local context and memory: exp(scaling * q k - lse).

        Args:
            bank: the memory that was searched.
            scalings: scale of the scores, per layer.
            baseline_tokens: the prompt's fixed tokens; they are the first queries.
            question, answer: tokens of the prompt and of the answer.
        """
        selected = bank.slice([])
        selected.attach(bank, segments)
        total = torch.zeros(2, selected.length(), dtype=torch.float64)
        num_queries = question + answer - 1  # the last token of the answer is never a query
        for layer in selected.layers if total.numel() else ():
            if self._num_queries[layer] < num_queries:
                continue  # the last memory layer doesn't compute all queries of a question longer than a window
            query, lse = (torch.cat(parts, 1) for parts in zip(*self._recorded[layer], strict=True))
            scores_per_query = selected.length() * len(query) * len(selected.layers)
            sampled = _sample_queries(baseline_tokens, num_queries, scores_per_query)
            query, lse = query[:, sampled] * scalings[layer], lse[:, sampled]
            is_answer = sampled[baseline_tokens:] >= num_queries - answer
            total += _layer_mass(query, lse, baseline_tokens, is_answer, selected.spans(layer), selected.kv_heads)
        return AttentionMass(*total)


def _sample_queries(baseline_tokens: int, num_queries: int, scores_per_query: int) -> Tensor:
    """Queries to measure: the baseline, and of the others as many, evenly spaced, as MAX_SCORES allows."""
    others = torch.arange(baseline_tokens, num_queries)
    max_queries = max(MIN_STEPS, MAX_SCORES // scores_per_query)
    if len(others) > max_queries:
        # Backwards, so that the last query is always measured.
        others = others.flip(0)[torch.linspace(0, len(others) - 1, max_queries).round().long()].flip(0)
    return torch.cat([torch.arange(baseline_tokens), others])


def _layer_mass(
    query: Tensor, lse: Tensor, baseline_tokens: int, is_answer: Tensor, spans: Sequence[Span], kv_heads: int
) -> Tensor:
    """One layer's attention mass and baseline-corrected mass, (2, tokens).

    Args:
        query: (heads, queries, head_dim), scaled; the baseline comes first.
        lse: (heads, queries).
        is_answer: (queries - baseline,), which of the others predict the answer's tokens.
        kv_heads: query head h attends to key head h // (heads // kv_heads).
    """
    num_queries = query.shape[1]
    grouped = query.reshape(kv_heads, -1, query.shape[2])
    sums = lse.reshape(kv_heads, -1, 1)
    masses = []
    for span in spans:
        for part in span.split(SCORE_BATCH_TOKENS):
            keys = part.keys(torch.float32).cpu().transpose(1, 2)
            weights = torch.baddbmm(sums, grouped, keys, beta=-1).exp_().view(len(query), num_queries, -1)
            baseline = weights[:, :baseline_tokens].mean(1, keepdim=True) if baseline_tokens else weights.new_zeros(1)
            others = weights[:, baseline_tokens:]
            raw = others[:, is_answer].sum((0, 1))
            masses.append(torch.stack([raw, (others - BASELINE_FACTOR * baseline).clamp_min_(0).sum((0, 1))]).double())
    return torch.cat(masses, 1)


@dataclass(frozen=True)
class Citation:
    """A chunk that an answer is based on."""

    location: str  # of its start, as `path:line`
    share: float  # of the baseline-corrected attention mass of all chunks
    attention: float  # fraction of the plain attention mass of all chunks
    source: str  # the document's
    title: str  # of its section
    line: int  # the first, counted from 1
    text: str


def sum_mass_by_chunk(mass: Tensor, starts: Sequence[int]) -> Tensor:
    """Sum a document's mass (kinds, tokens) over each chunk, (chunks, kinds); `starts` are the chunks' first tokens."""
    boundaries = torch.tensor([*starts, mass.shape[1]])
    chunk_index = torch.repeat_interleave(torch.arange(len(starts)), boundaries.diff())
    return torch.zeros(len(starts), len(mass), dtype=mass.dtype).index_add_(0, chunk_index, mass[:, starts[0] :].T)


def cite(chunks: Sequence[Chunk], masses: Tensor, limit: int) -> list[Citation]:
    """Citations of at most `limit` chunks with a share, the largest first.

    `masses` (chunks, 2) are attention mass and baseline-corrected mass.
    """
    if not float(masses[:, 1].sum()) > 0:  # no attention exceeds the baseline: share the plain mass
        masses = masses[:, [0, 0]]
    fractions = masses / masses.sum(0).clamp_min(_EPSILON)
    cited = []
    for index in fractions[:, 1].argsort(descending=True, stable=True)[:limit].tolist():
        attention, share = fractions[index].tolist()
        if share > 0:
            chunk = chunks[index]
            cited.append(Citation(chunk.location, share, attention, chunk.source, chunk.title, chunk.line, chunk.text))
    return cited

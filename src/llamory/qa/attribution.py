"""How much attention each token of a memory got: what answers are cited by.

Most of what a softmax gives to a memory says nothing: models rest their attention on the first tokens of what they
read, on blanks and on articles, whatever they are asked (`benchmarks/citations.py`: more than half of it on three
tokens). So beside the plain sum there is another: what a question and its answer draw, that is, what they give to a
token beyond four times what the prompt's baseline_tokens fixed words give to it.
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

SCORE_BATCH_TOKENS = 2048  # tokens whose scores are held at once
BASELINE_FACTOR = 4.0  # times what the prompt's baseline_tokens words give to a token: beyond it, attention was drawn
# Scores that one answer may cost. A long answer over a large memory is measured at some of its steps only.
MAX_SCORES = 1 << 30
MIN_STEPS = 8
_EPSILON = 1e-300
MAX_COLUMNS = 16384  # that are noted, per layer; a longer question isn't measured


class AttentionMass(NamedTuple):
    """Attention to each token, summed over queries, memory layers and heads; both (tokens,) float64.

    Attributes:
        attention_mass: the probabilities of the queries that gave the answer's tokens.
        baseline_corrected_mass: of question and answer, what goes beyond `BASELINE_FACTOR` times the mean of the prompt's baseline_tokens words.
    """

    attention_mass: Tensor
    baseline_corrected_mass: Tensor


class AttentionRecorder:
    """Notes all queries to memory of a question and its answer; give it to `LongLlamaCache.observer`.

    Only the first row is noted: answers are given one at a time.
    """

    def __init__(self) -> None:
        self._recorded: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._columns: dict[int, int] = defaultdict(int)

    def __call__(self, layer: int, query: Tensor, lse: Tensor) -> None:
        """Note a step of a layer: queries (rows, heads, width, head_dim), log-sum-exp (rows, heads, width)."""
        if self._columns[layer] < MAX_COLUMNS:
            self._recorded[layer].append((query[0].detach().float().cpu(), lse[0].detach().float().cpu()))
            self._columns[layer] += query.shape[2]

    def clear(self) -> None:
        """Forget all queries."""
        self._recorded.clear()
        self._columns.clear()

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
        """Attention that was given to each token of some segments.

        Each probability is of the one softmax over local context and memory, and is computed from the query and the
        key, so it is exact whatever way memory was searched in; where that way estimates the sum of all exponentials,
        so is the probability.

        Args:
            bank: the memory as it was asked.
            segments: whose tokens; they are given segment after segment.
            scalings: what scores are multiplied by, per layer.
            baseline_tokens: the prompt's baseline_tokens words, the first tokens of what was noted.
            question: tokens of the question with the prompt.
            answer: tokens of the answer.
        """
        selected = MemoryBank(bank.layers, bank.kv_heads, bank.head_dim, dtype=bank.dtype, fingerprint=bank.fingerprint)
        selected.attach(bank, segments)
        total = torch.zeros(2, selected.length(), dtype=torch.float64)
        # The last token of the answer is never a query.
        columns = question + answer - 1
        for layer in selected.layers if total.numel() else ():
            if self._columns[layer] < columns:
                continue  # of a question longer than a window, the last memory layer doesn't compute all
            query, lse = (torch.cat(parts, 1) for parts in zip(*self._recorded[layer], strict=True))
            sampled = _sample_columns(baseline_tokens, columns, selected.length() * len(query) * len(selected.layers))
            query, lse = query[:, sampled] * scalings[layer], lse[:, sampled]
            is_answer = sampled[baseline_tokens:] >= columns - answer
            total += _layer_mass(query, lse, baseline_tokens, is_answer, selected.spans(layer), selected.kv_heads)
        return AttentionMass(*total)


def _sample_columns(baseline_tokens: int, columns: int, scores: int) -> Tensor:
    """Columns to measure: the prompt's baseline_tokens, and of the others as many, evenly spread, as the costs allow."""
    others = torch.arange(baseline_tokens, columns)
    max_columns = max(MIN_STEPS, MAX_SCORES // scores)
    if len(others) > max_columns:
        # Backwards, so that the last one, which the answer hangs on, is always there.
        others = others.flip(0)[torch.linspace(0, len(others) - 1, max_columns).round().long()].flip(0)
    return torch.cat([torch.arange(baseline_tokens), others])


def _layer_mass(
    query: Tensor, lse: Tensor, baseline_tokens: int, is_answer: Tensor, spans: Sequence[Span], kv_heads: int
) -> Tensor:
    """(2, tokens): what was given, and what was drawn.

    Args:
        query: (heads, columns, head_dim), scaled; the prompt's baseline_tokens words first.
        lse: (heads, columns).
        baseline_tokens: how many those are.
        is_answer: which of the other columns gave the answer's tokens.
        spans: whose tokens.
        kv_heads: heads of the keys; query head h reads key head h // (heads // kv_heads).
    """
    columns = query.shape[1]
    grouped = query.reshape(kv_heads, -1, query.shape[2])
    sums = lse.reshape(kv_heads, -1, 1)
    masses = []
    for span in spans:
        for part in span.split(SCORE_BATCH_TOKENS):
            keys = part.keys(torch.float32).cpu().transpose(1, 2)
            weights = torch.baddbmm(sums, grouped, keys, beta=-1).exp_().view(len(query), columns, -1)
            baseline = weights[:, :baseline_tokens].mean(1, keepdim=True) if baseline_tokens else weights.new_zeros(1)
            others = weights[:, baseline_tokens:]
            raw = others[:, is_answer].sum((0, 1))
            masses.append(torch.stack([raw, (others - BASELINE_FACTOR * baseline).clamp_min_(0).sum((0, 1))]).double())
    return torch.cat(masses, 1)


# ---- citations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Citation:
    """A passage that an answer rests on.

    Attributes:
        location: where it starts, as `path:line`.
        share: of the attention that question and answer drew to all passages in memory, from 0 to 1; attention counts
            as drawn where it is far more than the prompt's own words give (see `llamory.qa.attribution`).
        attention: of all attention that the answer's tokens gave to all passages, drawn or not, from 0 to 1.
        source: the document's source.
        title: title of the part of the document that it stands in.
        line: where it starts, counted from 1.
        text: the passage.
    """

    location: str
    share: float
    attention: float
    source: str
    title: str
    line: int
    text: str


def sum_mass_by_chunk(mass: Tensor, starts: Sequence[int]) -> Tensor:
    """Sum over each passage's tokens.

    Args:
        mass: attention to each token of a document, (kinds, tokens).
        starts: the first token of each passage, rising.

    Returns:
        (passages, kinds).
    """
    boundaries = torch.tensor([*starts, mass.shape[1]])
    chunk_index = torch.repeat_interleave(torch.arange(len(starts)), boundaries.diff())
    return torch.zeros(len(starts), len(mass), dtype=mass.dtype).index_add_(0, chunk_index, mass[:, starts[0] :].T)


def cite(passages: Sequence[Chunk], masses: Tensor, limit: int) -> list[Citation]:
    """The passages with the largest shares, largest first; those that drew nothing aren't cited.

    Args:
        passages: all in memory.
        masses: attention to each that was given and that was drawn, (passages, 2).
        limit: so many at most.
    """
    attention_mass, baseline_corrected_mass = masses.unbind(1)
    # A model that looks at everything alike draws nothing; then the plain sums are all there is.
    masses = torch.stack(
        [attention_mass, baseline_corrected_mass if float(baseline_corrected_mass.sum()) > 0 else attention_mass], 1
    )
    fractions = masses / masses.sum(0).clamp_min(_EPSILON)
    cited = []
    for index in fractions[:, 1].argsort(descending=True, stable=True)[:limit].tolist():
        attention, share = fractions[index].tolist()
        if share > 0:
            chunk = passages[index]
            cited.append(Citation(chunk.location, share, attention, chunk.source, chunk.title, chunk.line, chunk.text))
    return cited

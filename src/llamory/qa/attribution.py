"""How much attention each token of a memory got: what answers are cited by.

Most of what a softmax gives to a memory says nothing: models rest their attention on the first tokens of what they
read, on blanks and on articles, whatever they are asked (`benchmarks/citations.py`: more than half of it on three
tokens). So beside the plain sum there is another: what a question and its answer draw, that is, what they give to a
token beyond four times what the prompt's own fixed words give to it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llamory.memory.bank import MemoryBank
from llamory.memory.blocks import Span

CHUNK = 2048  # tokens whose scores are held at once
DRAWN = 4.0  # times what the prompt's own words give to a token: beyond it, attention was drawn
# Scores that one answer may cost. A long answer over a large memory is measured at some of its steps only.
MOST_SCORES = 1 << 30
FEWEST_STEPS = 8
MOST_COLUMNS = 16384  # that are noted, per layer; a longer question isn't measured


class Mass(NamedTuple):
    """Attention to each token, summed over queries, memory layers and heads; both (tokens,) float64.

    Attributes:
        given: the probabilities of the queries that gave the answer's tokens.
        drawn: of question and answer, what goes beyond `DRAWN` times the mean of the prompt's own words.
    """

    given: Tensor
    drawn: Tensor


class AttentionLog:
    """Notes all queries to memory of a question and its answer; give it to `LongLlamaCache.observer`.

    Only the first row is noted: answers are given one at a time.
    """

    def __init__(self) -> None:
        self._noted: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        self._columns: dict[int, int] = defaultdict(int)

    def __call__(self, layer: int, query: Tensor, log_sum: Tensor) -> None:
        """Note a step of a layer: queries (rows, heads, width, head_dim), log-sum-exp (rows, heads, width)."""
        if self._columns[layer] < MOST_COLUMNS:
            self._noted[layer].append((query[0].detach().float().cpu(), log_sum[0].detach().float().cpu()))
            self._columns[layer] += query.shape[2]

    def clear(self) -> None:
        """Forget all queries."""
        self._noted.clear()
        self._columns.clear()

    def mass(
        self,
        bank: MemoryBank,
        segments: Sequence[str],
        scalings: Mapping[int, float],
        *,
        own: int,
        question: int,
        answer: int,
    ) -> Mass:
        """Attention that was given to each token of some segments.

        Each probability is of the one softmax over local context and memory, and is computed from the query and the
        key, so it is exact whatever way memory was searched in; where that way estimates the sum of all exponentials,
        so is the probability.

        Args:
            bank: the memory as it was asked.
            segments: whose tokens; they are given segment after segment.
            scalings: what scores are multiplied by, per layer.
            own: the prompt's own words, the first tokens of what was noted.
            question: tokens of the question with the prompt.
            answer: tokens of the answer.
        """
        chosen = MemoryBank(bank.layers, bank.kv_heads, bank.head_dim, dtype=bank.dtype, fingerprint=bank.fingerprint)
        chosen.mount(bank, segments)
        total = torch.zeros(2, chosen.length(), dtype=torch.float64)
        # The last token of the answer is never a query.
        columns = question + answer - 1
        for layer in chosen.layers if total.numel() else ():
            if self._columns[layer] < columns:
                continue  # of a question longer than a window, the last memory layer doesn't compute all
            query, log_sum = (torch.cat(parts, 1) for parts in zip(*self._noted[layer], strict=True))
            picked = _picked(own, columns, chosen.length() * len(query) * len(chosen.layers))
            query, log_sum = query[:, picked] * scalings[layer], log_sum[:, picked]
            given = picked[own:] >= columns - answer
            total += _layer_mass(query, log_sum, own, given, chosen.spans(layer), chosen.kv_heads)
        return Mass(*total)


def _picked(own: int, columns: int, scores: int) -> Tensor:
    """Columns to measure: the prompt's own, and of the others as many, evenly spread, as the costs allow."""
    others = torch.arange(own, columns)
    most = max(FEWEST_STEPS, MOST_SCORES // scores)
    if len(others) > most:
        # Backwards, so that the last one, which the answer hangs on, is always there.
        others = others.flip(0)[torch.linspace(0, len(others) - 1, most).round().long()].flip(0)
    return torch.cat([torch.arange(own), others])


def _layer_mass(
    query: Tensor, log_sum: Tensor, own: int, given: Tensor, spans: Sequence[Span], kv_heads: int
) -> Tensor:
    """(2, tokens): what was given, and what was drawn.

    Args:
        query: (heads, columns, head_dim), scaled; the prompt's own words first.
        log_sum: (heads, columns).
        own: how many those are.
        given: which of the other columns gave the answer's tokens.
        spans: whose tokens.
        kv_heads: heads of the keys; query head h reads key head h // (heads // kv_heads).
    """
    columns = query.shape[1]
    grouped = query.reshape(kv_heads, -1, query.shape[2])
    sums = log_sum.reshape(kv_heads, -1, 1)
    masses = []
    for span in spans:
        for part in span.parts(CHUNK):
            keys = part.keys(torch.float32).cpu().transpose(1, 2)
            shares = torch.baddbmm(sums, grouped, keys, beta=-1).exp_().view(len(query), columns, -1)
            usual = shares[:, :own].mean(1, keepdim=True) if own else shares.new_zeros(1)
            others = shares[:, own:]
            plain = others[:, given].sum((0, 1))
            masses.append(torch.stack([plain, (others - DRAWN * usual).clamp_min_(0).sum((0, 1))]).double())
    return torch.cat(masses, 1)

"""How much attention each token of a memory got: what answers are cited by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from llamory.memory.bank import MemoryBank
from llamory.memory.blocks import Span

CHUNK = 2048  # tokens whose scores are held at once
# Scores that one answer may cost. A long answer over a large memory is measured at some of its steps only.
MOST_SCORES = 1 << 30
FEWEST_STEPS = 8


class AttentionLog:
    """Notes, step by step, the last column's queries to memory; give it to `LongLlamaCache.observer`.

    Only the first row is noted: answers are given one at a time.
    """

    def __init__(self) -> None:
        self._steps: dict[int, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def __call__(self, layer: int, query: Tensor, log_sum: Tensor) -> None:
        """Note a step of a layer: queries (rows, heads, width, head_dim), log-sum-exp (rows, heads, width)."""
        self._steps[layer].append((query[0, :, -1].detach().float().cpu(), log_sum[0, :, -1].detach().float().cpu()))

    def clear(self) -> None:
        """Forget all steps."""
        self._steps.clear()

    def mass(self, bank: MemoryBank, segments: Sequence[str], steps: int, scalings: Mapping[int, float]) -> Tensor:
        """Attention that the last steps gave to each token: softmax probabilities, summed over steps, layers and heads.

        Each probability is of the one softmax over local context and memory, and is computed from the query and the
        key, so it is exact whatever way memory was searched in; where that way estimates the sum of all exponentials,
        so is the probability.

        Args:
            bank: the memory as it was asked.
            segments: whose tokens.
            steps: so many last steps: those that gave an answer's tokens.
            scalings: what scores are multiplied by, per layer.

        Returns:
            (tokens,) float64, segment after segment.
        """
        chosen = MemoryBank(bank.layers, bank.kv_heads, bank.head_dim, dtype=bank.dtype, fingerprint=bank.fingerprint)
        chosen.mount(bank, segments)
        total = torch.zeros(chosen.length(), dtype=torch.float64)
        for layer in chosen.layers:
            noted = self._steps.get(layer, [])[-steps:]
            if noted and len(total):
                noted = _thinned(noted, len(total) * len(noted[0][1]) * len(chosen.layers))
                total += _layer_mass(noted, chosen.spans(layer), chosen.kv_heads, scalings[layer])
        return total


def _thinned(noted: list[tuple[Tensor, Tensor]], scores_per_step: int) -> list[tuple[Tensor, Tensor]]:
    """Steps spread evenly over all of them, as many as may be computed."""
    most = max(FEWEST_STEPS, MOST_SCORES // scores_per_step)
    if len(noted) <= most:
        return noted
    return [noted[i] for i in torch.linspace(0, len(noted) - 1, most).round().int().tolist()]


def _layer_mass(noted: Sequence[tuple[Tensor, Tensor]], spans: Sequence[Span], kv_heads: int, scaling: float) -> Tensor:
    query, log_sum = (torch.stack(parts) for parts in zip(*noted, strict=True))
    # Heads of a group read the same keys: (kv_heads, steps * heads of the group, head_dim).
    query = query.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2) * scaling
    log_sum = log_sum.unflatten(1, (kv_heads, -1)).transpose(0, 1).flatten(1, 2).unsqueeze(2)
    masses = []
    for span in spans:
        for part in span.parts(CHUNK):
            scores = torch.baddbmm(log_sum, query, part.keys(torch.float32).cpu().transpose(1, 2), beta=-1)
            masses.append(scores.exp_().sum((0, 1)).double())
    return torch.cat(masses)

"""Search by Faiss: nearest neighbours by inner product are read exactly, the rest through the means of their lists.

Every long part of a block has, per head, an inverted file (IVF): its lists hold like keys, and what isn't found in a
list keeps an estimated share, from the list's means less what was found.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.memory.attention import merge, nothing
from llamory.memory.blocks import Block, Span
from llamory.memory.search.estimates import log_sum_exp, potential, score_moments, shares
from llamory.memory.search.exact import TOLERANCE, Found, fold, read, read_uncertain, unfold
from llamory.memory.search.faiss_parts import LENGTHS, Part, part_of
from llamory.memory.search.page_segments import cut, settle

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

DEFAULT_NEIGHBOURS = 128
GATHERED = 1 << 22  # numbers of keys, and of values, that are gathered at once


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
        return self.attend_and_tell(query, bank, layer, scaling)[:2]

    def attend_and_tell(
        self, query: Tensor, bank: MemoryBank, layer: int, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend`, and the log-sum-exp of the tokens that were read, to see what was found."""
        spans = bank.spans(layer)
        if not spans or query.numel() == 0:
            output, log_sum = nothing(query)
            return output, log_sum, log_sum
        found = self._attend(fold(query, spans[0].block.keys.shape[0]), spans, scaling, len(query))
        output, log_sum = unfold(found.output, found.log_sum, query)
        return output, log_sum, unfold(found.output, found.read_sum, query)[1]

    def _attend(self, query: Tensor, spans: list[Span], scaling: float, rows: int) -> Found:
        settled, rest = settle(spans, LENGTHS[-1])
        places: list[tuple[Block, int, int]] = []
        if sum(map(len, spans)) > self.top_k:
            for span in settled:
                parts, left = cut(span, LENGTHS)
                rest += left
                places += [(span.block, *part) for part in parts]
        if not places:
            output, log_sum = read(query, spans, scaling)
            return Found(output, log_sum, log_sum)
        query = query.float()
        found = [self._search(query * scaling, *place) for place in places]
        beside, beside_sum = read(query, rest, scaling)
        near, near_sums, far, far_sums, risks = zip(*found, strict=True)
        output, log_sum = merge((beside, *near, *far), (beside_sum, *near_sums, *far_sums))
        read_sum = torch.stack([beside_sum, *near_sums]).logsumexp(0)
        error = (torch.stack(risks).logsumexp(0) - log_sum).exp_()
        return read_uncertain(Found(output, log_sum, read_sum), error, self.tolerance, query, rows, spans, scaling)

    def _search(self, query: Tensor, block: Block, start: int, stop: int) -> tuple[Tensor, ...]:
        """Attention of scaled queries (kv_heads, queries, head_dim) to a part of a block.

        Returns:
            Output and log-sum-exp of the neighbours, those of the rest, and the logarithm of the error that the rest
            may have, not yet divided by the whole sum.
        """
        part = part_of(block, start, stop, self.folder)
        here = query.to(block.keys.device)
        count = min(self.top_k, stop - start)
        step = max(1, GATHERED // (len(query) * count * query.shape[-1]))
        pieces = [
            _attend_part(here[:, at : at + step], Span(block, start, stop), part, count)
            for at in range(0, here.shape[1], step)
        ]
        return tuple(torch.cat(tensors, 1).to(query.device) for tensors in zip(*pieces, strict=True))


def _attend_part(query: Tensor, span: Span, part: Part, count: int) -> tuple[Tensor, ...]:
    heads = len(query)
    tokens = part.search(query, count)
    none = tokens < 0
    tokens = tokens.clamp_min(0)
    keys, values = gather(span, tokens)
    scores = (keys @ query.unsqueeze(-1)).squeeze(-1).masked_fill_(none, -torch.inf)
    near_sum = scores.logsumexp(-1)
    near = (shares(scores.clone(), near_sum).unsqueeze(2) @ values).squeeze(2)

    # What is left of each list, when what was found is taken out.
    seen = (~none).float()
    lists = part.lists.gather(1, tokens.view(heads, -1)).view(tokens.shape).long()
    mean, variance = score_moments(query, part.means, part.variances)
    counts = part.counts.unsqueeze(1).expand_as(mean)
    left = counts.scatter_add(2, lists, -seen)
    mean = (mean * counts).scatter_add(2, lists, -scores.masked_fill(none, 0)) / left.clamp_min(1)
    empty = left < 0.5
    left = left.clamp_min(1)
    rest = log_sum_exp(mean, variance, left).masked_fill_(empty, -torch.inf)
    # In a list that was looked into, no score is higher than the lowest that was found.
    lowest = scores.masked_fill(none, torch.inf).amin(-1, keepdim=True)
    risks = potential(mean, variance, left)
    risks = torch.where(left < counts - 0.5, torch.minimum(risks, (rest + lowest) / 2), risks)
    risk = (2 * risks.masked_fill_(empty, -torch.inf)).logsumexp(-1) / 2
    far_sum = rest.logsumexp(-1)
    per_token = shares(rest, far_sum) / left
    far = (per_token * counts) @ part.values
    far = far - ((per_token.gather(2, lists) * seen).unsqueeze(2) @ values).squeeze(2)
    return near, near_sum, far, far_sum, risk


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

"""Cross-batch attention as one would write it on a blackboard: every row's scores over everything that it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding, halves rotated; x is (tokens, head_dim)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def plain_cross_batch(query, key, value, cos, sin, contexts, scaling=None, lengths=None):
    """As `cross_batch_attention`, one row and head at a time."""
    batch, heads, seq, dim = query.shape
    groups = heads // key.shape[1]
    scaling = dim**-0.5 if scaling is None else scaling
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    rows = []
    for row in range(batch):
        outputs = []
        for head in range(heads):
            other = head // groups
            q = rotated(query[row, head], cos[row], sin[row])
            keys, values = [rotated(key[row, other], cos[row], sin[row])], [value[row, other]]
            for seen in contexts[row]:
                end = seq if lengths is None else lengths[seen]
                keys.append(rotated(key[seen, other, :end], cos[row, :1], sin[row, :1]))
                values.append(value[seen, other, :end])
            scores = q @ torch.cat(keys).T * scaling
            future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
            scores[:, :seq] = scores[:, :seq].masked_fill(future, float("-inf"))
            outputs.append(scores.softmax(-1) @ torch.cat(values))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)

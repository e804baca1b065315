"""Cross-batch attention as one would write it on a blackboard: every row's scores over everything that it sees."""

from __future__ import annotations

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotary embedding, halves rotated; x is (tokens, head_dim)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def plain_cross_batch(query, key, value, cos, sin, contexts, scaling=None, lengths=None, far=None):
    """As `cross_batch_attention`, one row and head at a time; with `far` (for other rows) as `cross_batch_parts`."""
    far_query, far_key, far_value = far or (query, key, value)
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
            scores = [q @ rotated(key[row, other], cos[row], sin[row]).T * scaling]
            future = torch.ones(seq, seq, dtype=torch.bool).triu(1)
            scores[0] = scores[0].masked_fill(future, float("-inf"))
            q, values = rotated(far_query[row, head], cos[row], sin[row]), [value[0, 0, :0]]
            for seen in contexts[row]:
                end = seq if lengths is None else lengths[seen]
                scores.append(q @ rotated(far_key[seen, other, :end], cos[row, :1], sin[row, :1]).T * scaling)
                values.append(far_value[seen, other, :end])
            shares = torch.cat(scores, 1).softmax(-1)
            near, found = shares[:, :seq] @ value[row, other], shares[:, seq:] @ torch.cat(values)
            outputs.append(torch.stack([near, found]))
        rows.append(torch.stack(outputs, 1))
    near, found = torch.stack(rows, 1)
    return near + found if far is None else (near, found)

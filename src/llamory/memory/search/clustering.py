"""Puts vectors into equal groups of like ones: a balanced tree that halves along the direction of largest spread."""

from __future__ import annotations

import torch
from torch import Tensor

SAMPLE = 128  # vectors of a group that its direction is found from
POWER_STEPS = 3  # more find the direction more exactly, and no better groups


def balanced_pca_partition(vectors: Tensor, size: int) -> Tensor:
    """An order of vectors in which every `size` neighbours, from the front, are like each other.

    Every group is halved at the median of its projection on its first principal direction until it has `size`
    vectors, so all groups are equally large, neighbouring groups are balanced_pca_partition too, and nothing is left to chance.

    Args:
        vectors: (heads, count, head_dim) floating, where count is `size` times a power of two.
        size: of the groups.

    Returns:
        (heads, count) int64 positions, for each head on its own.
    """
    heads, count, head_dim = vectors.shape
    order = torch.arange(count, device=vectors.device).expand(heads, count)
    groups = vectors
    while groups.shape[1] > size:
        within = (groups @ _directions(groups)).squeeze(-1).argsort(1)
        half = (2 * len(groups), groups.shape[1] // 2)
        order = order.reshape(groups.shape[:2]).gather(1, within).view(half)
        flat = (within + torch.arange(len(groups), device=within.device).unsqueeze(1) * groups.shape[1]).view(-1)
        groups = groups.reshape(-1, head_dim).index_select(0, flat).view(*half, head_dim)
    return order.reshape(heads, count)


def _directions(groups: Tensor) -> Tensor:
    """Each group's direction of largest spread, (groups, head_dim, 1), by power iteration on some of its vectors."""
    sample = groups[:, :: max(1, groups.shape[1] // SAMPLE)]
    centered = sample - sample.mean(1, keepdim=True)
    farthest = centered.square().sum(-1).argmax(1)
    direction = centered[torch.arange(len(groups), device=groups.device), farthest].unsqueeze(-1)
    for _ in range(POWER_STEPS):
        direction = centered.transpose(1, 2) @ (centered @ direction)
        direction = direction / direction.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return direction

"""What the size of memory does to attention: scores get sharper as it grows, and all of it weighs no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamory.longllama.crossbatch_plan import Weights
from llamory.memory.blocks import Span


def seen_tokens(spans: Sequence[Sequence[Span]], leaving: Tensor | None, device: torch.device) -> Tensor:
    """Tokens of memory that each query sees, (rows, 1, width or 1) in float32.

    Args:
        spans: what is in memory, per row.
        leaving: (rows, width, slots) of the local context's, true where one has become memory for a query.
        device: where the numbers go.
    """
    counts = torch.tensor([sum(map(len, past)) for past in spans], dtype=torch.float32, device=device)[:, None, None]
    return counts if leaving is None else counts + leaving.to(device).sum(-1)


def sharpened(config: Any, tensors: Sequence[Tensor], seen: Tensor) -> list[Tensor]:
    """Queries (rows, heads, width, head_dim), times what `mem_log_scale` says for the memory that each sees."""
    factor = 1 + config.mem_log_scale * (seen[..., None] / config.mem_log_start).clamp(min=1).log()
    return [tensor * factor.to(tensor.dtype) for tensor in tensors]


def taken_off(config: Any, seen: Tensor) -> Tensor:
    """What `mem_log_bias` takes off all scores of memory, in the shape of `seen`."""
    return config.mem_log_bias * (seen / config.mem_log_bias_start).clamp(min=1).log()


def less_weights(config: Any, weights: Weights, lengths: Sequence[Sequence[int]]) -> Weights:
    """The same in training: what each of a row's contexts counts as.

    Args:
        config: the model's.
        weights: per row, what each of its contexts counts as without it.
        lengths: of the same shape, the contexts' real tokens.
    """
    less = []
    for given, real in zip(weights, lengths, strict=True):
        tokens = sum(weight * length for weight, length in zip(given, real, strict=True))
        share = max(1.0, tokens / config.mem_log_bias_start) ** -config.mem_log_bias
        less.append([weight * share for weight in given])
    return less

"""What the size of memory does to attention: scores get sharper as it grows, and all of it weighs no more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from llamory.longllama.crossbatch_plan import Weights
from llamory.memory.blocks import SpanList


def seen_tokens(spans: Sequence[SpanList], evicted: Tensor | None, device: torch.device) -> Tensor:
    """Tokens of memory that each query sees, (rows, 1, width or 1) in float32.

    Args:
        spans: what is in memory, per row.
        evicted: (rows, width, slots) of the local context's, true where one has become memory for a query.
        device: where the numbers go.
    """
    counts = torch.tensor([row.tokens for row in spans], dtype=torch.float32, device=device)[:, None, None]
    return counts if evicted is None else counts + evicted.to(device).sum(-1)


def scale_queries(config: Any, tensors: Sequence[Tensor], seen: Tensor) -> list[Tensor]:
    """Queries (rows, heads, width, head_dim), times what `logn_attention_scale` says for the memory that each sees."""
    factor = 1 + config.logn_attention_scale * (seen[..., None] / config.logn_attention_start).clamp(min=1).log()
    return [tensor * factor.to(tensor.dtype) for tensor in tensors]


def memory_logit_bias(config: Any, seen: Tensor) -> Tensor:
    """What `memory_size_bias` takes off all scores of memory, in the shape of `seen`."""
    return config.memory_size_bias * (seen / config.memory_size_bias_start).clamp(min=1).log()


def scale_context_weights(config: Any, weights: Weights, lengths: Sequence[Sequence[int]]) -> Weights:
    """The same in training: what each of a row's contexts counts as.

    Args:
        config: the model's.
        weights: per row, what each of its contexts counts as without it.
        lengths: of the same shape, the contexts' real tokens.
    """
    scaled = []
    for row_weights, row_lengths in zip(weights, lengths, strict=True):
        tokens = sum(weight * length for weight, length in zip(row_weights, row_lengths, strict=True))
        scale = max(1.0, tokens / config.memory_size_bias_start) ** -config.memory_size_bias
        scaled.append([weight * scale for weight in row_weights])
    return scaled

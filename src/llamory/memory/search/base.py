"""The base class of memory searches, what they share, and attention of a batch over its rows' memories."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.memory.attention import empty_attention, merge
from llamory.memory.blocks import SpanList

# The scores of a page's tokens vary less than the sum over its keys' channels says, as channels are correlated.
VARIANCE_SCALE = 0.7
# Largest score of a page above its mean, relative to that of normally distributed scores.
MAX_SCORE_SCALE = 1.1

_buffers = threading.local()


class Memory(Protocol):
    """What a search needs of a memory bank."""

    def spans(self, layer: int) -> SpanList:
        """The tokens of a layer."""


class AttentionResult(NamedTuple):
    """Attention of grouped queries.

    Attributes:
        output: (kv_heads, queries, head_dim).
        lse: log-sum-exp of all tokens, (kv_heads, queries).
        read_lse: log-sum-exp of the tokens read exactly, the same shape; exp(read_lse - lse) is their attention mass.
    """

    output: Tensor
    lse: Tensor
    read_lse: Tensor


class Search(ABC):
    """A way to attend to a memory. A subclass implements `attend_grouped`; the registry constructs it.

    Args:
        top_k: how much is read per query and head; what it counts is up to the subclass, None for its `default_top_k`.
        folder: where the search stores its indexes; None for in memory.
        tolerance: expected error of the output, relative to the values' size, from which a query reads everything.

    Attributes:
        default_top_k: the `top_k` if none is given.
    """

    default_top_k = 1

    def __init__(self, top_k: int | None = None, *, folder: str | Path | None = None, tolerance: float = 0.0):
        self.top_k = self.default_top_k if top_k is None else top_k
        if self.top_k < 1:
            raise LlamoryError(f"mem_top_k is {top_k}, but at least 1 page or neighbour must be read.")
        self.folder = None if folder is None else Path(folder)
        self.tolerance = tolerance

    def attend(self, query: Tensor, bank: Memory, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention over all of a layer's tokens.

        Args:
            query: (rows, heads, queries, head_dim) of rows that share this memory; query head h reads the memory's
                head h // (heads // kv_heads).
            bank: the memory.
            layer: a memory layer.
            scaling: factor of the scores.

        Returns:
            Output of the query's shape and type, and the log-sum-exp (rows, heads, queries) in float32; 0 and -inf for
            an empty memory.
        """
        return self.attend_with_stats(query, bank, layer, scaling)[:2]

    def attend_with_stats(
        self, query: Tensor, bank: Memory, layer: int, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend`, and the log-sum-exp of the tokens that were read exactly."""
        spans = bank.spans(layer)
        if not spans or query.numel() == 0:
            output, lse = empty_attention(query)
            return output, lse, lse
        rows, head_dim = len(query), query.shape[-1]
        # (rows, heads, queries, head_dim) -> (kv_heads, all queries that read that head, head_dim)
        grouped = query.reshape(rows, len(spans[0].block.keys), -1, head_dim).transpose(0, 1)
        result = self.attend_grouped(grouped.reshape(len(grouped), -1, head_dim), spans, scaling, rows)
        output, lse, read_lse = (
            part.reshape(len(grouped), rows, -1).transpose(0, 1).reshape(shape)
            for part, shape in zip(result, (query.shape, query.shape[:-1], query.shape[:-1]), strict=True)
        )
        return output.to(query.dtype), lse, read_lse

    @abstractmethod
    def attend_grouped(self, query: Tensor, spans: SpanList, scaling: float, rows: int) -> AttentionResult:
        """Attention of grouped queries.

        Args:
            query: (kv_heads, rows * queries, head_dim), the queries that read each head, row by row.
            spans: the tokens, at least one span; each may be on another device.
            scaling: factor of the scores.
            rows: rows of the batch.
        """


def attend(query: Tensor, banks: Sequence[Memory], layer: int, scaling: float, search: Search) -> tuple[Tensor, Tensor]:
    """Attention of a batch over its rows' memories; rows with the same memory are attended together.

    Args:
        query: (rows, heads, queries, head_dim).
        banks: one per row; a bank, or forks of one, may occur several times.
        layer: a memory layer.
        scaling: factor of the scores.
        search: how to search.

    Returns:
        Output of the query's shape and type, and the log-sum-exp (rows, heads, queries) in float32; 0 and -inf for
        rows whose memory is empty.
    """
    rows_by_memory: dict[bytes, list[int]] = {}
    for row, bank in enumerate(banks):
        rows_by_memory.setdefault(bank.spans(layer).identity, []).append(row)
    if len(rows_by_memory) == 1:
        return search.attend(query, banks[0], layer, scaling)
    output, lse = empty_attention(query)
    for rows in rows_by_memory.values():
        indices = torch.tensor(rows, device=query.device)
        output[indices], lse[indices] = search.attend(query[indices], banks[rows[0]], layer, scaling)
    return output, lse


def merge_results(results: Sequence[AttentionResult]) -> AttentionResult:
    """One softmax over the tokens of several results."""
    if len(results) == 1:
        return results[0]
    outputs, lses, read_lses = zip(*results, strict=True)
    return AttentionResult(*merge(outputs, lses), torch.stack(read_lses).logsumexp(0))


# ---- estimates of what isn't read, from the mean and the variance of its keys ----------------------------------------


def score_moments(query: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the scores of queries (..., queries, head_dim) over pages (..., pages, head_dim)."""
    return query @ means.transpose(-1, -2), query.square() @ variances.transpose(-1, -2)


def log_sum_exp(mean: Tensor, variance: Tensor, count: int | Tensor) -> Tensor:
    """Estimated log of the sum of exp(score) over the `count` tokens of a page.

    For normally distributed scores it is log(count) + mean + variance / 2. A page's few scores have a shorter tail,
    so the correction grows slower with large variances.
    """
    variance = variance * VARIANCE_SCALE
    return (mean + _log(count)).addcdiv_(variance, variance / 8 + 2)


def log_error_bound(mean: Tensor, variance: Tensor, count: int | Tensor) -> Tensor:
    """Log of the error that not reading a page may cause: the root of its expected sum of exp(2 * score).

    Tokens of an unread page get equal weights, and the errors of their values are independent. For normally
    distributed scores that sum is count * exp(2 * mean + 2 * variance), limited by the largest of `count` scores.
    """
    log_count = _log(count)
    largest = variance.sqrt().mul_((2 * log_count) ** 0.5 * MAX_SCORE_SCALE)
    return torch.minimum(largest, variance + log_count / 2, out=largest).add_(mean)


def softmax_weights(estimates: Tensor, lse: Tensor) -> Tensor:
    """Weight of each page (..., queries, pages) in a log-sum-exp (..., queries), 0 where that is -inf; in place."""
    return estimates.sub_(lse.clamp_min(torch.finfo(torch.float32).min).unsqueeze(-1)).exp_()


def _log(count: int | Tensor) -> float | Tensor:
    return count.log() if isinstance(count, Tensor) else math.log(count)


# ---- buffers ---------------------------------------------------------------------------------------------------------


def workspace(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialized tensor; on a CPU this thread's next request of the same name reuses its storage.

    Fresh memory costs more than filling it. Other devices cache their memory, so there it is a new tensor.
    """
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    buffer: Tensor | None = getattr(_buffers, name, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # else it could not be written to outside of inference mode
            buffer = torch.empty(size, dtype=torch.uint8)
        setattr(_buffers, name, buffer)
    return buffer[:size].view(dtype).view(shape)

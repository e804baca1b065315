"""The base class of memory searches, attention with its log-sum-exp, and attention over the memories of a batch."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.memory.bank import MemoryBank
from llamory.memory.blocks import SpanList

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_BIAS_TILE = 16  # CUDA's kernel needs the rows of an additive mask to start at multiples of this
MAX_MATMUL_SCORES = 1 << 24  # scores that the fallback holds at once
MERGE_ELEMENTS = 1 << 22  # elements of partial outputs that AttentionAccumulator holds before it merges them
# Private operators of torch, the only ones that return the log-sum-exp; without them the fallback is used.
_CPU_KERNEL = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_CUDA_KERNEL = getattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", None)
VARIANCE_SCALE = 0.7  # a page's scores vary less than the sum over its keys' channels, as channels are correlated
MAX_SCORE_SCALE = 1.1  # largest score of a page above its mean, relative to that of normally distributed scores

_buffers = threading.local()


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over all parts from the attention over each, in one softmax.

    Args:
        outputs: (..., queries, head_dim) of each part.
        lses: (..., queries), the log-sum-exp of each part's scores; -inf where a query sees nothing.

    Returns the output in the first part's type and its log-sum-exp in float32; 0 and -inf where no part sees anything.
    """
    if len(outputs) == 1:
        return outputs[0], lses[0].float()
    sums = torch.stack([lse.float() for lse in lses])  # (parts, ..., queries)
    # -inf minus -inf would be NaN, so a row that sees nothing is measured from a finite number.
    max_lse = sums.amax(0).clamp_min(torch.finfo(torch.float32).min)
    weights = (sums - max_lse).exp_()
    total = weights.sum(0)
    normalized = (weights / total.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(-1)
    if sum(output.numel() for output in outputs) <= MERGE_ELEMENTS:
        merged = (torch.stack([output.float() for output in outputs]) * normalized).sum(0)
    else:
        merged = outputs[0].float() * normalized[0]
        for output, weight in zip(outputs[1:], normalized[1:], strict=True):
            merged.addcmul_(output.float(), weight)
    return merged.to(outputs[0].dtype), max_lse + total.log()


class AttentionAccumulator:
    """Merges the attention over any number of parts in bounded memory."""

    def __init__(self) -> None:
        self._outputs, self._lses, self._elements = list[Tensor](), list[Tensor](), 0

    def add(self, output: Tensor, lse: Tensor) -> None:
        """Add one part's output (..., queries, head_dim) and log-sum-exp (..., queries)."""
        self._outputs.append(output)
        self._lses.append(lse)
        self._elements += output.numel()
        if self._elements > MERGE_ELEMENTS and len(self._outputs) > 1:
            output, lse = merge(self._outputs, self._lses)
            self._outputs, self._lses, self._elements = [output], [lse], output.numel()

    def result(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Output in the type and shape of `like`, and its log-sum-exp; 0 and -inf if nothing was added."""
        if not self._outputs:
            return empty_attention(like)
        output, lse = merge(self._outputs, self._lses)
        return output.to(like.dtype), lse


def empty_attention(query: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over no keys: output 0 and log-sum-exp -inf, for a query (..., queries, head_dim)."""
    return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)


def flash(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp by the device's kernel. For inference: the log-sum-exp has no gradient.

    Args:
        query: (batch, heads, queries, head_dim).
        key, value: (batch, kv_heads, keys, head_dim); query head h reads key head h // (heads // kv_heads).
        mask: added to the scores, broadcastable to (batch, heads, queries, keys), or boolean with True where a query
            sees a key. Keys with at most half of the type's lowest number are not seen.
        causal: query i sees the keys 0 to i (instead of a mask).

    Returns the output in the query's type and shape, and the log-sum-exp (batch, heads, queries) in float32 (float64
    for float64); 0 and -inf in rows that see nothing.
    """
    if query.numel() == 0 or key.shape[2] == 0:
        return empty_attention(query)
    (batch, heads, queries, head_dim), kv_heads = query.shape, key.shape[1]
    if heads != kv_heads and mask is None and not causal:
        # Heads of a group read the same keys: as more queries of one head they share each read of the memory.
        grouped = query.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)
        output, lse = flash(grouped, key, value, scaling=scaling)
        return output.reshape(query.shape), lse.reshape(query.shape[:-1])
    bias, fully_masked = _additive_mask(mask, query)
    output, lse = _kernel_attention(query, key, value, scaling, bias, causal)
    output, lse = output.to(query.dtype), lse.to(torch.promote_types(query.dtype, torch.float32))
    if fully_masked is not None:
        lse = lse.masked_fill(fully_masked, -torch.inf)
        output = output.masked_fill(fully_masked.unsqueeze(-1), 0)
    return output, lse


def _additive_mask(mask: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mask as four-dimensional numbers to add, and the rows that see nothing."""
    if mask is None:
        return None, None
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    # Kernels disagree about such rows (0, NaN, the mean of all values), so they are set afterwards.
    fully_masked = mask.amax(-1) <= torch.finfo(mask.dtype).min / 2
    return mask, fully_masked.expand(*query.shape[:3])


def _kernel_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    device, head_dim = query.device.type, query.shape[-1]
    kernel = {"cpu": _CPU_KERNEL, "cuda": _CUDA_KERNEL if head_dim % 8 == 0 else None}.get(device)
    supported = key.dtype == value.dtype and key.shape == value.shape and key.dtype in KERNEL_TYPES
    if kernel is None or not supported:
        return _matmul_attention(query, key, value, scaling, bias, causal)
    query = query.to(key.dtype)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if device == "cpu":
        bias = None if bias is None else bias.to(key.dtype)
        return kernel(query, key, value, 0.0, causal, attn_mask=bias, scale=scaling)
    key, value = (_repeat_kv(tensor, query.shape[1]) for tensor in (key, value))
    if bias is not None:
        keys = key.shape[2]
        padded_bias = bias.new_zeros(*bias.shape[:3], -(-keys // CUDA_BIAS_TILE) * CUDA_BIAS_TILE, dtype=key.dtype)
        padded_bias[..., :keys] = bias
        bias = padded_bias[..., :keys].expand(*query.shape[:3], keys)
    output, lse, *_ = kernel(query, key, value, bias, True, 0.0, causal, scale=scaling)
    return output, lse[..., : query.shape[2]]  # the kernel pads the queries


def _matmul_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Matrix products, some queries at a time: for devices and types without a kernel."""
    batch, heads, queries, _ = query.shape
    compute_dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    key, value = (_repeat_kv(tensor.to(compute_dtype), heads) for tensor in (key, value))
    output = query.new_empty(batch, heads, queries, value.shape[-1], dtype=compute_dtype)
    lse = query.new_empty(batch, heads, queries, dtype=compute_dtype)
    step = max(1, MAX_MATMUL_SCORES // (batch * heads * key.shape[2]))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        scores = query[:, :, rows].to(compute_dtype) @ key.transpose(2, 3) * scaling  # (batch, heads, rows, keys)
        if bias is not None:
            scores = scores + bias.expand(batch, -1, queries, -1)[:, :, rows]
        if causal:
            positions = torch.arange(start, start + scores.shape[2], device=key.device)
            future = torch.arange(key.shape[2], device=key.device) > positions.unsqueeze(1)
            scores = scores.masked_fill(future, -torch.inf)
        lse[:, :, rows] = scores.logsumexp(-1)
        output[:, :, rows] = scores.softmax(-1) @ value
    return output, lse


def _repeat_kv(tensor: Tensor, heads: int) -> Tensor:
    """Heads (batch, kv_heads, keys, head_dim), each repeated for the query heads that read it."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)


class AttentionResult(NamedTuple):
    """Attention of grouped queries; exp(read_lse - lse) is the attention mass of the tokens that were read."""

    output: Tensor  # (kv_heads, queries, head_dim)
    lse: Tensor  # log-sum-exp of all tokens, (kv_heads, queries)
    read_lse: Tensor  # log-sum-exp of the tokens that were read exactly, the same shape


class Search(ABC):
    """A way to attend to a memory. A subclass implements `attend_grouped`; the registry constructs it.

    Args:
        top_k: how much is read per query and head, in units of the subclass.
        folder: where the search stores its indexes; None for in memory.
        tolerance: expected error of the output, relative to the values' size, from which a query reads everything.
    """

    default_top_k = 1
    default_tolerance = 0.0

    def __init__(self, top_k: int | None = None, *, folder: str | Path | None = None, tolerance: float | None = None):
        self.top_k = self.default_top_k if top_k is None else top_k
        if self.top_k < 1:
            raise LlamoryError(f"mem_top_k is {top_k}, but at least 1 page or neighbour must be read.")
        self.folder = None if folder is None else Path(folder)
        self.tolerance = self.default_tolerance if tolerance is None else tolerance

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention over a layer's tokens by queries (rows, heads, queries, head_dim) of rows that share this memory.

        Query head h reads head h // (heads // kv_heads). Returns the output in the query's shape and type, and the
        log-sum-exp (rows, heads, queries) in float32; 0 and -inf for an empty memory.
        """
        output, lse, _ = self.attend_with_stats(query, bank, layer, scaling)
        return output, lse

    def attend_with_stats(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, ...]:
        """As `attend`, and the log-sum-exp of the tokens that were read exactly."""
        spans = bank.spans(layer)
        if not spans or query.numel() == 0:
            output, lse = empty_attention(query)
            return output, lse, lse
        rows, head_dim = len(query), query.shape[-1]
        # (rows, heads, queries, head_dim) -> (kv_heads, all queries that read that head, head_dim)
        grouped = query.reshape(rows, len(spans[0].block.keys), -1, head_dim).transpose(0, 1)
        result = self.attend_grouped(grouped.reshape(len(grouped), -1, head_dim), spans, scaling, rows)
        output, lse, read_lse = (each.reshape(len(grouped), rows, -1).transpose(0, 1) for each in result)
        shape = query.shape[:-1]
        return output.reshape(query.shape).to(query.dtype), lse.reshape(shape), read_lse.reshape(shape)

    @abstractmethod
    def attend_grouped(self, query: Tensor, spans: SpanList, scaling: float, rows: int) -> AttentionResult:
        """Attention of grouped queries to at least one span; each span may be on another device.

        `query` is (kv_heads, rows * queries, head_dim), the queries that read each head, row by row.
        """


def attend(
    query: Tensor, banks: Sequence[MemoryBank], layer: int, scaling: float, search: Search
) -> tuple[Tensor, Tensor]:
    """Attention of a batch (rows, heads, queries, head_dim) over its rows' memories, row by row as `Search.attend`."""
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


def in_steps(function: Callable[..., Sequence[Tensor]], step: int, *tensors: Tensor) -> Sequence[Tensor]:
    """The concatenated results of a function of `step` entries (at least 1) at a time of the tensors' dimension 1."""
    results = [function(*parts) for parts in zip(*(each.split(max(1, step), 1) for each in tensors), strict=True)]
    return results[0] if len(results) == 1 else [torch.cat(each, 1) for each in zip(*results, strict=True)]


def merge_results(results: Sequence[AttentionResult]) -> AttentionResult:
    """One softmax over the tokens of several results."""
    if len(results) == 1:
        return results[0]
    outputs, lses, read_lses = zip(*results, strict=True)
    return AttentionResult(*merge(outputs, lses), torch.stack(read_lses).logsumexp(0))


def score_moments(query: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the scores of queries (..., queries, head_dim) over pages (..., pages, head_dim)."""
    return query @ means.transpose(-1, -2), query.square() @ variances.transpose(-1, -2)


def log_sum_exp(mean: Tensor, variance: Tensor, count: int | Tensor) -> Tensor:
    """Estimated log of the sum of exp(score) over the `count` tokens of a page.

    For normally distributed scores it is log(count) + mean + variance / 2; a page's few scores have a shorter tail.
    """
    variance = variance * VARIANCE_SCALE
    return (mean + _log(count)).addcdiv_(variance, variance / 8 + 2)


def log_error_bound(mean: Tensor, variance: Tensor, count: int | Tensor) -> Tensor:
    """Log of the error that not reading a page may cause: the root of its expected sum of exp(2 * score).

    For normally distributed scores the sum is count * exp(2 * mean + 2 * variance), limited by the largest score.
    """
    log_count = _log(count)
    largest = variance.sqrt().mul_((2 * log_count) ** 0.5 * MAX_SCORE_SCALE)
    return torch.minimum(largest, variance + log_count / 2, out=largest).add_(mean)


def softmax_weights(estimates: Tensor, lse: Tensor) -> Tensor:
    """Weight of each page (..., queries, pages) in a log-sum-exp (..., queries), 0 where that is -inf; in place."""
    return estimates.sub_(lse.clamp_min(torch.finfo(torch.float32).min).unsqueeze(-1)).exp_()


def _log(count: int | Tensor) -> float | Tensor:
    return count.log() if isinstance(count, Tensor) else math.log(count)


def workspace(name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """An uninitialized tensor; on a CPU this thread's next request of the same name reuses its storage."""
    if torch.device(device).type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    buffer: Tensor | None = getattr(_buffers, name, None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # else it could not be written to outside of inference mode
            buffer = torch.empty(size, dtype=torch.uint8)
        setattr(_buffers, name, buffer)
    return buffer[:size].view(dtype).view(shape)

"""Attention with its log-sum-exp, so that local context and memory, or parts of it, merge into one softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank
    from llamory.memory.search.base import Search

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
CUDA_LSE_TILE = 32  # the memory-efficient kernel pads its log-sum-exp to a multiple of this many queries
CUDA_BIAS_TILE = 16  # and wants the rows of an additive mask to start at such multiples
PLAIN_SCORES = 1 << 24  # scores that the plain way holds at once
MERGE_ELEMENTS = 1 << 22  # elements of partial outputs that Parts holds before it merges them


def merge(outputs: Sequence[Tensor], log_sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """One softmax over everything from the attention over its parts.

    Args:
        outputs: of each part, (..., queries, head_dim).
        log_sums: natural logarithm of each part's sum of exponentials, (..., queries); -inf where it saw nothing.

    Returns:
        The output in the first part's type and its log-sum-exp in float32; 0 and -inf where no part saw anything.
    """
    if len(outputs) == 1:
        return outputs[0], log_sums[0].float()
    sums = torch.stack([log_sum.float() for log_sum in log_sums])
    # -inf minus -inf would be NaN, so a row that sees nothing is measured from 0.
    highest = sums.amax(0).clamp_min(torch.finfo(torch.float32).min)
    weights = (sums - highest).exp_()
    total = weights.sum(0)
    shares = (weights / total.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(-1)
    if sum(output.numel() for output in outputs) <= MERGE_ELEMENTS:
        merged = (torch.stack([output.float() for output in outputs]) * shares).sum(0)
    else:
        merged = outputs[0].float() * shares[0]
        for output, share in zip(outputs[1:], shares[1:], strict=True):
            merged.addcmul_(output.float(), share)
    return merged.to(outputs[0].dtype), highest + total.log()


class Parts:
    """Gathers the attention over parts, however many there are, in bounded memory."""

    def __init__(self) -> None:
        self._outputs: list[Tensor] = []
        self._log_sums: list[Tensor] = []
        self._elements = 0

    def add(self, output: Tensor, log_sum: Tensor) -> None:
        """Take one part's output (..., queries, head_dim) and log-sum-exp (..., queries)."""
        self._outputs.append(output)
        self._log_sums.append(log_sum)
        self._elements += output.numel()
        if self._elements > MERGE_ELEMENTS and len(self._outputs) > 1:
            output, log_sum = merge(self._outputs, self._log_sums)
            self._outputs, self._log_sums, self._elements = [output], [log_sum], output.numel()

    def result(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Output in the type and shape of `like` and its log-sum-exp; 0 and -inf if nothing was added."""
        if not self._outputs:
            return nothing(like)
        output, log_sum = merge(self._outputs, self._log_sums)
        return output.to(like.dtype), log_sum


def nothing(query: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over no keys: output 0 and log-sum-exp -inf, for a query (..., queries, head_dim)."""
    return torch.zeros_like(query), query.new_full(query.shape[:-1], -torch.inf, dtype=torch.float32)


def flash(
    query: Tensor, key: Tensor, value: Tensor, *, scaling: float, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention and its log-sum-exp, by the kernel of the device.

    For inference: gradients don't flow through the log-sum-exp.

    Args:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); query head h reads key head h // (heads // kv_heads).
        value: the shape of `key`.
        scaling: what scores are multiplied by.
        mask: added to the scores, broadcastable to (batch, heads, queries, keys), or boolean with True where a query
            sees a key. Keys with half of the type's lowest number or less count as not seen.
        causal: query i sees the keys 0 to i (instead of a mask).

    Returns:
        Output (batch, heads, queries, head_dim) in the query's type and log-sum-exp (batch, heads, queries) in
        float32 (float64 for float64); 0 and -inf in rows that see nothing.
    """
    if query.numel() == 0 or key.shape[2] == 0:
        return nothing(query)
    (batch, heads, queries, head_dim), kv_heads = query.shape, key.shape[1]
    if heads != kv_heads and mask is None and not causal:
        # Heads of a group read the same keys: as more queries of one head they share each read of the memory.
        folded = query.reshape(batch, kv_heads, heads // kv_heads * queries, head_dim)
        output, log_sum = flash(folded, key, value, scaling=scaling)
        return output.reshape(query.shape), log_sum.reshape(query.shape[:-1])
    bias, blind = _additive(mask, query)
    output, log_sum = _kernel(query, key, value, scaling, bias, causal)
    output, log_sum = output.to(query.dtype), log_sum.to(torch.promote_types(query.dtype, torch.float32))
    if blind is not None:
        log_sum = log_sum.masked_fill(blind, -torch.inf)
        output = output.masked_fill(blind.unsqueeze(-1), 0)
    return output, log_sum


def attend(
    query: Tensor, banks: Sequence[MemoryBank], layer: int, scaling: float, search: Search
) -> tuple[Tensor, Tensor]:
    """Attention of a batch over its rows' memories; rows with the same memory are attended together, read once.

    Args:
        query: (batch, heads, queries, head_dim).
        banks: one per row; the same bank, or forks of one, may stand several times.
        layer: whose memory.
        scaling: what scores are multiplied by.
        search: how.

    Returns:
        Output of the query's shape and type, and the log-sum-exp (batch, heads, queries) in float32; 0 and -inf for
        rows whose memory is empty.
    """
    together: dict[tuple, list[int]] = {}
    for row, bank in enumerate(banks):
        spans = tuple((id(span.block), span.start, span.stop) for span in bank.spans(layer))
        together.setdefault(spans, []).append(row)
    if len(together) == 1:
        return search.attend(query, banks[0], layer, scaling)
    output, log_sum = nothing(query)
    for spans, rows in together.items():
        if spans:
            at = torch.tensor(rows, device=query.device)
            output[at], log_sum[at] = search.attend(query[at], banks[rows[0]], layer, scaling)
    return output, log_sum


def _additive(mask: Tensor | None, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The mask as four-dimensional numbers to add, and the rows that see nothing."""
    if mask is None:
        return None, None
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -torch.inf)
    # Kernels disagree about such rows (0, NaN, the mean of all values), so they are set afterwards.
    blind = mask.amax(-1) <= torch.finfo(mask.dtype).min / 2
    return mask, blind.expand(*query.shape[:3])


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    aten = torch.ops.aten
    same = key.dtype == value.dtype and key.shape == value.shape and key.dtype in KERNEL_TYPES
    device, head_dim = query.device.type, query.shape[-1]
    if not same or device not in ("cpu", "cuda") or (device == "cuda" and head_dim % 8):
        return _plain(query, key, value, scaling, bias, causal)
    query = query.to(key.dtype)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if device == "cpu":
        bias = None if bias is None else bias.to(key.dtype)
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, attn_mask=bias, scale=scaling
        )
    key, value = (_repeat(tensor, query.shape[1]) for tensor in (key, value))
    if bias is not None:
        keys = key.shape[2]
        room = bias.new_zeros(*bias.shape[:3], -(-keys // CUDA_BIAS_TILE) * CUDA_BIAS_TILE, dtype=key.dtype)
        room[..., :keys] = bias
        bias = room[..., :keys].expand(*query.shape[:3], keys)
    output, log_sum, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, causal, scale=scaling
    )
    return output, log_sum[..., : query.shape[2]]


def _plain(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, bias: Tensor | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Matrix products, some queries at a time: for devices and types without a kernel that gives the log-sum-exp."""
    batch, heads, queries, _ = query.shape
    exact = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    key, value = (_repeat(tensor.to(exact), heads) for tensor in (key, value))
    output = query.new_empty(batch, heads, queries, value.shape[-1], dtype=exact)
    log_sum = query.new_empty(batch, heads, queries, dtype=exact)
    step = max(1, PLAIN_SCORES // (batch * heads * key.shape[2]))
    for start in range(0, queries, step):
        rows = slice(start, start + step)
        scores = query[:, :, rows].to(exact) @ key.transpose(2, 3) * scaling
        if bias is not None:
            scores = scores + bias.expand(batch, -1, queries, -1)[:, :, rows]
        if causal:
            later = torch.arange(key.shape[2], device=key.device) > torch.arange(
                start, start + scores.shape[2], device=key.device
            ).unsqueeze(1)
            scores = scores.masked_fill(later, -torch.inf)
        log_sum[:, :, rows] = scores.logsumexp(-1)
        output[:, :, rows] = scores.softmax(-1) @ value
    return output, log_sum


def _repeat(tensor: Tensor, heads: int) -> Tensor:
    """Key or value heads (batch, kv_heads, keys, head_dim) as many times as the query has heads for each."""
    return tensor if tensor.shape[1] == heads else tensor.repeat_interleave(heads // tensor.shape[1], 1)

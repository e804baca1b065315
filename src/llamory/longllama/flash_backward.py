"""The backward pass of `llamory.memory.search.base.flash` for parts of one softmax.

The kernels are private operators of torch, without which plain matrix products do the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

MAX_MATMUL_SCORES = 1 << 22  # scores that the plain backward pass holds at once
_CUDA_LSE_TILE = 32  # the CUDA kernel needs its log-sum-exp padded to a multiple of this
_EXTRA_DIMS = 8  # kernels need head_dim to be a multiple of 8
_KERNELS = {
    "cpu": "_scaled_dot_product_flash_attention_for_cpu_backward",
    "cuda": "_scaled_dot_product_efficient_attention_backward",
}
_CPU_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CUDA_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionPart:
    """Queries and the keys that they see.

    Attributes:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); query head h uses key head h // (heads // kv_heads).
        value: the shape of `key`.
        causal: whether query i sees the keys 0 to i only.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    def grouped(self, tensor: Tensor) -> Tensor:
        """A query-like tensor (batch, heads, queries, …) as (batch, kv_heads, groups * queries, …)."""
        return tensor.reshape(len(tensor), self.key.shape[1], -1, *tensor.shape[3:])

    def heads_of(self, tensor: Tensor) -> Iterator[Tensor]:
        """Views of a query-like tensor with kv_heads heads, one for each query head of a group."""
        for group in range(self.groups):
            yield tensor[:, group :: self.groups]


def attend_part_backward(
    grad: Tensor, part: AttentionPart, output: Tensor, lse: Tensor, scaling: float, delta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's query, key and value.

    Args:
        grad: gradient of the output of the whole attention, (batch, heads, queries, head_dim).
        part: the part.
        output: of the whole attention, over all parts.
        lse: log-sum-exp of the whole attention, (batch, heads, queries).
        scaling: factor of the scores.
        delta: sum over head_dim of gradient times output, (batch, heads, queries); computed from `grad` and `output` by
            default. Needed if the outputs of other parts have other gradients.
    """
    if delta is not None:
        return _with_delta(grad, part, lse, scaling, delta)
    if part.groups == 1:
        return _backward(grad, part.query, part.key, part.value, output, lse, part.causal, scaling)
    if not part.causal:
        # As in `flash`, the heads of a group become more queries of one head.
        grouped = part.grouped(grad), part.grouped(part.query), part.key, part.value, part.grouped(output)
        grads = _backward(*grouped, part.grouped(lse), part.causal, scaling)
        return grads[0].reshape(part.query.shape), grads[1], grads[2]
    grad_query, grad_key, grad_value = map(torch.zeros_like, (part.query, part.key, part.value))
    tensors = (grad, part.query, output, lse, grad_query)
    for heads, query, out, lses, grad_out in zip(*map(part.heads_of, tensors), strict=True):
        grads = _backward(heads, query, part.key, part.value, out, lses, part.causal, scaling)
        grad_out.copy_(grads[0])
        grad_key += grads[1]
        grad_value += grads[2]
    return grad_query, grad_key, grad_value


def _with_delta(
    grad: Tensor, part: AttentionPart, lse: Tensor, scaling: float, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for a given `delta`, which kernels compute themselves as the product of gradient and output.

    Both get extra dimensions, in which the gradient is 1, values are 0, and the output is delta, split into two terms
    against rounding. Their product is then delta, and nothing else changes.
    """
    (*shape, width), dtype = grad.shape, grad.dtype
    first = delta.to(dtype)
    output = grad.new_zeros(*shape, width + _EXTRA_DIMS)
    output[..., width], output[..., width + 1] = first, (delta - first.to(delta.dtype)).to(dtype)
    query, key, value, padded_grad = (
        pad(tensor, (0, _EXTRA_DIMS)) for tensor in (part.query, part.key, part.value, grad)
    )
    padded_grad[..., width : width + 2] = 1
    grads = attend_part_backward(padded_grad, AttentionPart(query, key, value, part.causal), output, lse, scaling)
    return grads[0][..., :width], grads[1][..., :width], grads[2][..., :width]


def _backend(query: Tensor) -> str:
    device, dtype = query.device.type, query.dtype
    if not hasattr(torch.ops.aten, _KERNELS.get(device, "")):
        return "plain"
    if device == "cuda":
        return "cuda" if dtype in _CUDA_TYPES and query.shape[-1] % 8 == 0 else "plain"
    return "cpu" if dtype in _CPU_TYPES else "plain"


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, causal: bool, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    backend, aten = _backend(query), torch.ops.aten
    if backend != "plain":
        grad, query, key, value = map(_contiguous_rows, (grad, query, key, value))
    if backend == "cpu":
        output = _contiguous_rows(output)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, lse.contiguous(), 0.0, causal, scale=scaling
        )
        return grads
    if backend == "cuda":
        queries = query.shape[2]
        # The forward kernel pads with infinity, too.
        padded_lse = lse.new_full((*lse.shape[:2], -(-queries // _CUDA_LSE_TILE) * _CUDA_LSE_TILE), torch.inf)
        padded_lse[..., :queries] = lse
        # In half precision the kernel ignores the output's strides: rows must be heads * head_dim apart, as its forward
        # pass leaves them.
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
        # Without dropout the kernel ignores the random state, but needs the arguments.
        seed = torch.zeros((), dtype=torch.long, device=query.device)
        *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, None, output, padded_lse, seed, seed, 0.0, (True, True, True, False), causal,
            scale=scaling,
        )  # fmt: skip
        return grads[0], grads[1], grads[2]
    compute_dtype = torch.promote_types(query.dtype, torch.float32)
    grad, upcast_key, upcast_value = grad.to(compute_dtype), key.to(compute_dtype), value.to(compute_dtype)
    delta = (grad * output.to(compute_dtype)).sum(-1, keepdim=True)
    grad_query, grad_key, grad_value = (
        torch.zeros_like(query),
        torch.zeros_like(upcast_key),
        torch.zeros_like(upcast_value),
    )
    for rows in _query_slices(query, key):
        scores = _scores(query[:, :, rows], key, rows.start if causal else None, scaling, compute_dtype)
        weights = (scores - lse[:, :, rows, None]).exp()
        grad_value += weights.transpose(2, 3) @ grad[:, :, rows]
        grad_scores = weights * (grad[:, :, rows] @ upcast_value.transpose(2, 3) - delta[:, :, rows]) * scaling
        grad_query[:, :, rows] = (grad_scores @ upcast_key).to(query.dtype)
        grad_key += grad_scores.transpose(2, 3) @ query[:, :, rows].to(compute_dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _query_slices(query: Tensor, key: Tensor) -> Iterator[slice]:
    batch, heads, queries, _ = query.shape
    step = max(1, MAX_MATMUL_SCORES // (batch * heads * key.shape[2]))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))


def _scores(query: Tensor, key: Tensor, first: int | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """Scores (batch, heads, queries, keys); with `first`, query i is at position `first` + i and sees no later key."""
    scores = query.to(dtype) @ key.to(dtype).transpose(2, 3) * scaling
    if first is not None:
        key_positions = torch.arange(key.shape[2], device=key.device)
        future = key_positions > torch.arange(first, first + query.shape[2], device=key.device)[:, None]
        scores = scores.masked_fill(future, -torch.inf)
    return scores

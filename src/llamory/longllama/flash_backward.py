"""The backward pass of `llamory.memory.search.base.flash` for parts of one softmax.

The kernels are private operators of torch, without which plain matrix products do the same.
"""

from __future__ import annotations

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
    """Queries and the keys that they see; query head h uses key head h // (heads // kv_heads)."""

    query: Tensor  # (batch, heads, queries, head_dim)
    key: Tensor  # (batch, kv_heads, keys, head_dim)
    value: Tensor
    causal: bool  # query i sees the keys 0 to i only

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]


def attend_part_backward(
    grad: Tensor, part: AttentionPart, output: Tensor, lse: Tensor, scaling: float, delta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's query, key and value.

    Args:
        grad: gradient of the output of the whole attention, (batch, heads, queries, head_dim).
        output, lse: output and log-sum-exp (batch, heads, queries) of the whole attention, over all parts.
        scaling: factor of the scores.
        delta: sum over head_dim of gradient times output, (batch, heads, queries); needed if the outputs of other parts
            have other gradients.
    """
    if delta is not None:
        return _with_delta(grad, part, lse, scaling, delta)
    if part.groups == 1:
        return _backward(grad, part.query, part.key, part.value, output, lse, part.causal, scaling)
    tensors = (grad, part.query, output, lse)
    if not part.causal:
        # As in `flash`, the heads of a group become more queries of one head: (batch, kv_heads, groups * queries, …).
        grad, query, output, lse = (t.reshape(len(t), part.key.shape[1], -1, *t.shape[3:]) for t in tensors)
        grads = _backward(grad, query, part.key, part.value, output, lse, part.causal, scaling)
        return grads[0].reshape(part.query.shape), grads[1], grads[2]
    grad_query, grad_key, grad_value = map(torch.zeros_like, (part.query, part.key, part.value))
    for group in range(part.groups):
        heads = slice(group, None, part.groups)  # one query head of each group
        grad, query, output, lse = (t[:, heads] for t in tensors)
        grads = _backward(grad, query, part.key, part.value, output, lse, part.causal, scaling)
        grad_query[:, heads] = grads[0]
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
    query, key, value, grad = (pad(tensor, (0, _EXTRA_DIMS)) for tensor in (part.query, part.key, part.value, grad))
    grad[..., width : width + 2] = 1
    grads = attend_part_backward(grad, AttentionPart(query, key, value, part.causal), output, lse, scaling)
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
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
        output, lse = _contiguous_rows(output), lse.contiguous()
        return backward(grad, query, key, value, output, lse, 0.0, causal, scale=scaling)
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
    grad_query, grad_key, grad_value = map(torch.zeros_like, (query, upcast_key, upcast_value))
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    step = max(1, MAX_MATMUL_SCORES // (batch * heads * keys))
    for start in range(0, queries, step):
        rows = slice(start, min(start + step, queries))
        scores = query[:, :, rows].to(compute_dtype) @ upcast_key.transpose(2, 3) * scaling
        if causal:
            future = torch.arange(keys, device=key.device) > torch.arange(queries, device=key.device)[rows, None]
            scores = scores.masked_fill(future, -torch.inf)
        weights = (scores - lse[:, :, rows, None]).exp()
        grad_value += weights.transpose(2, 3) @ grad[:, :, rows]
        grad_scores = weights * (grad[:, :, rows] @ upcast_value.transpose(2, 3) - delta[:, :, rows]) * scaling
        grad_query[:, :, rows] = (grad_scores @ upcast_key).to(query.dtype)
        grad_key += grad_scores.transpose(2, 3) @ query[:, :, rows].to(compute_dtype)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _contiguous_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()

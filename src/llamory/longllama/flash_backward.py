"""The backward pass of `llamory.memory.attention.flash`, so that parts of one softmax can be trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

PLAIN_SCORES = 1 << 22  # scores that the plain way holds at once
_CUDA_LSE_TILE = 32  # the memory-efficient kernel wants its log-sum-exp filled up to a multiple of this
_MORE = 8  # dimensions: kernels want multiples of 8
_CPU_TYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CUDA_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Part:
    """Queries and the keys that they see.

    Attributes:
        query: (batch, heads, queries, head_dim).
        key: (batch, kv_heads, keys, head_dim); query head h reads key head h // (heads // kv_heads).
        value: the shape of `key`.
        causal: query i sees the keys 0 to i, or all.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    causal: bool

    @property
    def groups(self) -> int:
        """Query heads per key head."""
        return self.query.shape[1] // self.key.shape[1]

    def folded(self, tensor: Tensor) -> Tensor:
        """A query-like tensor (batch, heads, queries, …) as (batch, kv_heads, groups * queries, …)."""
        return tensor.reshape(len(tensor), self.key.shape[1], -1, *tensor.shape[3:])

    def heads_of(self, tensor: Tensor) -> Iterator[Tensor]:
        """Views of a query-like tensor that have as many heads as the keys, one per query head of a group."""
        for group in range(self.groups):
            yield tensor[:, group :: self.groups]


def attend_part_backward(
    grad: Tensor, part: Part, output: Tensor, log_sum: Tensor, scaling: float, delta: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a part's query, key and value.

    Args:
        grad: gradient of the whole attention's output, (batch, heads, queries, head_dim).
        part: the part.
        output: of the whole attention, over this part and all others.
        log_sum: of the whole attention, (batch, heads, queries).
        scaling: what scores are multiplied by.
        delta: the sum over head_dim of gradient times output, (batch, heads, queries), where other parts' outputs have
            gradients of their own; worked out from `grad` and `output` if not given.
    """
    if delta is not None:
        return _with_delta(grad, part, log_sum, scaling, delta)
    if part.groups == 1:
        return _backward(grad, part.query, part.key, part.value, output, log_sum, part.causal, scaling)
    if not part.causal:
        # Heads of a group read the same keys, as in `flash`: more queries of one head.
        folded = part.folded(grad), part.folded(part.query), part.key, part.value, part.folded(output)
        grads = _backward(*folded, part.folded(log_sum), part.causal, scaling)
        return grads[0].reshape(part.query.shape), grads[1], grads[2]
    grad_query, grad_key, grad_value = map(torch.zeros_like, (part.query, part.key, part.value))
    tensors = (grad, part.query, output, log_sum, grad_query)
    for heads, query, out, sums, into in zip(*map(part.heads_of, tensors), strict=True):
        grads = _backward(heads, query, part.key, part.value, out, sums, part.causal, scaling)
        into.copy_(grads[0])
        grad_key += grads[1]
        grad_value += grads[2]
    return grad_query, grad_key, grad_value


def _with_delta(
    grad: Tensor, part: Part, log_sum: Tensor, scaling: float, delta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for a given `delta`, which kernels work out themselves, from the output and its gradient.

    So both get more dimensions, where the gradient is 1, the values are 0, and the output is delta (in two terms, what
    a short type rounds off being the second): their product is then delta, and nothing else changes.
    """
    (*shape, width), dtype = grad.shape, grad.dtype
    first = delta.to(dtype)
    output = grad.new_zeros(*shape, width + _MORE)
    output[..., width], output[..., width + 1] = first, (delta - first.to(delta.dtype)).to(dtype)
    query, key, value, more = (pad(tensor, (0, _MORE)) for tensor in (part.query, part.key, part.value, grad))
    more[..., width : width + 2] = 1
    grads = attend_part_backward(more, Part(query, key, value, part.causal), output, log_sum, scaling)
    return grads[0][..., :width], grads[1][..., :width], grads[2][..., :width]


def _way(query: Tensor) -> str:
    device, dtype = query.device.type, query.dtype
    if device == "cpu" and dtype in _CPU_TYPES:
        return "cpu"
    if device == "cuda" and dtype in _CUDA_TYPES and query.shape[-1] % 8 == 0:
        return "cuda"
    return "plain"


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sum: Tensor,
    causal: bool,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    way, aten = _way(query), torch.ops.aten
    if way != "plain":
        grad, query, key, value = map(_dense, (grad, query, key, value))
    if way == "cpu":
        output = _dense(output)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, log_sum.contiguous(), 0.0, causal, scale=scaling
        )
        return grads
    if way == "cuda":
        queries = query.shape[2]
        # Filled up with what its forward pass fills up with.
        room = log_sum.new_full((*log_sum.shape[:2], -(-queries // _CUDA_LSE_TILE) * _CUDA_LSE_TILE), torch.inf)
        room[..., :queries] = log_sum
        # In half precision the kernel takes the output's rows to lie heads * head_dim apart, as its forward pass left
        # them, and doesn't look where they are.
        output = output.transpose(1, 2).contiguous().transpose(1, 2)
        # Without dropout the kernel reads no random state, but wants to be given one.
        seed = torch.zeros((), dtype=torch.long, device=query.device)
        *grads, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, query, key, value, None, output, room, seed, seed, 0.0, (True, True, True, False), causal,
            scale=scaling,
        )  # fmt: skip
        return grads[0], grads[1], grads[2]
    exact = torch.promote_types(query.dtype, torch.float32)
    grad, wide_key, wide_value = grad.to(exact), key.to(exact), value.to(exact)
    delta = (grad * output.to(exact)).sum(-1, keepdim=True)
    grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    for rows in _pieces(query, key):
        scores = _scores(query[:, :, rows], key, rows.start if causal else None, scaling, exact)
        shares = (scores - log_sum[:, :, rows, None]).exp()
        grad_value += shares.transpose(2, 3) @ grad[:, :, rows]
        grad_scores = shares * (grad[:, :, rows] @ wide_value.transpose(2, 3) - delta[:, :, rows]) * scaling
        grad_query[:, :, rows] = (grad_scores @ wide_key).to(query.dtype)
        grad_key += grad_scores.transpose(2, 3) @ query[:, :, rows].to(exact)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _pieces(query: Tensor, key: Tensor) -> Iterator[slice]:
    batch, heads, queries, _ = query.shape
    step = max(1, PLAIN_SCORES // (batch * heads * key.shape[2]))
    for start in range(0, queries, step):
        yield slice(start, min(start + step, queries))


def _scores(query: Tensor, key: Tensor, first: int | None, scaling: float, dtype: torch.dtype) -> Tensor:
    """Scores (batch, heads, queries, keys); with `first`, query i is number `first` + i and sees no later key."""
    scores = query.to(dtype) @ key.to(dtype).transpose(2, 3) * scaling
    if first is not None:
        numbers = torch.arange(key.shape[2], device=key.device)
        later = numbers > torch.arange(first, first + query.shape[2], device=key.device)[:, None]
        scores = scores.masked_fill(later, -torch.inf)
    return scores

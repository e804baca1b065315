"""Plain stand-ins for torch's CUDA kernels that the package calls by name.

They take and give what `aten/src/ATen/native/transformers/cuda` (attention.cu, attention_backward.cu and
mem_eff_attention/kernel_{forward,backward}.h) does: what is refused there is refused here, and what is taken for
granted there, without a look, is taken for granted here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TILE = 32  # of the log-sum-exp
ACCESS = 16  # bytes that are read at once


def efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    compute_log_sumexp: bool,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor, ...]:
    """Output, laid out as (batch, queries, heads, head_dim), log-sum-exp filled up to whole tiles, and two seeds."""
    assert compute_log_sumexp and dropout_p == 0 and scale is not None
    _check(query, key, value)
    scores = _scores(query, key, attn_bias, is_causal, scale)
    lse = scores.logsumexp(-1)
    nothing = lse == -torch.inf
    shares = (scores - lse.masked_fill(nothing, 0).unsqueeze(-1)).exp()
    output = (shares @ value.float()).to(query.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    room = torch.full((*lse.shape[:2], -(-lse.shape[2] // TILE) * TILE), torch.inf)
    # A row that sees nothing counts as one number of 0.
    room[..., : lse.shape[2]] = lse.masked_fill(nothing, 0)
    return output, room, torch.empty((), dtype=torch.long), torch.empty((), dtype=torch.long)


def efficient_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | None,
    output: Tensor,
    lse: Tensor,
    philox_seed: Tensor,
    philox_offset: Tensor,
    dropout_p: float,
    grad_input_mask: list[bool],
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and value."""
    assert attn_bias is None and not grad_input_mask[3] and dropout_p == 0 and scale is not None
    assert philox_seed.dtype == philox_offset.dtype == torch.long
    _check(query, key, value)
    batch, heads, queries, head_dim = query.shape
    assert grad.shape == output.shape == query.shape and grad.dtype == output.dtype == query.dtype
    assert lse.dtype == torch.float32 and lse.shape == (batch, heads, -(-queries // TILE) * TILE)
    assert (heads == 1 or lse.stride(1) % 8 == 0) and (batch == 1 or lse.stride(0) % 8 == 0)
    assert (lse[..., queries:] == torch.inf).all()  # as the forward pass leaves it
    if query.dtype != torch.float32:
        # The gradient is copied where it isn't contiguous, but the output's rows are taken to lie so far apart.
        strides = (output.stride(0), output.stride(1), heads * head_dim, 1)
        output = output.as_strided(output.shape, strides)
    grad, output = grad.float(), output.float()
    delta = (grad * output).sum(-1, keepdim=True)
    shares = (_scores(query, key, None, is_causal, scale) - lse[..., :queries, None]).exp()
    grad_value = shares.transpose(2, 3) @ grad
    grad_scores = shares * (grad @ value.float().transpose(2, 3) - delta) * scale
    grads = grad_scores @ key.float(), grad_scores.transpose(2, 3) @ query.float(), grad_value
    return *(each.to(query.dtype) for each in grads), None


def _check(query: Tensor, key: Tensor, value: Tensor) -> None:
    assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert key.shape == value.shape and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    assert 0 not in query.shape + key.shape
    for tensor in (query, key, value):
        _check_layout(tensor)


def _check_layout(tensor: Tensor) -> None:
    """Rows are read in pieces of so many bytes, which must begin at multiples of them."""
    step = ACCESS // tensor.element_size()
    if (
        tensor.stride(-1) != 1
        or tensor.data_ptr() % ACCESS
        or any(stride % step for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1)
    ):
        raise RuntimeError(f"a tensor is not correctly aligned: strides {tensor.stride()}")


def _scores(query: Tensor, key: Tensor, bias: Tensor | None, causal: bool, scale: float) -> Tensor:
    scores = query.float() @ key.float().transpose(2, 3) * scale
    if bias is not None:
        assert bias.dtype == query.dtype and bias.shape == scores.shape
        _check_layout(bias)
        scores = scores + bias.float()
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[2:], dtype=torch.bool).tril().logical_not(), -torch.inf)
    return scores


KERNELS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_efficient_attention: efficient_attention,
    torch.ops.aten._scaled_dot_product_efficient_attention_backward: efficient_attention_backward,
}

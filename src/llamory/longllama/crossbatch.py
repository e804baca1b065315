"""Cross-batch attention, which trains memory (Tworkowski et al. 2023, section 3.2).

A row of the batch attends, under one softmax, to its own causal context and to the whole contexts of other rows:
earlier chunks of its document (positives) and other documents (negatives). Gradients flow into the other rows' keys and
values. Keys of other rows are encoded as if they stood at the first position of the local context, as memory keys are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamory.errors import LlamoryError
from llamory.longllama.crossbatch_plan import Contexts, Look, Run, Weights, plan_contexts, plan_outside
from llamory.longllama.flash_backward import Part, attend_part_backward
from llamory.memory.attention import flash


def crossbatch_contexts(
    batch_size: int, cross_batch_range: int, dataset_packing: int = 1, stepping: bool = False
) -> list[list[int]]:
    """Which other rows each row sees: those before it, nearest first, as the published training code has it.

    Args:
        batch_size: rows of the batch.
        cross_batch_range: how many rows before it a row sees at most.
        dataset_packing: consecutive rows that hold consecutive chunks of one document.
        stepping: later chunks of a document see more than earlier ones, whose first sees nothing.

    Raises:
        LlamoryError: a number is too small, packing doesn't divide the batch, or more contexts than there are rows.
    """
    if batch_size < 1 or dataset_packing < 1 or cross_batch_range < 0:
        raise LlamoryError(
            "batch_size and dataset_packing must be at least 1 and cross_batch_range at least 0, not "
            f"{batch_size}, {dataset_packing} and {cross_batch_range}."
        )
    if batch_size % dataset_packing:
        raise LlamoryError(
            f"The batch of {batch_size} rows can't be divided among documents of {dataset_packing} rows each; choose "
            "a batch size that dataset_packing divides."
        )
    if cross_batch_range >= batch_size:
        raise LlamoryError(
            f"A row can't see {cross_batch_range} others in a batch of {batch_size}; choose a cross_batch_range of at "
            f"most {batch_size - 1}."
        )
    step = -(-(1 + cross_batch_range) // max(dataset_packing - 1, 1))
    contexts = []
    for row in range(batch_size):
        seen = cross_batch_range
        if stepping and dataset_packing > 1:
            seen = min(row % dataset_packing * step, seen)
        contexts.append([row - back for back in range(1, min(seen, row) + 1)])
    return contexts


def cross_batch_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    contexts: Contexts,
    *,
    scaling: float | None = None,
    lengths: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    weights: Weights | None = None,
) -> Tensor:
    """Attention of each row to its own causal context and to the contexts of other rows, in one softmax.

    Scores are never held whole, and keys and values of other rows are read where they lie, never copied per row.

    Args:
        query: (batch, heads, seq, head_dim), without rotary embedding.
        key: (batch, kv_heads, seq, head_dim), likewise; query head h reads key head h // (heads // kv_heads).
        value: the shape of `key`.
        cos: (1 or batch, seq, head_dim), as transformers' rotary embedding gives it.
        sin: likewise.
        contexts: per row, the rows whose whole contexts it also sees.
        scaling: what scores are multiplied by; 1 / sqrt(head_dim) if not given.
        lengths: real tokens of each row, which stand at its front; what is behind them is seen by nobody.
        rows: the only rows that attend, where not all do; query, contexts and weights are then those rows' alone.
        weights: for each of the contexts, how many of its kind it counts as in the softmax; 1 if not given. So a few
            rows can stand for a large memory.

    Returns:
        The query's shape, differentiable in query, key and value. Behind a row's `lengths` it means nothing.

    Raises:
        LlamoryError: contexts, weights or lengths that don't fit the batch, or rows that begin at different positions.
    """
    # One projection for all, so what is found anywhere is one output.
    given = (query, key, value)
    settings: dict[str, Any] = {"scaling": scaling, "lengths": lengths, "rows": rows, "weights": weights}
    tensors, plan, scaling = _prepared(given, given, cos, sin, contexts, **settings)
    output: Tensor = _CrossBatch.apply(*tensors, plan, scaling, False)[0]  # type: ignore[no-untyped-call]
    return output


def cross_batch_parts(
    near: tuple[Tensor, Tensor, Tensor],
    far: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    contexts: Contexts,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """`cross_batch_attention` where other rows are seen by projections of their own.

    Args:
        near: query, key and value for a row's own context.
        far: of the same shapes, for what it sees of other rows; with `outside` keys and values are of rows that aren't
            in the batch, which `contexts` and `lengths` then mean.
        cos, sin, contexts, settings: as there.

    Returns:
        Of one softmax over both, what was found in a row's own context and what in others; their sum is the output.
    """
    tensors, plan, scaling = _prepared(near, far, cos, sin, contexts, **settings)
    outputs: tuple[Tensor, Tensor] = _CrossBatch.apply(*tensors, plan, scaling, True)  # type: ignore[no-untyped-call]
    return outputs


def _prepared(
    near: tuple[Tensor, Tensor, Tensor],
    far: tuple[Tensor, Tensor, Tensor],
    cos: Tensor,
    sin: Tensor,
    contexts: Contexts,
    *,
    scaling: float | None = None,
    lengths: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    weights: Weights | None = None,
    outside: bool = False,
) -> tuple[list[Tensor], Sequence[Run | Look], float]:
    """Rotated queries, keys and values, those for other rows behind, with the plan and the scaling."""
    query, key, value = near
    plan: Sequence[Run | Look]
    if outside:
        plan = plan_outside(contexts, len(key), len(far[1]), lengths, weights)
    else:
        plan = plan_contexts(contexts, len(key), lengths, rows, weights)
    if lengths is not None and max(lengths, default=0) > far[1].shape[2]:
        raise LlamoryError(f"A row can't have {max(lengths)} tokens where the batch has {far[1].shape[2]} columns.")
    first_cos, first_sin = cos[:, :1], sin[:, :1]
    if len(first_cos) > 1 and plan and not torch.equal(first_cos, first_cos[:1].expand_as(first_cos)):
        raise LlamoryError("All rows must begin at the same position, as they read one another's keys at it.")
    near_value = value
    if rows is not None:
        chosen = torch.tensor(rows, device=key.device)
        key, near_value = key[chosen], value[chosen]
        cos, sin = (part if len(part) == 1 else part[chosen] for part in (cos, sin))
    rotated, local = apply_rotary_pos_emb(query, key, cos, sin)
    to_others = rotated
    if far[0] is not query:
        to_others, _ = apply_rotary_pos_emb(far[0], far[0][:, :1], cos, sin)
    # At position 0 this leaves keys as they are, but for the factor that some rotary embeddings put on all positions.
    _, remote = apply_rotary_pos_emb(query[:1, :, :1], far[1], first_cos[:1], first_sin[:1])
    # Under autocast the rotary embedding leaves queries and keys in float32, values in the shorter type.
    tensors = [part.to(value.dtype) for part in (rotated, local, near_value, to_others, remote, far[2])]
    return tensors, plan, query.shape[-1] ** -0.5 if scaling is None else scaling


@dataclass(frozen=True)
class CrossBatch:
    """Which rows of a batch are seen together in training.

    Attributes:
        contexts: per row, the rows whose whole contexts it also sees in memory layers.
        lengths: real tokens of each row, at its front; None if all columns are real.
        asked: the only rows whose output is wanted; None for all. Of the others no more is computed than is seen.
        last_layer: with `asked`, the last memory layer, from which on there are only those rows.
        weights: for each of the contexts, how many of its kind it counts as; None for 1.
        outside: per memory layer, what it gets of rows that were read apart, (rows, width, hidden); `contexts` and
            `lengths` then mean those.
    """

    contexts: Contexts
    lengths: tuple[int, ...] | None = None
    asked: tuple[int, ...] | None = None
    last_layer: int | None = None
    weights: Weights | None = None
    outside: Mapping[int, Tensor] | None = None


class _CrossBatch(torch.autograd.Function):
    """Flash attention part by part; the parts' gradients need nothing but the output and log-sum-exp of the whole.

    Gives the output and None, or, `apart`, what was found near and what far.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        local: Tensor,
        near_value: Tensor,
        to_others: Tensor,
        remote: Tensor,
        value: Tensor,
        plan: Sequence[Run | Look],
        scaling: float,
        apart: bool,
    ) -> tuple[Tensor, Tensor | None]:
        output, log_sum = flash(query, local, near_value, scaling=scaling, causal=True)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        found, found_sum = output, log_sum
        if apart:
            found, found_sum = torch.zeros_like(output), torch.full_like(log_sum, -torch.inf)
        for run in plan:
            part = run.part(to_others, remote, value)
            new, new_sum = map(run.back, flash(part.query, part.key, part.value, scaling=scaling))
            _merge_into(found[run.rows], found_sum[run.rows], new, new_sum + run.shift)
        if apart:
            whole = torch.logaddexp(log_sum, found_sum)
            output *= (log_sum - whole).exp().unsqueeze(-1)
            found *= (found_sum - whole).exp().unsqueeze(-1)
            log_sum = whole
        output, found = output.to(query.dtype), found.to(query.dtype)
        ctx.save_for_backward(query, local, near_value, to_others, remote, value, output, found, log_sum)
        ctx.plan, ctx.scaling, ctx.apart = plan, scaling, apart
        return output, found if apart else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_found: Tensor | None) -> tuple[Tensor | None, ...]:
        query, local, near_value, to_others, remote, value, output, found, log_sum = ctx.saved_tensors
        delta = None
        if ctx.apart:
            assert grad_found is not None
            exact = torch.promote_types(grad.dtype, torch.float32)
            delta = (grad.to(exact) * output + grad_found.to(exact) * found).sum(-1)
        else:
            grad_found = grad
        near = Part(query, local, near_value, causal=True)
        grad_query, grad_local, grad_near = attend_part_backward(grad, near, output, log_sum, ctx.scaling, delta)
        # Where all is one output, queries to others are the same ones, and so is their gradient.
        grad_others = torch.zeros_like(to_others) if ctx.apart else grad_query
        grad_remote, grad_value = torch.zeros_like(remote), torch.zeros_like(value)
        for run in ctx.plan:
            part = run.part(to_others, remote, value)
            sums, own_delta = run.of(log_sum) - run.shift, None if delta is None else run.of(delta)
            parts = attend_part_backward(run.of(grad_found), part, run.of(found), sums, ctx.scaling, own_delta)
            grad_others[run.rows] += run.back(parts[0])
            run.add(grad_remote, parts[1])
            run.add(grad_value, parts[2])
        asked = (grad_query, grad_local, grad_near, grad_others if ctx.apart else None, grad_remote, grad_value)
        return *asked, None, None, None


def _merge_into(output: Tensor, log_sum: Tensor, new: Tensor, new_sum: Tensor) -> None:
    """One softmax of what `output` and `log_sum` hold and another part, in place."""
    whole = torch.logaddexp(log_sum, new_sum)
    output.mul_((log_sum - whole).exp_().unsqueeze(-1)).addcmul_(
        new.to(output.dtype), (new_sum - whole).exp_().unsqueeze(-1)
    )
    log_sum.copy_(whole)

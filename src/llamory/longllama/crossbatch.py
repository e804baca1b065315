"""Cross-batch attention, which trains memory: rows also see whole other rows (Tworkowski et al. 2023, section 3.2)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamory.errors import LlamoryError
from llamory.longllama.flash_backward import AttentionPart, attend_part_backward
from llamory.memory.search.base import flash

Contexts = Sequence[Sequence[int]]
Weights = Sequence[Sequence[float]]
_Ints = Sequence[int] | None
_QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class _ContiguousGroup:
    """Consecutive rows that attend to equally many consecutive rows `seen`, one each, in one call."""

    rows: slice
    seen: slice
    length: int | None  # real tokens of each seen row; None for all
    weight: float = 1.0  # of their keys in the softmax

    def part(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionPart:
        key, value = (tensor[self.seen, :, : self.length] for tensor in (key, value))
        return AttentionPart(query[self.rows], key, value, causal=False)

    def select(self, tensor: Tensor) -> Tensor:
        """The group's rows of a query-like tensor, in the shape of `part`."""
        return tensor[self.rows]

    def ungroup(self, tensor: Tensor) -> Tensor:
        return tensor

    def add(self, total: Tensor, grad: Tensor) -> None:
        total[self.seen, :, : self.length] += grad


@dataclass(frozen=True)
class _SharedContextGroup:
    """Like `_ContiguousGroup`, for rows that all see the same rows: computed as one long row."""

    rows: slice
    seen: tuple[int, ...]
    length: int | None
    weight: float = 1.0

    def part(self, query: Tensor, key: Tensor, value: Tensor) -> AttentionPart:
        key, value = (_concat_rows(tensor[list(self.seen), :, : self.length]) for tensor in (key, value))
        return AttentionPart(self.select(query), key, value, causal=False)

    def select(self, tensor: Tensor) -> Tensor:
        return _concat_rows(tensor[self.rows])

    def ungroup(self, tensor: Tensor) -> Tensor:
        return _split_rows(tensor, self.rows.stop - self.rows.start)

    def add(self, total: Tensor, grad: Tensor) -> None:
        at = torch.tensor(self.seen, device=total.device)
        total[:, :, : self.length].index_add_(0, at, _split_rows(grad, len(self.seen)))


_Plan = Sequence[_ContiguousGroup] | Sequence[_SharedContextGroup]


def _concat_rows(tensor: Tensor) -> Tensor:
    """(rows, heads, width, …) as (1, heads, rows * width, …)."""
    return tensor.transpose(0, 1).flatten(1, 2)[None]


def _split_rows(tensor: Tensor, rows: int) -> Tensor:
    """(1, heads, rows * width, …) as (rows, heads, width, …)."""
    return tensor[0].unflatten(1, (rows, -1)).transpose(0, 1)


def plan_contexts(
    contexts: Contexts, batch: int, lengths: _Ints = None, rows: _Ints = None, weights: Weights | None = None
) -> list[_ContiguousGroup]:
    """Group pairs (row, seen row) that advance together; a LlamoryError if lengths or weights don't fit the rows."""
    weights = _check_contexts(contexts, range(batch) if rows is None else rows, batch, lengths, weights)
    buckets: dict[tuple[int, float], list[int]] = defaultdict(list)
    for at, seen in enumerate(contexts):
        for other, weight in zip(seen, weights[at], strict=True):
            buckets[at - other, weight].append(at)
    groups = []
    for (distance, weight), query_rows in sorted(buckets.items()):
        start = 0
        for at in range(1, len(query_rows) + 1):
            length = None if lengths is None else lengths[query_rows[start] - distance]
            continues = at < len(query_rows) and query_rows[at] == query_rows[at - 1] + 1
            if continues and (lengths is None or lengths[query_rows[at] - distance] == length):
                continue
            first, last = query_rows[start], query_rows[at - 1] + 1
            if length != 0:
                seen_rows = slice(first - distance, last - distance)
                groups.append(_ContiguousGroup(slice(first, last), seen_rows, length, weight))
            start = at
    return groups


def plan_frozen_contexts(
    contexts: Contexts, rows: int, context_rows: int, lengths: _Ints = None, weights: Weights | None = None
) -> list[_SharedContextGroup]:
    """Group rows that see the same of `context_rows` rows outside the batch, to which contexts and lengths refer."""
    weights = _check_contexts(contexts, range(context_rows, context_rows + rows), context_rows, lengths, weights)
    groups, start = [], 0
    for at in range(1, rows + 1):
        if at < rows and list(contexts[at]) == list(contexts[start]) and list(weights[at]) == list(weights[start]):
            continue
        buckets: dict[tuple[int | None, float], list[int]] = defaultdict(list)
        for other, weight in zip(contexts[start], weights[start], strict=True):
            buckets[None if lengths is None else lengths[other], weight].append(other)
        for (length, weight), seen in buckets.items():
            if length != 0:
                groups.append(_SharedContextGroup(slice(start, at), tuple(seen), length, weight))
        start = at
    return groups


def _check_contexts(
    contexts: Contexts, numbers: Sequence[int], seen_rows: int, lengths: _Ints, weights: Weights | None
) -> Weights:
    """Check contexts and return the weights, 1 by default."""
    if len(contexts) != len(numbers):
        raise LlamoryError(f"There are {len(numbers)} rows, but contexts for {len(contexts)}; give one list per row.")
    if lengths is not None and len(lengths) != seen_rows:
        raise LlamoryError(f"There are {seen_rows} rows, but lengths of {len(lengths)}; give one length per row.")
    weights = [[1.0] * len(seen) for seen in contexts] if weights is None else weights
    if [len(each) for each in weights] != [len(seen) for seen in contexts] or any(
        not 0 < weight < math.inf for each in weights for weight in each
    ):
        raise LlamoryError("Each context needs a weight, a finite number above 0; give one per context.")
    for number, seen in zip(numbers, contexts, strict=True):
        for other in seen:
            if not 0 <= other < seen_rows or other == number:
                raise LlamoryError(f"Row {number} can't see row {other}: contexts are other rows below {seen_rows}.")
        if len(set(seen)) != len(seen):
            raise LlamoryError(f"Row {number} has a context twice: {list(seen)}.")
    return weights


def crossbatch_contexts(
    batch_size: int, cross_batch_range: int, dataset_packing: int = 1, crossbatch_stepping: bool = False
) -> list[list[int]]:
    """The rows that each row sees: those before it, nearest first, as in the published training code.

    Args:
        batch_size: rows of the batch.
        cross_batch_range: maximum number of rows that a row sees.
        dataset_packing: consecutive rows that hold consecutive chunks of one document.
        crossbatch_stepping: later chunks of a document see more rows than earlier ones; the first sees none.

    Raises:
        LlamoryError: a number is too small, packing doesn't divide the batch, or the range exceeds the batch.
    """
    if batch_size < 1 or dataset_packing < 1 or cross_batch_range < 0:
        raise LlamoryError("batch_size and dataset_packing must be at least 1, and cross_batch_range at least 0.")
    if batch_size % dataset_packing:
        raise LlamoryError(f"A batch of {batch_size} rows can't be divided into documents of {dataset_packing} rows.")
    if cross_batch_range >= batch_size:
        raise LlamoryError(
            f"A row can't see {cross_batch_range} others in a batch of {batch_size} (cross_batch_range)."
        )
    step = -(-(1 + cross_batch_range) // max(dataset_packing - 1, 1))
    counts = [min(row, cross_batch_range) for row in range(batch_size)]
    if crossbatch_stepping and dataset_packing > 1:
        counts = [min(row % dataset_packing * step, count) for row, count in enumerate(counts)]
    return [[row - offset for offset in range(1, count + 1)] for row, count in enumerate(counts)]


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
    """Attention of each row to its own causal context and to the contexts of other rows, under one softmax.

    Args:
        query: (batch, heads, seq, head_dim), without rotary embedding.
        key, value: (batch, kv_heads, seq, head_dim), likewise; query head h uses key head h // (heads // kv_heads).
        cos, sin: (1 or batch, seq, head_dim), from transformers' rotary embedding.
        contexts: per row, the rows whose whole contexts it also sees.
        scaling: factor of the scores; by default 1 / sqrt(head_dim).
        lengths: real tokens of each row; padding on the right isn't seen by other rows.
        rows: the only rows with queries; query, contexts and weights are then of these rows.
        weights: of each context in the softmax, 1 by default; a context of weight w counts as w copies.

    Returns:
        The shape of `query`, differentiable in query, key and value; undefined at padding.

    Raises:
        LlamoryError: contexts, weights or lengths don't fit the batch, or rows start at different positions.
    """
    qkv = (query, key, value)
    settings: dict[str, Any] = {"scaling": scaling, "lengths": lengths, "rows": rows, "weights": weights}
    tensors, plan, scaling = _prepared(qkv, qkv, cos, sin, contexts, **settings)
    output: Tensor = _CrossBatch.apply(*tensors, plan, scaling, False)[0]  # type: ignore[no-untyped-call]
    return output


def cross_batch_parts(
    local_qkv: _QKV, memory_qkv: _QKV, cos: Tensor, sin: Tensor, contexts: Contexts, **settings: Any
) -> tuple[Tensor, Tensor]:
    """`cross_batch_attention` with separate projections for other rows.

    Args:
        local_qkv: query, key and value for a row's own context.
        memory_qkv: of the same shapes, for other rows. With `frozen_contexts=True` keys and values are of rows outside
            the batch, to which `contexts` and `lengths` then refer.
        cos, sin, contexts, settings: as for `cross_batch_attention`.

    Returns:
        The outputs from a row's own context and from other rows; the attention is their sum.
    """
    tensors, plan, scaling = _prepared(local_qkv, memory_qkv, cos, sin, contexts, **settings)
    outputs: tuple[Tensor, Tensor] = _CrossBatch.apply(*tensors, plan, scaling, True)  # type: ignore[no-untyped-call]
    return outputs


def _prepared(
    local_qkv: _QKV,
    memory_qkv: _QKV,
    cos: Tensor,
    sin: Tensor,
    contexts: Contexts,
    *,
    scaling: float | None = None,
    lengths: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    weights: Weights | None = None,
    frozen_contexts: bool = False,
) -> tuple[list[Tensor], _Plan, float]:
    """Rotated local and memory queries, keys and values, the plan, and the scaling."""
    query, key, value = local_qkv
    plan: _Plan
    if frozen_contexts:
        plan = plan_frozen_contexts(contexts, len(key), len(memory_qkv[1]), lengths, weights)
    else:
        plan = plan_contexts(contexts, len(key), lengths, rows, weights)
    if lengths is not None and max(lengths, default=0) > memory_qkv[1].shape[2]:
        raise LlamoryError(f"A row of {memory_qkv[1].shape[2]} columns can't have {max(lengths)} real tokens.")
    first_cos, first_sin = cos[:, :1], sin[:, :1]
    if len(first_cos) > 1 and plan and not torch.equal(first_cos, first_cos[:1].expand_as(first_cos)):
        raise LlamoryError("All rows must start at the same position, at which they see one another's keys.")
    local_value = value
    if rows is not None:
        row_ids = torch.tensor(rows, device=key.device)
        key, local_value = key[row_ids], value[row_ids]
        cos, sin = (part if len(part) == 1 else part[row_ids] for part in (cos, sin))
    rotated, local_key = apply_rotary_pos_emb(query, key, cos, sin)
    memory_query = rotated
    if memory_qkv[0] is not query:
        memory_query, _ = apply_rotary_pos_emb(memory_qkv[0], memory_qkv[0][:, :1], cos, sin)
    # At position 0 this only applies the factor that some rotary embeddings have at every position.
    _, memory_key = apply_rotary_pos_emb(query[:1, :, :1], memory_qkv[1], first_cos[:1], first_sin[:1])
    # Under autocast, the rotary embedding returns queries and keys in float32.
    tensors = [
        part.to(value.dtype) for part in (rotated, local_key, local_value, memory_query, memory_key, memory_qkv[2])
    ]
    return tensors, plan, query.shape[-1] ** -0.5 if scaling is None else scaling


@dataclass(frozen=True)
class CrossBatch:
    """Which rows of a training batch see one another."""

    contexts: Contexts  # per row, the rows whose whole contexts it also sees in memory layers
    lengths: Sequence[int] | None = None  # real tokens of each row; None for all
    query_rows: Sequence[int] | None = None  # the only rows whose output is needed; None for all
    last_layer: int | None = None  # with `query_rows`, the last memory layer; behind it there are only these rows
    weights: Weights | None = None  # of each context in the softmax; None for 1
    # Per memory layer, its inputs (rows, width, hidden) from rows outside the batch, to which contexts then refer.
    frozen_contexts: Mapping[int, Tensor] | None = None


class _CrossBatch(torch.autograd.Function):
    """Flash attention by parts; their gradients need only the output and log-sum-exp of the whole."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor | None]:  # type: ignore[override]
        query, local_key, local_value, memory_query, memory_key, value, plan, scaling, separate_outputs = inputs
        output, lse = flash(query, local_key, local_value, scaling=scaling, causal=True)
        output = output.to(torch.promote_types(output.dtype, torch.float32))
        found, found_lse = output, lse
        if separate_outputs:
            found, found_lse = torch.zeros_like(output), torch.full_like(lse, -torch.inf)
        for group in plan:
            part = group.part(memory_query, memory_key, value)
            new, new_lse = map(group.ungroup, flash(part.query, part.key, part.value, scaling=scaling))
            _merge_into(found[group.rows], found_lse[group.rows], new, new_lse + math.log(group.weight))
        if separate_outputs:
            total_lse = torch.logaddexp(lse, found_lse)
            output *= (lse - total_lse).exp().unsqueeze(-1)
            found *= (found_lse - total_lse).exp().unsqueeze(-1)
            lse = total_lse
        output, found = output.to(query.dtype), found.to(query.dtype)
        ctx.save_for_backward(query, local_key, local_value, memory_query, memory_key, value, output, found, lse)
        ctx.plan, ctx.scaling, ctx.separate_outputs = plan, scaling, separate_outputs
        return output, found if separate_outputs else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_found: Tensor | None) -> tuple[Tensor | None, ...]:
        query, local_key, local_value, memory_query, memory_key, value, output, found, lse = ctx.saved_tensors
        delta = None
        if ctx.separate_outputs:
            assert grad_found is not None
            compute_dtype = torch.promote_types(grad.dtype, torch.float32)
            delta = (grad.to(compute_dtype) * output + grad_found.to(compute_dtype) * found).sum(-1)
        else:
            grad_found = grad
        local_qkv = AttentionPart(query, local_key, local_value, causal=True)
        local_grads = attend_part_backward(grad, local_qkv, output, lse, ctx.scaling, delta)
        # With one output, the queries to other rows are the local ones, and so are their gradients.
        query_grad = torch.zeros_like(memory_query) if ctx.separate_outputs else local_grads[0]
        key_grad, value_grad = torch.zeros_like(memory_key), torch.zeros_like(value)
        for group in ctx.plan:
            part = group.part(memory_query, memory_key, value)
            sums = group.select(lse) - math.log(group.weight)
            group_delta = None if delta is None else group.select(delta)
            out_grad, out = group.select(grad_found), group.select(found)
            grads = attend_part_backward(out_grad, part, out, sums, ctx.scaling, group_delta)
            query_grad[group.rows] += group.ungroup(grads[0])
            group.add(key_grad, grads[1])
            group.add(value_grad, grads[2])
        return *local_grads, query_grad if ctx.separate_outputs else None, key_grad, value_grad, None, None, None


def _merge_into(output: Tensor, lse: Tensor, new: Tensor, new_lse: Tensor) -> None:
    """Merge another part into `output` and `lse`, in place, under one softmax."""
    total_lse = torch.logaddexp(lse, new_lse)
    output.mul_((lse - total_lse).exp_().unsqueeze(-1))
    output.addcmul_(new.to(output.dtype), (new_lse - total_lse).exp_().unsqueeze(-1))
    lse.copy_(total_lse)

"""Attention over a flat batch: one fused causal call for all but the tails, one small call for the tails.

A tail (see `layout`) attends to the passage and itself. With its keys gathered as passage + tail both calls are causal
and need no dense mask.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from llamory.errors import LlamoryError
from llamory.llara.layout import SegmentLengths, SequenceLayout

# Measured on CPUs: the most tokens of a short segment, and the number of runs from which one padded call is faster.
_SHORT_SEGMENT = 256
_MANY_RUNS = 4


class LlaraAttention(LlamaAttention):
    """Llama's attention that also takes a flat batch with its `layout`."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layout: SequenceLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """With `layout`, attend within its segments; `hidden_states` and the result are then (1, N, hidden)."""
        if layout is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        assert position_embeddings is not None
        query, key, value = (
            projection(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        return self.o_proj(flat_attention(self, query, key, value, layout).flatten(2)), None


def flat_attention(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """Attend within the segments of a flat batch with the kernel named by the model's `attn_implementation`.

    Rotated query (1, heads, N, head_dim), rotated key and value (1, kv_heads, N, head_dim) to (1, N, heads, head_dim);
    a LlamoryError if the implementation has no kernel for flat batches.
    """
    implementation = module.config._attn_implementation or "sdpa"
    name = implementation.split("|")[-1]
    if "flash" in name:
        return _flash(module, query, key, value, layout)
    if name == "flex_attention":
        attend = ALL_ATTENTION_FUNCTIONS["flex_attention"]
        return attend(module, query, key, value, block_mask(layout), scaling=module.scaling)[0]
    if name != "sdpa":
        raise LlamoryError(f"LLARA has no fused attention {implementation!r}; use sdpa, flash_attention_2 or eager.")
    # For many short segments of different lengths the padding of one call costs less than many calls.
    many_short = len(layout.runs) > _MANY_RUNS and query.shape[2] < _SHORT_SEGMENT * len(layout.runs)
    if query.device.type == "cpu" and not many_short:
        return _sdpa_runs(module, query, key, value, layout)
    return _sdpa_padded(module, query, key, value, layout)


def _sdpa(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA, causal where there is no mask, with fewer key/value heads than query heads."""
    dtype = query.dtype
    on_cpu_in_bfloat16 = dtype == torch.bfloat16 and query.device.type == "cpu"
    if on_cpu_in_bfloat16 and query.requires_grad and key.shape[2] <= _SHORT_SEGMENT and not _has_amx():
        query, key, value = query.float(), key.float(), value.float()  # the backward pass is faster so
    dropout, fewer_keys = _dropout(module), query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=module.scaling, enable_gqa=fewer_keys
    ).to(dtype)


def _dropout(module: LlamaAttention) -> float:
    return float(module.attention_dropout) if module.training else 0.0


@cache
def _has_amx() -> bool:
    """Whether the CPU has matrix tiles."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of torch
    return bool(capabilities.get("amx_tile", False))


def _sdpa_runs(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """One causal call per run of equal segments, without padding, on views (the CPU kernel takes strides)."""
    sizes = [lengths.total * count for lengths, count in layout.runs]
    parts = [x[0].transpose(0, 1).split(sizes) for x in (query, key, value)]
    outputs = []
    for (lengths, count), q, k, v in zip(layout.runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, lengths.total)).transpose(1, 2) for x in (q, k, v))
        if lengths.tail:
            q, q_tail = q.split([lengths.main, lengths.tail], dim=2)
            output = _sdpa(module, q, k[:, :, : lengths.main], v[:, :, : lengths.main], None)
            # Recomputed in the backward pass: saving the tail's keys and values would double their memory.
            options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": _dropout(module) > 0}
            output = torch.cat([output, checkpoint(_tail, module, q_tail, k, v, lengths, **options)], dim=2)
        else:
            output = _sdpa(module, q, k, v, None)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _tail(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, lengths: SegmentLengths) -> Tensor:
    """The tail's queries over the shared keys and its own."""
    key, value = (torch.cat([x[:, :, : lengths.shared], x[:, :, lengths.main :]], dim=2) for x in (key, value))
    mask = torch.ones(lengths.tail, lengths.shared + lengths.tail, dtype=torch.bool).tril(lengths.shared)
    return _sdpa(module, query, key, value, mask)


def _sdpa_padded(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """Two calls for all segments, padded on the right, so that the causal call needs no mask for the padding."""
    total = query.shape[2]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        # Faster than x[indices], whose backward pass sorts the indices.
        return x.index_select(0, indices.clamp(max=total - 1).flatten()).unflatten(0, indices.shape).transpose(1, 2)

    main = _part_indices(layout, "main")
    attended = _sdpa(module, gather(q, main), gather(k, main), gather(v, main), None)
    output = query.new_zeros(q.shape).index_copy(0, main[main < total], attended.transpose(1, 2)[main < total])
    if layout.has_tail:
        tail = _part_indices(layout, "tail")
        key_indices = torch.cat([_part_indices(layout, "shared"), tail], dim=1)
        width, order = tail.shape[1], torch.arange(tail.shape[1], device=tail.device)
        mask = (key_indices < total)[:, None, :].repeat(1, width, 1)
        mask[:, :, -width:] &= order[:, None] >= order[None, :]
        mask |= (tail >= total)[:, :, None]  # a padding query without keys would give NaN
        attended = _sdpa(module, gather(q, tail), gather(k, key_indices), gather(v, key_indices), mask[:, None])
        output = output.index_copy(0, tail[tail < total], attended.transpose(1, 2)[tail < total])
    return output[None]


def _part_indices(layout: SequenceLayout, part: str) -> Tensor:
    """(S, longest) flat index of each token of a part, padded on the right with N; "shared" only before tails."""
    starts, lengths = layout.offsets, layout.lengths(part)
    if part == "tail":
        starts = starts + layout.lengths("main")
    elif part == "shared":
        lengths = lengths * (layout.lengths("tail") > 0)
    order = torch.arange(int(lengths.max()), device=starts.device)
    return torch.where(order < lengths[:, None], starts[:, None] + order, len(layout.index))


def _flash(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """Two variable-length flash calls; flash aligns the causal mask to the last query and key, as the tail needs."""
    total, main_lengths, tail_lengths = query.shape[2], layout.lengths("main"), layout.lengths("tail")
    if not layout.has_tail:
        return _flash_call(module, query, key, value, main_lengths, main_lengths)
    key_lengths = layout.lengths("shared") + tail_lengths
    main, shared, tail = (_part_indices(layout, part) for part in ("main", "shared", "tail"))
    key_indices = torch.cat([shared, tail], dim=1)
    main, tail, key_indices = (indices[indices < total] for indices in (main, tail, key_indices))
    main_output = _flash_call(module, query[:, :, main], key[:, :, main], value[:, :, main], main_lengths, main_lengths)
    query, key, value = query[:, :, tail], key[:, :, key_indices], value[:, :, key_indices]
    tail_output = _flash_call(module, query, key, value, tail_lengths[tail_lengths > 0], key_lengths[tail_lengths > 0])
    output = main_output.new_empty(1, total, *main_output.shape[2:])
    return output.index_copy(1, main, main_output).index_copy(1, tail, tail_output)


def _flash_call(
    module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, query_lengths: Tensor, key_lengths: Tensor
) -> Tensor:
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    options: dict[str, Any] = {}
    for name, lengths in (("q", query_lengths), ("k", key_lengths)):
        options[f"cu_seq_lens_{name}"] = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        options[f"max_length_{name}"] = int(lengths.max())
    options |= {"dropout": _dropout(module), "scaling": module.scaling, "is_causal": True}
    output, _ = attend(module, query, key, value, None, **options)
    return output.view(1, -1, query.shape[1], query.shape[3])


def block_mask(layout: SequenceLayout) -> Any:
    """The layout's rule as FlexAttention's `BlockMask`, cached in the layout for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    if (cached := layout.__dict__.get("_block_mask")) is not None:
        return cached
    segment = layout.segment_ids
    tail_start = (layout.offsets + layout.lengths("main"))[segment]
    summary_start = (layout.offsets + layout.lengths("shared"))[segment]

    def mask_mod(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        masked = (q >= tail_start[q]) & (k >= summary_start[q]) & (k < tail_start[q])
        return (segment[q] == segment[k]) & (q >= k) & ~masked

    mask = create_block_mask(mask_mod, None, None, len(segment), len(segment), device=str(segment.device))
    layout.__dict__["_block_mask"] = mask
    return mask


def additive_mask(
    layout: SequenceLayout, dtype: torch.dtype, attention_mask: Tensor | None, past: int, total: int
) -> Tensor:
    """(batch, 1, length, total) rule for a padded batch: 0 where a query may attend, the lowest number elsewhere.

    Args:
        attention_mask: (batch, past + length), 0 at padding; only the cached part is used.
        past: cached tokens before the batch.
        total: length of the keys, including unused entries of a fixed-size cache.
    """
    batch, length = layout.shape
    visible = layout.visible()
    before = visible.new_ones(batch, 1, length, past)
    if attention_mask is not None and attention_mask.shape[1] == past + length:
        before = before & attention_mask[:, None, None, :past].bool()
    visible = torch.cat([before, visible, visible.new_zeros(batch, 1, length, total - past - length)], dim=-1)
    # A padding query attends to nothing: the finite minimum makes its attention uniform instead of NaN.
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)

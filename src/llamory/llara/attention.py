"""Attention over a flat batch: one fused causal call for all but the tails, one small call for the tails.

The tail of a segment (its prediction block) attends to the passage and itself, not to the summary block (Li et al.
2023, section 3.2). With the tail's keys gathered as passage + tail both calls are causal and need no dense mask.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb

from llamory.errors import LlamoryError
from llamory.llara.layout import SegmentLengths, SequenceLayout

# Measured on CPUs: the most tokens of a short segment, and the number of runs from which one padded call is faster.
_SHORT_SEGMENT = 256
_MANY_RUNS = 4


class LlaraAttention(LlamaAttention):
    """Llama's attention that also takes a flat batch with its `layout`; without one it is Llama's own."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        layout: SequenceLayout | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within each segment of `layout`; then `hidden_states` and the result are (1, N, hidden)."""
        if layout is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        assert position_embeddings is not None
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output = flat_attention(self, query, key, value, layout)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), None


def flat_attention(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """Attend within the segments of a flat batch with the kernel named by the model's `attn_implementation`.

    Args:
        module: the attention layer (its config, scale and dropout are used).
        query: (1, heads, N, head_dim), rotated.
        key: (1, kv_heads, N, head_dim), rotated.
        value: (1, kv_heads, N, head_dim).
        layout: the batch's segments.

    Returns:
        (1, N, heads, head_dim)

    Raises:
        LlamoryError: the implementation has no kernel for flat batches (`eager` takes padded ones).
    """
    implementation = module.config._attn_implementation or "sdpa"
    name = implementation.split("|")[-1]
    if "flash" in name:
        return _flash(module, query, key, value, layout)
    if name == "flex_attention":
        return _flex(module, query, key, value, layout)
    if name != "sdpa":
        raise LlamoryError(
            f"LLARA has no fused attention for attn_implementation={implementation!r}; use sdpa, flash_attention_2, "
            "flash_attention_3 or flex_attention (or eager, the plain reference)."
        )
    # For many short segments of different lengths the padding of one call costs less than many calls.
    many_short = len(layout.runs) > _MANY_RUNS and query.shape[2] < _SHORT_SEGMENT * len(layout.runs)
    if query.device.type == "cpu" and not many_short:
        return _sdpa_runs(module, query, key, value, layout)
    return _sdpa_padded(module, query, key, value, layout)


def _sdpa(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """SDPA, causal where there is no mask, with fewer key/value heads than query heads."""
    dtype = query.dtype
    if query.requires_grad and key.shape[2] <= _SHORT_SEGMENT and _slow_backward(query):
        query, key, value = query.float(), key.float(), value.float()
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=float(module.attention_dropout) if module.training else 0.0,
        is_causal=mask is None,
        scale=module.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.to(dtype)


def _slow_backward(query: Tensor) -> bool:
    """Whether the backward pass is slower than in float32: bfloat16 on a CPU without matrix tiles (AMX)."""
    return query.dtype == torch.bfloat16 and query.device.type == "cpu" and not _has_amx()


@cache
def _has_amx() -> bool:
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # missing in older versions of torch
    return bool(capabilities.get("amx_tile", False))


def _sdpa_runs(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """One causal call per run of equal segments, without padding, on views (the CPU kernel takes strides)."""
    sizes = [segment_lengths.total * count for segment_lengths, count in layout.runs]
    parts = [x[0].transpose(0, 1).split(sizes) for x in (query, key, value)]
    outputs = []
    for (segment_lengths, count), q, k, v in zip(layout.runs, *parts, strict=True):
        q, k, v = (x.unflatten(0, (count, segment_lengths.total)).transpose(1, 2) for x in (q, k, v))
        if segment_lengths.tail:
            q, q_tail = q.split([segment_lengths.main, segment_lengths.tail], dim=2)
            output = _sdpa(module, q, k[:, :, : segment_lengths.main], v[:, :, : segment_lengths.main], None)
            # Recomputed in the backward pass: saving the tail's keys and values would double their memory.
            keep_random = module.training and module.attention_dropout > 0
            tail = checkpoint(
                _tail, module, q_tail, k, v, segment_lengths, use_reentrant=False, preserve_rng_state=keep_random
            )
            output = torch.cat([output, tail], dim=2)
        else:
            output = _sdpa(module, q, k, v, None)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None]


def _tail(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, segment_lengths: SegmentLengths) -> Tensor:
    """The tail's queries over the shared keys and its own."""
    key, value = (
        torch.cat([x[:, :, : segment_lengths.shared], x[:, :, segment_lengths.main :]], dim=2) for x in (key, value)
    )
    mask = torch.ones(segment_lengths.tail, segment_lengths.shared + segment_lengths.tail, dtype=torch.bool).tril(
        segment_lengths.shared
    )
    return _sdpa(module, query, key, value, mask)


def _sdpa_padded(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """Two calls for all segments, padded on the right, so that the causal call needs no mask for the padding."""
    total = query.shape[2]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))

    def gather(x: Tensor, indices: Tensor) -> Tensor:
        # Faster than x[indices], whose backward pass sorts the indices.
        return x.index_select(0, indices.clamp(max=total - 1).flatten()).unflatten(0, indices.shape).transpose(1, 2)

    main = _padded_indices(layout.offsets, layout.lengths("main"), total)
    output = query.new_zeros(total, *q.shape[1:])
    attended = _sdpa(module, gather(q, main), gather(k, main), gather(v, main), None)
    output = output.index_copy(0, main[main < total], attended.transpose(1, 2)[main < total])
    if layout.has_tail:
        lengths = layout.lengths("tail")
        tail = _padded_indices(layout.offsets + layout.lengths("main"), lengths, total)
        key_indices = torch.cat(
            [_padded_indices(layout.offsets, layout.lengths("shared") * (lengths > 0), total), tail], dim=1
        )
        width, order = tail.shape[1], torch.arange(tail.shape[1], device=tail.device)
        mask = (key_indices < total)[:, None, :].repeat(1, width, 1)
        mask[:, :, -width:] &= order[:, None] >= order[None, :]
        mask |= (tail >= total)[:, :, None]  # a padding query without keys would give NaN
        attended = _sdpa(module, gather(q, tail), gather(k, key_indices), gather(v, key_indices), mask[:, None])
        output = output.index_copy(0, tail[tail < total], attended.transpose(1, 2)[tail < total])
    return output[None]


def _padded_indices(offsets: Tensor, lengths: Tensor, total: int) -> Tensor:
    """(S, longest) flat index of each token of a part, padded on the right with `total`."""
    order = torch.arange(int(lengths.max()), device=offsets.device)
    return torch.where(order < lengths[:, None], offsets[:, None] + order, total)


def _flash(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """Two variable-length flash calls; flash aligns the causal mask to the last query and key, as the tail needs."""
    total = query.shape[2]
    if not layout.has_tail:
        lengths = layout.lengths("main")
        return _flash_call(module, query, key, value, lengths, lengths)
    main_lengths, tail_lengths = layout.lengths("main"), layout.lengths("tail")
    has_tail = tail_lengths > 0
    shared_lengths = layout.lengths("shared") * has_tail

    def indices(*parts: Tensor) -> Tensor:
        joined = torch.cat(parts, dim=1).flatten()
        return joined[joined < total]

    main = indices(_padded_indices(layout.offsets, main_lengths, total))
    tail_padded = _padded_indices(layout.offsets + main_lengths, tail_lengths, total)
    tail, key_indices = (
        indices(tail_padded),
        indices(_padded_indices(layout.offsets, shared_lengths, total), tail_padded),
    )
    main_output = _flash_call(module, query[:, :, main], key[:, :, main], value[:, :, main], main_lengths, main_lengths)
    tail_output = _flash_call(
        module,
        query[:, :, tail],
        key[:, :, key_indices],
        value[:, :, key_indices],
        tail_lengths[has_tail],
        (shared_lengths + tail_lengths)[has_tail],
    )
    output = main_output.new_empty(1, total, *main_output.shape[2:])
    return output.index_copy(1, main, main_output).index_copy(1, tail, tail_output)


def _flash_call(
    module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, query_lengths: Tensor, key_lengths: Tensor
) -> Tensor:
    attend = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    output, _ = attend(
        module,
        query,
        key,
        value,
        None,
        dropout=module.attention_dropout if module.training else 0.0,
        scaling=module.scaling,
        is_causal=True,
        cu_seq_lens_q=_cumulative(query_lengths),
        cu_seq_lens_k=_cumulative(key_lengths),
        max_length_q=int(query_lengths.max()),
        max_length_k=int(key_lengths.max()),
    )
    return output.view(1, -1, query.shape[1], query.shape[3])


def _cumulative(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _flex(module: LlamaAttention, query: Tensor, key: Tensor, value: Tensor, layout: SequenceLayout) -> Tensor:
    """FlexAttention with the layout's rule as mask function; fully masked blocks are skipped."""
    attend = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    output, _ = attend(module, query, key, value, block_mask(layout), scaling=module.scaling)
    return output


def block_mask(layout: SequenceLayout) -> Any:
    """The layout's rule as FlexAttention's `BlockMask`, cached in the layout for all layers."""
    from torch.nn.attention.flex_attention import create_block_mask

    cached = layout.__dict__.get("_block_mask")
    if cached is not None:
        return cached
    segment = layout.segment_ids
    tail_start = (layout.offsets + layout.lengths("main"))[segment]
    summary_start = (layout.offsets + layout.lengths("shared"))[segment]

    def mask_mod(_batch: Tensor, _head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        masked = (q >= tail_start[q]) & (k >= summary_start[q]) & (k < tail_start[q])
        return (segment[q] == segment[k]) & (q >= k) & ~masked

    total = len(segment)
    mask = create_block_mask(mask_mod, None, None, total, total, device=str(segment.device))
    layout.__dict__["_block_mask"] = mask
    return mask


def additive_mask(
    layout: SequenceLayout, dtype: torch.dtype, attention_mask: Tensor | None, past: int, total: int
) -> Tensor:
    """The layout's rule for a padded batch: 0 where a query may attend, the lowest number elsewhere.

    Args:
        layout: the batch's segments.
        dtype: of the mask.
        attention_mask: (batch, past + length), 0 at padding; only the cached part is used.
        past: cached tokens before the batch.
        total: length of the keys, including unused entries of a fixed-size cache.

    Returns:
        (batch, 1, length, total)
    """
    batch, length = layout.shape
    visible = layout.visible()
    before = visible.new_ones(batch, 1, length, past)
    if attention_mask is not None and attention_mask.shape[1] == past + length:
        before = before & attention_mask[:, None, None, :past].bool()
    visible = torch.cat([before, visible, visible.new_zeros(batch, 1, length, total - past - length)], dim=-1)
    # A padding query attends to nothing: the finite minimum makes its attention uniform instead of NaN.
    zeros = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return zeros.masked_fill(~visible, torch.finfo(dtype).min)


def replace_attention(layers: nn.ModuleList, config: LlamaConfig) -> None:
    """Give every decoder layer an attention that takes flat batches."""
    for index, layer in enumerate(layers):
        layer.self_attn = LlaraAttention(config, index)

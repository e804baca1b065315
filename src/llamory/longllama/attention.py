"""Attention with memory: local context and memory under one softmax (Tworkowski et al. 2023, sections 3.1 and 3.3).

Shapes: R rows of a window, W its width, H query heads, K key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaRMSNorm,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from llamory.longllama.cache import ForwardContext
from llamory.longllama.configuration import LongLlamaConfig
from llamory.longllama.crossbatch import CrossBatch, Weights, cross_batch_attention, cross_batch_parts
from llamory.memory.blocks import SpanList
from llamory.memory.search.base import attend, flash, merge

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Queries, keys, values and mask (True where a query sees a key, None for everywhere) of a part of the attention.
_LocalQKV = tuple[Tensor, Tensor, Tensor, Tensor | None]
_QKV = tuple[Tensor, Tensor, Tensor]
_Pair = tuple[Tensor, Tensor]


class LongLlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's decoder layer with `LongLlamaAttention`; it can stop once its memory is written."""

    def __init__(self, config: LongLlamaConfig, layer_idx: int):
        # Llama's constructor would build a second attention.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = LongLlamaAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """Llama's forward. The last layer to compute writes memory only, or keeps only the rows with queries."""
        ctx: ForwardContext | None = kwargs.get("ctx")
        if ctx is not None and ctx.last_layer == self.self_attn.layer_idx:
            self.self_attn.write_memory(self.input_layernorm(hidden_states), ctx)
            return hidden_states
        cross_batch: CrossBatch | None = kwargs.get("cross_batch")
        if cross_batch is not None and cross_batch.last_layer == self.self_attn.layer_idx:
            normed = self.input_layernorm(hidden_states)
            hidden = hidden_states[list(cross_batch.query_rows or ())]
            hidden = hidden + self.self_attn.attend_cross_batch(normed, kwargs["position_embeddings"], cross_batch)
            output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
            return output
        return super().forward(hidden_states, *args, **kwargs)


class MemoryProjection(nn.Linear):
    """A projection for memory only, initialized from the layer's own projection `base`."""

    def __init__(self, base: nn.Linear, bias: bool):
        super().__init__(base.in_features, base.out_features, bias, base.weight.device, base.weight.dtype)
        self._base = (base,)  # in a tuple, so that torch doesn't register it as a submodule
        self.init_from_base()

    def init_from_base(self) -> None:
        """Copy the weights of the layer's own projection, unless they were loaded from a checkpoint."""
        for name, parameter in self.named_parameters():
            init.copy_(parameter, getattr(self._base[0], name))


class LongLlamaAttention(LlamaAttention):
    """Llama's attention that continues a local context and attends to memory under the same softmax."""

    @property
    def has_memory(self) -> bool:
        """Whether this is a memory layer."""
        return self.layer_idx in self.config.mem_layers

    @property
    def has_projections(self) -> bool:
        """Whether memory has its own projections in this layer."""
        return bool(self.config.mem_projections) and self.has_memory

    def add_projections(self) -> None:
        """Add the projections for memory, initialized from the layer's own."""
        for name in PROJECTIONS:
            base = getattr(self, name)
            # The outputs of o_proj and mem_o_proj are added, so the bias must count once.
            setattr(self, f"mem_{name}", MemoryProjection(base, bias=base.bias is not None and name != "o_proj"))

    @property
    def uses_rotary(self) -> bool:
        """Whether queries and keys get the rotary embedding."""
        return self.config.mem_positionals or not self.has_memory

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        ctx: ForwardContext | None = None,
        cross_batch: CrossBatch | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of a window (with `ctx`), of training (with `cross_batch`), or Llama's, (R, W, hidden)."""
        rotary = position_embeddings
        if cross_batch is not None and self.has_memory:
            assert rotary is not None
            return self.attend_cross_batch(hidden_states, rotary, cross_batch), None
        if ctx is None:
            return super().forward(hidden_states, rotary, attention_mask, past_key_values, **kwargs)
        assert rotary is not None
        query, key, value = memory_qkv = self._project(hidden_states)
        queries = self.has_projections and (ctx.local_update is not None or self._has_memory_tokens(ctx))
        if self.has_projections:
            memory_qkv = self._project(hidden_states, "mem_", queries=queries)
        memory_kv = (self._memory_key(memory_qkv[1], ctx), memory_qkv[2])
        query, key = self._apply_rotary(query, key, rotary)
        memory_query = query
        if queries or (self.has_memory and ctx.memory_rotary is not None):
            memory_query, _ = self._apply_rotary(memory_qkv[0], memory_qkv[0][:, :1], ctx.memory_rotary or rotary)
        if ctx.local_update is not None:
            return self._attend_continuation((query, key, value), memory_query, memory_kv, ctx), None
        output = self._attend_window((query, key, value), memory_query, attention_mask, ctx, **kwargs)
        self._store(key, value, memory_kv, ctx)
        return output, None

    def write_memory(self, hidden_states: Tensor, ctx: ForwardContext) -> None:
        """Write the window's keys and values into memory without attending."""
        _, key, value = self._project(hidden_states, "mem_" if self.has_projections else "", queries=False)
        self._store(None, None, (self._memory_key(key, ctx), value), ctx)

    def attend_cross_batch(self, hidden_states: Tensor, rotary: _Pair, cross_batch: CrossBatch) -> Tensor:
        """Cross-batch attention (section 3.2), (R, W, hidden); in the last memory layer for `query_rows` only."""
        rows = cross_batch.query_rows if cross_batch.last_layer == self.layer_idx else None
        contexts, weights = cross_batch.contexts, cross_batch.weights
        query_states = hidden_states
        if rows is not None:
            query_states = hidden_states[list(rows)]
            contexts = [contexts[row] for row in rows]
            weights = None if weights is None else [weights[row] for row in rows]
        query, frozen = self._heads(self.q_proj(query_states)), cross_batch.frozen_contexts
        _, key, value = self._project(hidden_states, queries=False)
        cos, sin = (part.to(query.device) for part in rotary)
        if not self.uses_rotary:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        settings: dict[str, Any] = {"scaling": self.scaling, "lengths": cross_batch.lengths, "rows": rows}
        settings["weights"] = weights
        if not self.has_projections and frozen is None:
            return self._output(cross_batch_attention(query, key, value, cos, sin, contexts, **settings))
        prefix = "mem_" if self.has_projections else ""
        memory_query = self._heads(self.mem_q_proj(query_states)) if prefix else query
        seen = hidden_states if frozen is None else frozen[self.layer_idx]
        memory_qkv = memory_query, *self._project(seen, prefix, queries=False)[1:]
        settings["frozen_contexts"] = frozen is not None
        return self._output(*cross_batch_parts((query, key, value), memory_qkv, cos, sin, contexts, **settings))

    def _attend_window(
        self, local_qkv: _QKV, memory_query: Tensor, attention_mask: Tensor | None, ctx: ForwardContext, **kwargs: Any
    ) -> Tensor:
        """Causal attention within the window, and to all of memory; (R, W, hidden).

        Rows are padded on the right, where causal attention doesn't look, so no padding mask is needed.
        """
        query, key, value = local_qkv
        if not self._has_memory_tokens(ctx):
            interface = ALL_ATTENTION_FUNCTIONS.get_interface
            function: Callable = interface(self.config._attn_implementation, eager_attention_forward)
            dropout = self.attention_dropout if self.training else 0.0
            output = function(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
            return self._output(output[0].transpose(1, 2))
        query, memory_query, memory_bias = self._scale_by_memory_size(query, memory_query, ctx)
        if _needs_gradient(query, key, value):
            width = query.shape[2]
            causal = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()[None, None]
            return self._eager_attention([(query, key, value, causal)], memory_query, ctx, memory_bias)
        local = flash(query, key, value, scaling=self.scaling, causal=True)
        memory = self._attend_memory(memory_query, ctx)
        return self._merge_local_and_memory(local, [memory], memory_query, ctx, memory_bias)

    def _store(self, key: Tensor | None, value: Tensor | None, memory_kv: _Pair, ctx: ForwardContext) -> None:
        """Write a first window into the local context or into memory."""
        if ctx.keep_local:
            assert ctx.slots is not None and key is not None and value is not None
            ctx.cache.layers[self.layer_idx].write(ctx.row_index, ctx.slots, key, value, *memory_kv)
        elif self.has_memory:
            before = self._memory_spans(ctx)
            for row, (bank, length) in enumerate(zip(ctx.banks, ctx.lengths, strict=True)):
                # Gradient checkpointing runs a layer twice; the second run must not write again.
                if bank.length(self.layer_idx) == before[row].tokens:
                    keys, values = (part[row, :, :length].detach() for part in memory_kv)
                    bank.append(self.layer_idx, keys, values)

    def _attend_continuation(
        self, new_qkv: _QKV, memory_query: Tensor, memory_kv: _Pair, ctx: ForwardContext
    ) -> Tensor:
        """Attention to the local context, the slots evicted from it, and memory; (R, W, hidden)."""
        update, local = ctx.local_update, ctx.cache.layers[self.layer_idx]
        assert update is not None
        query = new_qkv[0]
        local.write(ctx.row_index, update.write, *new_qkv[1:], *memory_kv)
        if self.has_memory:
            self._evict(update.evicted_before, ctx)
        keys, values = local.read(ctx.row_index, update.seen)
        mask = None if update.mask is None else update.mask.to(query.device)
        if not self.has_memory:
            gqa = self.num_key_value_groups > 1
            attention = F.scaled_dot_product_attention
            return self._output(attention(query, keys, values, mask, scale=self.scaling, enable_gqa=gqa))
        query, memory_query, memory_bias = self._scale_by_memory_size(query, memory_query, ctx, update.evicted_mask)
        local_qkv: list[_LocalQKV] = [(query, keys, values, mask)]
        if update.evicted is not None and update.evicted_mask is not None:
            evicted = local.read(ctx.row_index, update.evicted, raw=True)
            local_qkv.append((memory_query, *evicted, update.evicted_mask.to(query.device)))
        if _needs_gradient(*new_qkv):
            output = self._eager_attention(local_qkv, memory_query, ctx, memory_bias)
        else:
            first, *parts = [flash(q, k, v, scaling=self.scaling, mask=seen) for q, k, v, seen in local_qkv]
            if any(bank.length(self.layer_idx) for bank in ctx.banks):
                parts.append(self._attend_memory(memory_query, ctx))
            output = self._merge_local_and_memory(first, parts, memory_query, ctx, memory_bias)
        self._evict(update.evicted_after, ctx)
        return output

    def _evict(self, slots: list[Tensor | slice] | None, ctx: ForwardContext) -> None:
        """Move these slots of each row from the local context into memory."""
        if slots is not None:
            rows = range(len(slots)) if ctx.rows is None else ctx.rows.tolist()
            for bank, row, row_slots in zip(ctx.banks, rows, slots, strict=True):
                bank.append(self.layer_idx, *ctx.cache.layers[self.layer_idx].read(row, row_slots, raw=True))

    def _attend_memory(self, query: Tensor, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        """Output (R, H, W, D) and log-sum-exp (R, H, W) over memory."""
        step = query.shape[2]
        if self.config.mem_attention_grouping is not None:
            heads, queries = self.config.mem_attention_grouping
            step = max(1, heads * queries // query.shape[1])
        parts = [attend(part, ctx.banks, self.layer_idx, self.scaling, ctx.search) for part in query.split(step, 2)]
        outputs, lses = zip(*parts, strict=True)
        return (outputs[0], lses[0]) if len(parts) == 1 else (torch.cat(outputs, 2), torch.cat(lses, 2))

    def _merge_local_and_memory(
        self, local: _Pair, found: list[_Pair], memory_query: Tensor, ctx: ForwardContext, memory_bias: Tensor | None
    ) -> Tensor:
        """Merge the attention over the parts into one softmax, and project; (R, W, hidden).

        `memory_bias`, (R, 1, W or 1), is subtracted from the scores of `found`, the parts from memory.
        """
        if memory_bias is not None:
            found = [(output, lse.float() - memory_bias) for output, lse in found]
        if found and self.has_projections:
            memory, memory_lse = merge(*zip(*found, strict=True))
            output, local_lse = local[0], local[1].float()
            lse = torch.logaddexp(local_lse, memory_lse).clamp_min(torch.finfo(torch.float32).min)
            output = output * (local_lse - lse).exp().unsqueeze(-1).to(output.dtype)
            memory = memory * (memory_lse - lse).exp().unsqueeze(-1).to(memory.dtype)
            projected = self._output(output, memory)
        else:
            output, lse = merge(*zip(local, *found, strict=True))
            projected = self._output(output)
        if ctx.cache.observer is not None:
            ctx.cache.observer(self.layer_idx, memory_query, lse if memory_bias is None else lse + memory_bias)
        return projected

    def _eager_attention(
        self, local_qkv: list[_LocalQKV], memory_query: Tensor, ctx: ForwardContext, memory_bias: Tensor | None
    ) -> Tensor:
        """The same attention in plain operations, since fused kernels have no gradient through the log-sum-exp.

        `local_qkv` has the local context first, then the slots evicted from it; `memory_bias` is subtracted from all
        scores but the local context's.
        """
        outputs, found = [], []
        for row, past in enumerate(self._seen_spans(ctx)):
            parts = [(q[row], k[row], v[row], m) for q, k, v, m in local_qkv]
            parts += [
                (memory_query[row], span.keys().to(memory_query), span.values().to(memory_query), None) for span in past
            ]
            scores: list[Tensor] = []
            values = []
            for query, key, value, mask in parts:  # (H, W, D), (K, keys, D), (K, keys, D)
                key, value = (part.repeat_interleave(self.num_key_value_groups, 0) for part in (key, value))
                score = (query @ key.transpose(1, 2)).float() * self.scaling  # (H, W, keys)
                if scores and memory_bias is not None:
                    score = score - memory_bias[row, :, :, None]
                if mask is not None:
                    score = score.masked_fill(~mask[row if len(mask) > 1 else 0], float("-inf"))
                scores.append(score)
                values.append(value)
            weights = torch.cat(scores, -1).softmax(-1).to(memory_query.dtype).split([s.shape[-1] for s in scores], -1)
            local, *others = [weight @ value for weight, value in zip(weights, values, strict=True)]
            outputs.append(local)
            found.append(sum(others, torch.zeros_like(local)))
        return self._output(torch.stack(outputs), torch.stack(found))

    def _scale_by_memory_size(
        self, query: Tensor, memory_query: Tensor, ctx: ForwardContext, evicted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries scaled by the size of the memory that each sees, and the bias to subtract from memory's scores."""
        if not self.config.logn_attention_scale and not self.config.memory_size_bias:
            return query, memory_query, None
        counts = [float(spans.tokens) for spans in self._seen_spans(ctx)]
        seen = torch.tensor(counts, dtype=torch.float32, device=query.device)[:, None, None]  # (R, 1, 1 or W)
        seen = seen if evicted is None else seen + evicted.to(query.device).sum(-1)
        if self.config.logn_attention_scale:
            query, memory_query = scale_queries(self.config, (query, memory_query), seen)
        return query, memory_query, memory_logit_bias(self.config, seen) if self.config.memory_size_bias else None

    def _has_memory_tokens(self, ctx: ForwardContext) -> bool:
        return self.has_memory and any(self._memory_spans(ctx))

    def _memory_spans(self, ctx: ForwardContext) -> list[SpanList]:
        """Per row, the memory before this forward pass."""
        if self.layer_idx not in ctx.spans:
            ctx.spans[self.layer_idx] = [bank.spans(self.layer_idx) for bank in ctx.banks]
        return ctx.spans[self.layer_idx]

    def _seen_spans(self, ctx: ForwardContext) -> list[SpanList]:
        """Per row, the memory that queries see: a continuation sees the slots that it has just evicted."""
        if ctx.local_update is None:
            return self._memory_spans(ctx)
        return [bank.spans(self.layer_idx) for bank in ctx.banks]

    def _project(self, hidden_states: Tensor, prefix: str = "", queries: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Query (R, H, W, D), key and value (R, K, W, D) without the rotary embedding; without `queries` key twice.

        The prefix "mem_" selects the projections for memory.
        """
        key, value = (self._heads(getattr(self, f"{prefix}{name}_proj")(hidden_states)) for name in "kv")
        query = self._heads(getattr(self, f"{prefix}q_proj")(hidden_states)) if queries else key
        return query, key, value

    def _output(self, output: Tensor, found: Tensor | None = None) -> Tensor:
        """Project outputs (R, H, W, D) of the local context and of memory (`found`) to (R, W, hidden)."""
        if found is not None and not self.has_projections:
            output, found = output + found, None
        projected: Tensor = self.o_proj(output.transpose(1, 2).flatten(2))
        return projected if found is None else projected + self.mem_o_proj(found.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        """(R, W, H * D) to (R, H, W, D)."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _apply_rotary(self, query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not self.uses_rotary:
            return query, key
        cos, sin = (part.to(query.device) for part in rotary)
        return apply_rotary_pos_emb(query, key, cos, sin)

    def _memory_key(self, key: Tensor, ctx: ForwardContext) -> Tensor:
        """The key at position 0: unrotated, times the factor that some rotary embeddings apply at every position."""
        return key * ctx.key_scale if self.uses_rotary and ctx.key_scale != 1.0 else key


def scale_queries(config: Any, queries: Sequence[Tensor], seen: Tensor) -> list[Tensor]:
    """Queries (R, H, W, D) times 1 + scale · ln(max(1, seen / start)), the log-n scale of `LongLlamaConfig`."""
    factor = 1 + config.logn_attention_scale * (seen[..., None] / config.logn_attention_start).clamp(min=1).log()
    return [query * factor.to(query.dtype) for query in queries]


def memory_logit_bias(config: Any, seen: Tensor) -> Tensor:
    """`memory_size_bias` · ln(max(1, seen / start)), to subtract from scores of memory; the shape of `seen`."""
    return config.memory_size_bias * (seen / config.memory_size_bias_start).clamp(min=1).log()


def scale_context_weights(config: Any, weights: Weights, lengths: Sequence[Sequence[int]]) -> Weights:
    """`memory_logit_bias` in training: weights of each row's contexts, which have these real tokens, with the bias."""
    scaled = []
    for row_weights, row_lengths in zip(weights, lengths, strict=True):
        tokens = sum(weight * length for weight, length in zip(row_weights, row_lengths, strict=True))
        scale = max(1.0, tokens / config.memory_size_bias_start) ** -config.memory_size_bias
        scaled.append([weight * scale for weight in row_weights])
    return scaled


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

"""Attention with memory: local context and memory under one softmax (Tworkowski et al. 2023, sections 3.1 and 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from llamory.longllama.cache import LongLlamaCacheLayer
from llamory.longllama.crossbatch import CrossBatch, cross_batch_attention, cross_batch_parts
from llamory.longllama.forward_context import Window
from llamory.longllama.memory_scaling import seen_tokens, sharpened, taken_off
from llamory.longllama.projections import PROJECTIONS, MemoryProjection
from llamory.memory.attention import attend, flash, merge
from llamory.memory.blocks import Span

# Queries, keys and values of a part of the attention, and where a query may look (None: everywhere).
_Near = tuple[Tensor, Tensor, Tensor, Tensor | None]


class LongLlamaDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, which can stop once its memory is written."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """As Llama's. Where only memory is wanted, the last layer's output is of no use and isn't computed."""
        window: Window | None = kwargs.get("window")
        if window is not None and window.last_layer == self.self_attn.layer_idx:
            self.self_attn.remember(self.input_layernorm(hidden_states), window)
            return hidden_states
        together: CrossBatch | None = kwargs.get("cross_batch")
        if together is not None and together.last_layer == self.self_attn.layer_idx:
            normed = self.input_layernorm(hidden_states)
            hidden = hidden_states[list(together.asked or ())]
            hidden = hidden + self.self_attn.attend_together(normed, kwargs["position_embeddings"], together)
            output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
            return output
        return super().forward(hidden_states, *args, **kwargs)


class LongLlamaAttention(LlamaAttention):
    """Llama's attention that goes on from a local context and, in memory layers, attends to memory as well.

    With `mem_projections` queries to memory, its keys and values, and what was found in it have projections of their
    own, `mem_q_proj` to `mem_o_proj`; local context and memory still share one softmax. What is read without memory is
    then computed from the layer's own weights alone, whatever was trained for memory.
    """

    @property
    def has_memory(self) -> bool:
        """Whether this is a memory layer."""
        return self.layer_idx in self.config.mem_layers

    @property
    def has_projections(self) -> bool:
        """Whether memory has projections of its own here."""
        return bool(self.config.mem_projections) and self.has_memory

    def add_projections(self) -> None:
        """Give memory projections of its own, which start as the layer's."""
        for name in PROJECTIONS:
            # What is found in memory is added to the local output, which has that projection's bias already.
            own = getattr(self, name)
            setattr(self, f"mem_{name}", MemoryProjection(own, bias=own.bias is not None and name != "o_proj"))

    @property
    def rotates(self) -> bool:
        """Whether queries and keys get the rotary embedding."""
        return self.config.mem_positionals or not self.has_memory

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        window: Window | None = None,
        cross_batch: CrossBatch | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend within `window`, or to the rows that `cross_batch` names; else it is Llama's attention.

        `hidden_states` is (rows, width, hidden).
        """
        if cross_batch is not None and self.has_memory:
            assert position_embeddings is not None
            return self.attend_together(hidden_states, position_embeddings, cross_batch), None
        if window is None:
            return super().forward(hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        assert position_embeddings is not None
        query, key, value = self._project(hidden_states)
        far = (query, key, value)
        asks = self.has_projections and (window.chunk is not None or self._sees_memory(window))
        if self.has_projections:
            far = self._project(hidden_states, "mem_", queries=asks)
        kept = (self._memory_key(far[1], window), far[2])
        query, key = self._rotate(query, key, position_embeddings)
        to_memory = query
        if asks or (self.has_memory and window.memory_rotary is not None):
            to_memory, _ = self._rotate(far[0], far[0][:, :1], window.memory_rotary or position_embeddings)
        if window.chunk is not None:
            return self._go_on((query, key, value), to_memory, kept, window), None
        output = self._first_window((query, key, value), to_memory, attention_mask, window, **kwargs)
        self._keep(key, value, kept, window)
        return output, None

    def remember(self, hidden_states: Tensor, window: Window) -> None:
        """Write a window into memory without attending."""
        _, key, value = self._project(hidden_states, "mem_" if self.has_projections else "", queries=False)
        self._keep(None, None, (self._memory_key(key, window), value), window)

    def attend_together(self, hidden_states: Tensor, rotary: tuple[Tensor, Tensor], together: CrossBatch) -> Tensor:
        """Attend to other rows, too, as training has it; in the last memory layer only the rows that are asked do."""
        rows = together.asked if together.last_layer == self.layer_idx else None
        contexts, weights = together.contexts, together.weights
        looking = hidden_states
        if rows is not None:
            looking = hidden_states[list(rows)]
            contexts = [contexts[row] for row in rows]
            weights = None if weights is None else [weights[row] for row in rows]
        query = self._heads(self.q_proj(looking))
        _, key, value = self._project(hidden_states, queries=False)
        cos, sin = (part.to(query.device) for part in rotary)
        if not self.rotates:
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        settings: dict[str, Any] = {"scaling": self.scaling, "lengths": together.lengths, "rows": rows}
        settings["weights"] = weights
        kind, outside = "mem_" if self.has_projections else "", together.outside
        if not kind and outside is None:
            return self._projected(cross_batch_attention(query, key, value, cos, sin, contexts, **settings))
        to_others = self._heads(self.mem_q_proj(looking)) if kind else query
        seen = hidden_states if outside is None else outside[self.layer_idx]
        far = to_others, *self._project(seen, kind, queries=False)[1:]
        settings["outside"] = outside is not None
        near, found = cross_batch_parts((query, key, value), far, cos, sin, contexts, **settings)
        return self._projected(near, found) if kind else self._projected(near + found)

    # ---- a first window ------------------------------------------------------------------------------------------

    def _first_window(
        self,
        near: tuple[Tensor, Tensor, Tensor],
        to_memory: Tensor,
        attention_mask: Tensor | None,
        window: Window,
        **kwargs: Any,
    ) -> Tensor:
        """Causal attention in the window, and all of memory. Gives the layer's output, (rows, width, hidden).

        Rows are filled up behind their tokens, where causal attention doesn't look, so no mask is needed.
        """
        query, key, value = near
        if not self._sees_memory(window):
            function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            dropout = self.attention_dropout if self.training else 0.0
            output = function(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
            return self._projected(output[0].transpose(1, 2))
        query, to_memory, less = self._by_size(query, to_memory, window)
        if _needs_gradient(query, key, value):
            width = query.shape[2]
            causal = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()[None, None]
            return self._one_softmax([(query, key, value, causal)], to_memory, window, less)
        local = flash(query, key, value, scaling=self.scaling, causal=True)
        return self._merged(local, [self._attend_memory(to_memory, window)], to_memory, window, less)

    def _keep(self, key: Tensor | None, value: Tensor | None, kept: tuple[Tensor, Tensor], window: Window) -> None:
        """Put a first window where it belongs: the local context, or memory."""
        if window.stays:
            assert window.slots is not None and key is not None and value is not None
            self._local(window).write(window.chosen, window.slots, key, value, *kept)
        elif self.has_memory:
            before = self._memory_spans(window)
            for row, (bank, length) in enumerate(zip(window.banks, window.lengths, strict=True)):
                # A layer that gradient checkpointing computes once more must not write once more.
                if bank.length(self.layer_idx) == sum(map(len, before[row])):
                    keys, values = (part[row, :, :length].detach() for part in kept)
                    bank.append(self.layer_idx, keys, values)

    # ---- going on from a local context ---------------------------------------------------------------------------

    def _go_on(
        self,
        new: tuple[Tensor, Tensor, Tensor],
        to_memory: Tensor,
        kept: tuple[Tensor, Tensor],
        window: Window,
    ) -> Tensor:
        """Attend to the local context, what is leaving it, and memory. Gives the layer's output, (rows, width, hidden).

        Args:
            new: the step's queries, keys and values.
            to_memory: its queries to memory.
            kept: the keys and values that memory will keep of it.
            window: the step.
        """
        chunk, local = window.chunk, self._local(window)
        assert chunk is not None
        query = new[0]
        local.write(window.chosen, chunk.write, *new[1:], *kept)
        if self.has_memory:
            self._leave(chunk.leaves_first, local, window)
        keys, values = local.read(window.chosen, chunk.seen)
        mask = None if chunk.mask is None else chunk.mask.to(query.device)
        if not self.has_memory:
            output = F.scaled_dot_product_attention(
                query, keys, values, attn_mask=mask, scale=self.scaling, enable_gqa=self.num_key_value_groups > 1
            )
            return self._projected(output)
        query, to_memory, less = self._by_size(query, to_memory, window, chunk.leaving_mask)
        near: list[_Near] = [(query, keys, values, mask)]
        if chunk.leaving is not None and chunk.leaving_mask is not None:
            leaving = local.read(window.chosen, chunk.leaving, raw=True)
            near.append((to_memory, *leaving, chunk.leaving_mask.to(query.device)))
        if _needs_gradient(*new):
            output = self._one_softmax(near, to_memory, window, less)
        else:
            first, *parts = [
                flash(part, keys, values, scaling=self.scaling, mask=_additive(mask, part))
                for part, keys, values, mask in near
            ]
            if any(bank.length(self.layer_idx) for bank in window.banks):
                parts.append(self._attend_memory(to_memory, window))
            output = self._merged(first, parts, to_memory, window, less)
        self._leave(chunk.leaves_after, local, window)
        return output

    def _leave(self, slots: list[Tensor | slice] | None, local: LongLlamaCacheLayer, window: Window) -> None:
        """Move the given slots of each row from the local context into memory."""
        if slots is None:
            return
        rows = range(len(slots)) if window.rows is None else window.rows.tolist()
        for bank, row, chosen in zip(window.banks, rows, slots, strict=True):
            key, value = local.read(row, chosen, raw=True)
            bank.append(self.layer_idx, key, value)

    # ---- memory --------------------------------------------------------------------------------------------------

    def _attend_memory(self, query: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        """Output (rows, heads, width, head_dim) and log-sum-exp (rows, heads, width) over memory."""
        width = step = query.shape[2]
        if self.config.mem_attention_grouping is not None:
            # Scores are never held, so heads needn't be taken apart: as many queries at once, in all heads.
            heads, queries = self.config.mem_attention_grouping
            step = max(1, heads * queries // query.shape[1])
        parts = [
            attend(query[:, :, start : start + step], window.banks, self.layer_idx, self.scaling, window.search)
            for start in range(0, width, step)
        ]
        outputs, log_sums = zip(*parts, strict=True)
        return (outputs[0], log_sums[0]) if len(parts) == 1 else (torch.cat(outputs, 2), torch.cat(log_sums, 2))

    def _merged(
        self,
        local: tuple[Tensor, Tensor],
        found: list[tuple[Tensor, Tensor]],
        to_memory: Tensor,
        window: Window,
        less: Tensor | None,
    ) -> Tensor:
        """The layer's output from the attention over its parts, under one softmax; (rows, width, hidden).

        `less` is taken off all scores of what was `found` in memory.
        """
        if less is not None:
            found = [(output, log_sum.float() - less) for output, log_sum in found]
        if found and self.has_projections:
            memory, memory_sum = merge(*zip(*found, strict=True))
            output, local_sum = local[0], local[1].float()
            log_sum = torch.logaddexp(local_sum, memory_sum).clamp_min(torch.finfo(torch.float32).min)
            output, memory = (
                part * (part_sum - log_sum).exp().unsqueeze(-1).to(part.dtype)
                for part, part_sum in ((output, local_sum), (memory, memory_sum))
            )
            projected = self._projected(output, memory)
        else:
            output, log_sum = merge(*zip(local, *found, strict=True))
            projected = self._projected(output)
        if window.cache.observer is not None:
            window.cache.observer(self.layer_idx, to_memory, log_sum if less is None else log_sum + less)
        return projected

    def _one_softmax(self, near: list[_Near], to_memory: Tensor, window: Window, less: Tensor | None) -> Tensor:
        """The same in plain steps, as fused kernels give no gradient through the log-sum-exp.

        Memory is a constant here: no gradient reaches what was read before.

        Args:
            near: queries, keys, values and masks (True where a query may look) of the local context, and of what is
                leaving it.
            to_memory: queries to memory, (rows, heads, width, head_dim).
            window: the step, with the memory as it was when the step began.
            less: what is taken off all scores but the local context's.
        """
        outputs, found = [], []
        spans = self._memory_spans(window) if window.chunk is None else self._spans_now(window)
        for row, past in enumerate(spans):
            parts = [(q[row], k[row], v[row], m) for q, k, v, m in near]
            parts += [(to_memory[row], span.keys().to(to_memory), span.values().to(to_memory), None) for span in past]
            scores: list[Tensor] = []
            values = []
            for query, key, value, mask in parts:
                key, value = (part.repeat_interleave(self.num_key_value_groups, 0) for part in (key, value))
                score = (query @ key.transpose(1, 2)).float() * self.scaling
                if scores and less is not None:
                    score = score - less[row, :, :, None]
                if mask is not None:
                    score = score.masked_fill(~mask[row if len(mask) > 1 else 0], float("-inf"))
                scores.append(score)
                values.append(value)
            shares = torch.cat(scores, -1).softmax(-1).to(to_memory.dtype).split([s.shape[-1] for s in scores], -1)
            local, *others = [share @ value for share, value in zip(shares, values, strict=True)]
            outputs.append(local)
            found.append(sum(others, torch.zeros_like(local)))
        output, memory = torch.stack(outputs), torch.stack(found)
        return self._projected(output, memory) if self.has_projections else self._projected(output + memory)

    def _by_size(
        self, query: Tensor, to_memory: Tensor, window: Window, leaving: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Queries, sharpened by the memory that each sees, with what is `leaving` for it, and what its scores lose."""
        if not self.config.mem_log_scale and not self.config.mem_log_bias:
            return query, to_memory, None
        spans = self._memory_spans(window) if window.chunk is None else self._spans_now(window)
        seen = seen_tokens(spans, leaving, query.device)
        if self.config.mem_log_scale:
            query, to_memory = sharpened(self.config, (query, to_memory), seen)
        return query, to_memory, taken_off(self.config, seen) if self.config.mem_log_bias else None

    def _sees_memory(self, window: Window) -> bool:
        return self.has_memory and any(self._memory_spans(window))

    def _memory_spans(self, window: Window) -> list[list[Span]]:
        """Per row what memory held when the step began."""
        if self.layer_idx not in window.spans:
            window.spans[self.layer_idx] = self._spans_now(window)
        return window.spans[self.layer_idx]

    def _spans_now(self, window: Window) -> list[list[Span]]:
        return [bank.spans(self.layer_idx) for bank in window.banks]

    # ---- projections ---------------------------------------------------------------------------------------------

    def _project(self, hidden_states: Tensor, kind: str = "", queries: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, (rows, heads or kv_heads, width, head_dim), before the rotary embedding.

        Those for memory are of the `kind` "mem_". Without `queries` the first is the key once more.
        """
        key, value = (self._heads(getattr(self, f"{kind}{name}_proj")(hidden_states)) for name in "kv")
        query = self._heads(getattr(self, f"{kind}q_proj")(hidden_states)) if queries else key
        return query, key, value

    def _projected(self, output: Tensor, found: Tensor | None = None) -> Tensor:
        """Attention's output (rows, heads, width, head_dim) as the layer's, and what was `found` in memory with it."""
        projected: Tensor = self.o_proj(output.transpose(1, 2).flatten(2))
        return projected if found is None else projected + self.mem_o_proj(found.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor) -> Tensor:
        """(rows, width, heads * head_dim) as (rows, heads, width, head_dim)."""
        return projected.view(*projected.shape[:-1], -1, self.head_dim).transpose(1, 2)

    def _rotate(self, query: Tensor, key: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not self.rotates:
            return query, key
        cos, sin = (part.to(query.device) for part in rotary)
        return apply_rotary_pos_emb(query, key, cos, sin)

    def _memory_key(self, key: Tensor, window: Window) -> Tensor:
        """The key at position 0: as it is, but for the factor that some rotary embeddings put on all positions."""
        return key * window.key_scale if self.rotates and window.key_scale != 1.0 else key

    def _local(self, window: Window) -> LongLlamaCacheLayer:
        return window.cache.layers[self.layer_idx]


def _needs_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask that is added to the scores."""
    if mask is None:
        return None
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, float("-inf"))

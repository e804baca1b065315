"""LongLLaMA's decoder: a LLaMA that processes inputs of any length in windows (Tworkowski et al. 2023).

The paper is arXiv:2307.03170. Shapes: B rows of the batch, L columns of the input, R rows and W width of a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from llamory.errors import LlamoryError
from llamory.longllama.attention import LongLlamaDecoderLayer, MemoryProjection, scale_context_weights
from llamory.longllama.cache import ForwardContext, LongLlamaCache
from llamory.longllama.configuration import LongLlamaConfig, check_last_context, check_memory
from llamory.longllama.crossbatch import Contexts, CrossBatch, Weights
from llamory.longllama.windows import RealTokens, Window, split_evenly, split_prompt
from llamory.memory import MemoryBank
from llamory.memory.search import Search, make_search

# Tokens of a continuation per window. Each sees another part of the local context, for which the mask grows with W².
MAX_CONTINUATION_TOKENS = 512


class LongLlamaPreTrained(PreTrainedModel):
    """The common part of decoder and language model; projections that a checkpoint lacks copy the layer's own."""

    _keys_to_ignore_on_load_missing = [r"\.mem_[qkvo]_proj\."]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, MemoryProjection):
            module.init_from_base()
        else:
            super()._init_weights(module)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int | None = None, **kwargs: Any
    ) -> None:
        """As in transformers, by default for every `gradient_checkpoint_every_ith` layer."""
        every = self.config.gradient_checkpoint_every_ith if every_n_layers is None else every_n_layers
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, every, **kwargs)


class LongLlamaModel(LongLlamaPreTrained, LlamaModel):
    """A LlamaModel that processes inputs of any length in windows, with memory in some of its layers."""

    config_class = LongLlamaConfig
    config: LongLlamaConfig
    layers: Any  # a ModuleList of LongLlamaDecoderLayer
    _no_split_modules = ["LongLlamaDecoderLayer"]
    _can_compile_fullgraph = False

    def __init__(self, config: LongLlamaConfig):
        check_memory(config)
        super(LlamaModel, self).__init__(config)  # not Llama's constructor, which builds Llama's layers
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(LongLlamaDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self._search: tuple[Any, Search] | None = None
        self.post_init()
        for layer in self.layers:
            # After the initialization of the layer's own projections, which the ones for memory copy.
            if layer.self_attn.has_projections:
                layer.self_attn.add_projections()
        self.post_init()

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,  # noqa: ARG002
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        last_context_length: int | None = None,
        logits_to_keep: int | Tensor | None = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        contexts: Contexts | None = None,
        query_rows: Sequence[int] | None = None,
        context_weights: Weights | None = None,
        context_states: Mapping[int, Tensor] | None = None,
        context_lengths: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Process a batch of any length, or in training (with `contexts`) rows of one window that see one another.

        Args:
            input_ids: (B, L).
            attention_mask: (B, L) or longer, with earlier columns in front; 0 at padding, on either side.
            position_ids: ignored; local positions start at 0 in each window (section 3.3 of the paper).
            past_key_values: a `LongLlamaCache` to continue.
            inputs_embeds: (B, L, hidden), instead of `input_ids`.
            use_cache: keep the last window in a local context; otherwise it goes into memory like the others.
            last_context_length: tokens of the last window; by default the configuration's.
            logits_to_keep: number of last columns whose hidden states are returned (0 or a tensor: all; None: none).
            contexts: per row, the rows of this batch that its memory layers see whole, with gradients (section 3.2).
                Nothing is cached, and padding must be on the right.
            query_rows: with `contexts`, the only rows whose hidden states are needed; the others' are zeros.
            context_weights: the weight of each context in the softmax; see `cross_batch_attention`.
            context_states: what `layer_inputs` returned for rows outside the batch; `contexts` then refers to these.
            context_lengths: real tokens of each row of `context_states`; by default all.

        Returns:
            Hidden states (B, columns kept, hidden), zeros at padding, and the cache (None if nothing is cached).

        Raises:
            LlamoryError: the last window is longer than the context, or the cache doesn't fit the batch.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        source = input_ids if inputs_embeds is None else inputs_embeds
        assert source is not None
        batch, length = source.shape[:2]
        if contexts is not None:
            if context_states is not None:
                query_rows = None
            cross_batch = CrossBatch(contexts, context_lengths, query_rows, None, context_weights, context_states)
            output = self._forward_cross_batch(source, attention_mask, cross_batch, kwargs)
            return output if return_dict is not False else output.to_tuple()
        use_cache = self.config.use_cache if use_cache is None else use_cache
        use_cache = bool(use_cache) and not (self.gradient_checkpointing and self.training)
        all_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        cache = self._prepare_cache(past_key_values, batch)
        real = RealTokens(_current_mask(attention_mask, batch, length), batch, length)
        offset = _first_kept(logits_to_keep, length)
        collected: list[Tensor] = []  # of each layer if all are needed, (B, columns kept, hidden)
        for window in self._split_into_windows(real, cache, last_context_length, use_cache):
            needed = all_states or real.reaches(window, offset) or not self.config.mem_layers
            states = self._run_window(window, real, source, cache, needed, all_states, kwargs)
            if not needed:
                continue
            if real.columns is None and len(window.rows) == batch and states[0].shape[1] >= length - offset:
                # The common case: all columns are from this window.
                collected = [state[:, -(length - offset) :] for state in states]
                continue
            collected = collected or [s.new_zeros((batch, length - offset, s.shape[-1])) for s in states]
            for tensor, state in zip(collected, states, strict=True):
                real.scatter(window, state, tensor, offset)
        cache.slots.columns += length
        shape = (batch, length - offset, self.config.hidden_size)
        last = collected[-1] if collected else torch.zeros(shape, device=source.device, dtype=self.dtype)
        drop_cache = not use_cache and past_key_values is None and not self.config.mem_layers
        output = BaseModelOutputWithPast(
            last_hidden_state=last,
            past_key_values=None if drop_cache else cache,
            hidden_states=tuple(collected) if all_states else None,
        )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _split_into_windows(
        self, real: RealTokens, cache: LongLlamaCache, last: int | None, use_cache: bool
    ) -> list[Window]:
        context = self.config.max_position_embeddings
        last = self.config.last_context_length if last is None else last
        assert last is not None
        check_last_context(last, context)
        if cache.has_local and not use_cache:
            raise LlamoryError("A cache with a local context can only be continued with use_cache=True.")
        if cache.has_local and self.config.local_cache_overflow == "slide":
            return split_evenly(real.lengths, min(MAX_CONTINUATION_TOKENS, context), keep_local=True)
        if not self.config.mem_layers and max(real.lengths, default=0) <= context:
            last = context
        windows = split_prompt(real.lengths, context, last, keep_local=use_cache)
        return [replace(window, keep_local=True) for window in windows] if cache.has_local else windows

    def _run_window(
        self,
        window: Window,
        real: RealTokens,
        source: Tensor,
        cache: LongLlamaCache,
        needed: bool,
        all_states: bool,
        kwargs: dict[str, Any],
    ) -> list[Tensor]:
        """The last hidden states (R, W, hidden) of one window, with `all_states` after the input of each layer."""
        part = real.gather(window, source)
        hidden = part if source.is_floating_point() else self.embed_tokens(part)
        ctx = ForwardContext(
            cache=cache,
            rows=None if len(window.rows) == len(source) else torch.tensor(window.rows, device=hidden.device),
            lengths=window.lengths,
            banks=[cache.memory[row] for row in window.rows] if self.config.mem_layers else [],
            search=cache.search or self._memory_search(),
            keep_local=window.keep_local,
            key_scale=float(self.rotary_emb.attention_scaling),
            last_layer=None if needed or window.keep_local else max(self.config.mem_layers),
        )
        if cache.has_local:
            unrotated = frozenset() if self.config.mem_positionals else frozenset(self.config.mem_layers)
            cache.rebase_positions(self.rotary_emb, unrotated)
            cache.reserve(window.width)
            ctx.local_update = update = cache.slots.plan(window.rows, window.lengths)
            mask, rotary = None, self.rotary_emb(hidden, update.position_ids.to(hidden.device))
            if update.memory_position_ids is not None:
                ctx.memory_rotary = self.rotary_emb(hidden, update.memory_position_ids.to(hidden.device))
        else:
            if window.keep_local:
                ctx.slots = cache.slots.fill(window.rows, window.lengths)
            mask, rotary = self._mask_and_rotary(hidden)
        states = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, ctx=ctx, **kwargs)
            if all_states:
                states.append(hidden)
            if ctx.last_layer == layer.self_attn.layer_idx:
                return states
        if ctx.local_update is not None:
            cache.slots.commit(ctx.local_update)
        last = self.norm(hidden)
        # As in Llama's own output, the last of all states is the normed one.
        return [*states[:-1], last] if all_states else [last]

    def _forward_cross_batch(
        self, source: Tensor, attention_mask: Tensor | None, cross_batch: CrossBatch, kwargs: dict[str, Any]
    ) -> BaseModelOutputWithPast:
        """Rows that see one another in memory layers (section 3.2)."""
        batch, width = source.shape[:2]
        if width > self.config.max_position_embeddings:
            raise LlamoryError(f"Rows of {width} tokens are longer than the context; cut documents into shorter rows.")
        hidden = source if source.is_floating_point() else self.embed_tokens(source)
        lengths, query_rows = _lengths(_current_mask(attention_mask, batch, width)), cross_batch.query_rows
        lengths = lengths if cross_batch.frozen_contexts is None else cross_batch.lengths
        if not query_rows or len(query_rows) >= batch or not self.config.mem_layers:
            query_rows = None
        last = None if query_rows is None else max(self.config.mem_layers)
        cross_batch = replace(cross_batch, lengths=lengths, query_rows=query_rows, last_layer=last)
        if self.config.memory_size_bias:
            frozen = cross_batch.frozen_contexts or {}
            max_length = next((states.shape[1] for states in frozen.values()), width)
            real = [[max_length if lengths is None else lengths[row] for row in seen] for seen in cross_batch.contexts]
            weights = cross_batch.weights or [[1.0] * len(seen) for seen in real]
            cross_batch = replace(cross_batch, weights=scale_context_weights(self.config, weights, real))
        mask, rotary = self._mask_and_rotary(hidden)  # padding is on the right, where causal attention doesn't look
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, cross_batch=cross_batch, **kwargs)
            if mask is not None and last == layer.self_attn.layer_idx and len(mask) > 1:
                mask = mask[list(query_rows or ())]
        hidden = self.norm(hidden)
        if query_rows is not None:
            states = hidden.new_zeros(batch, *hidden.shape[1:])
            hidden = states.index_copy(0, torch.tensor(query_rows, device=hidden.device), hidden)
        return BaseModelOutputWithPast(last_hidden_state=hidden)

    @torch.no_grad()
    def layer_inputs(self, input_ids: Tensor) -> dict[int, Tensor]:
        """Per memory layer the normed inputs of its attention (R, W, hidden), from which its keys and values come.

        `input_ids` (R, W) has one window per row, padded on the right; rows don't see one another.
        """
        hidden, inputs = self.embed_tokens(input_ids), {}
        mask, rotary = self._mask_and_rotary(hidden)
        last = max(self.config.mem_layers, default=-1)
        # Memory layers without positions need our attention, here without any contexts.
        layer_kwargs = {} if self.config.mem_positionals else {"cross_batch": CrossBatch([[]] * len(input_ids))}
        for index, layer in enumerate(self.layers[: last + 1]):
            if layer.self_attn.has_memory:
                inputs[index] = layer.input_layernorm(hidden)
            if index < last:
                hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, **layer_kwargs)
        return inputs

    def _mask_and_rotary(self, hidden: Tensor) -> tuple[Tensor | None, tuple[Tensor, Tensor]]:
        """The causal mask of a first window, None for attention that needs none, and its cosine and sine."""
        position_ids = torch.arange(hidden.shape[1], device=hidden.device)[None]
        mask = create_causal_mask(self.config, hidden, None, None, position_ids=position_ids)
        return mask, self.rotary_emb(hidden, position_ids)

    def _prepare_cache(self, past: Cache | None, batch: int) -> LongLlamaCache:
        if past is not None and not isinstance(past, LongLlamaCache):
            if past.get_seq_length():
                raise LlamoryError(f"LongLLaMA can't continue a {type(past).__name__}, only its own past_key_values.")
            past = None
        cache = past if past is not None else LongLlamaCache(self.config)
        cache.prepare(batch, self.new_memory)
        return cache

    def new_memory(self, fingerprint: str = "") -> MemoryBank:
        """An empty memory with the layers and shape of this model."""
        config = self.config
        shape, options = (config.num_key_value_heads, config.head_dim), (config.mem_dtype, config.mem_device)
        return MemoryBank(config.mem_layers, *shape, dtype=options[0], device=options[1], fingerprint=fingerprint)

    def _memory_search(self) -> Search:
        config = self.config
        key = (config.mem_search, config.mem_top_k, config.mem_top_k_attention)
        if self._search is None or self._search[0] != key:
            search = make_search(config.mem_search, config.mem_top_k, top_k_attention=config.mem_top_k_attention)
            self._search = (key, search)
        return self._search[1]


def _first_kept(logits_to_keep: int | Tensor | None, length: int) -> int:
    """The first column whose hidden state is returned."""
    if logits_to_keep is None:
        return length
    return max(length - logits_to_keep, 0) if isinstance(logits_to_keep, int) and logits_to_keep else 0


def _current_mask(attention_mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    """The last `length` columns of the mask."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2 or len(attention_mask) != batch or attention_mask.shape[1] < length:
        raise LlamoryError(f"attention_mask {tuple(attention_mask.shape)} doesn't fit {batch} rows, {length} columns.")
    return attention_mask[:, attention_mask.shape[1] - length :]


def _lengths(mask: Tensor | None) -> Sequence[int] | None:
    """Real tokens per row; None if all tokens are real."""
    if mask is None or bool(mask.all()):
        return None
    lengths = mask.bool().sum(1)
    if bool((mask.bool() != (torch.arange(mask.shape[1], device=mask.device) < lengths[:, None])).any()):
        raise LlamoryError("Rows that see one another must be padded on the right (the tokenizer's padding_side).")
    return list(lengths.tolist())


AutoModel.register(LongLlamaConfig, LongLlamaModel, exist_ok=True)

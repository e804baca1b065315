"""LongLLaMA the published way, written down plainly: what `memory_attention.py` compares with.

The same weights and the same results as `LongLlamaForCausalLM` with exact search, done as the published code does it:
memory is one tensor per layer that is concat_tokens anew at every window, kept in bfloat16 and cast up whole at every
use; local keys are kept before the rotary embedding, concat_tokens and rotated again at every step; everything is
masked with additive masks; a full local cache goes into memory at once; logits are computed for the whole prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

LOWEST_SCORE = -1e6


@dataclass
class CachedKeysValues:
    """Keys, values (batch, kv_heads, tokens, head_dim) and what is added to their scores (batch, 1, tokens, 1)."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


class ReferenceLongLlama:
    """A LLaMA that reads with memory; for batches without padding.

    Args:
        model: a Llama or LongLlama, whose modules are used and whose forward pass isn't.
        mem_layers: the memory layers.
        context: tokens of a window, and the most tokens that the local cache holds.
        last: tokens of a prompt that make the last window.
        mem_dtype: what memory is kept in.
        positionals: whether memory layers rotate queries and keys.
        sdpa: the variant with `scaled_dot_product_attention` (published key `torch_attention`); the default is eager.

    Attributes:
        memory: of each layer that has any.
        local: the local cache of each layer, keys not rotated.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        mem_layers: list[int],
        context: int,
        last: int,
        mem_dtype: torch.dtype = torch.bfloat16,
        positionals: bool = True,
        sdpa: bool = False,
    ):
        self.model, self.mem_layers, self.context, self.last = model, set(mem_layers), context, last
        self.mem_dtype, self.positionals, self.sdpa = mem_dtype, positionals, sdpa
        self.head_dim = model.config.head_dim
        self.groups = model.config.num_attention_heads // model.config.num_key_value_heads
        self.memory: dict[int, CachedKeysValues] = {}
        self.local: dict[int, CachedKeysValues] = {}

    @torch.no_grad()
    def read(self, ids: Tensor, use_cache: bool = True) -> Tensor:
        """Read a prompt (batch, length), window by window. Gives the hidden states (batch, length, hidden)."""
        memory_tokens = max(ids.shape[1] - self.last, 0)
        states = [
            self._forward(ids[:, start : min(start + self.context, memory_tokens)], use_cache=False)
            for start in range(0, memory_tokens, self.context)
        ]
        states.append(self._forward(ids[:, memory_tokens:], use_cache))
        return torch.cat(states, 1)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Go on with a few tokens (batch, few). Gives their logits."""
        return self.head(self._forward(ids, use_cache=True))

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits; the published code asks for those of the whole prompt."""
        return self.model.lm_head(hidden)

    def _forward(self, ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.model.model.embed_tokens(ids)
        batch, width, past = *ids.shape, 0
        if use_cache and self.local:
            past = self.local[0].keys.shape[2]
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.full((width, past + width), lowest, dtype=hidden.dtype).triu(past + 1)
        mask = mask.expand(batch, 1, -1, -1) + torch.zeros(batch, 1, width, past + width, dtype=hidden.dtype)
        # Memory of the step before is held until the whole step is done.
        memory = dict(self.memory)
        for index, layer in enumerate(self.model.model.layers):
            attention_output = self._attention(index, layer.input_layernorm(hidden), mask, use_cache, memory)
            hidden = hidden + attention_output
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.memory = memory
        return self.model.model.norm(hidden)

    def _attention(
        self, index: int, hidden: Tensor, mask: Tensor, use_cache: bool, memory: dict[int, CachedKeysValues]
    ) -> Tensor:
        layer, width, has_memory = self.model.model.layers[index].self_attn, hidden.shape[1], index in self.mem_layers
        query, key, value = (
            part(hidden).view(*hidden.shape[:2], -1, self.head_dim).transpose(1, 2)
            for part in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        raw_key, local_value = key, value
        if use_cache:
            if index in self.local:
                key = torch.cat([self.local[index].keys, key], 2)
                value = torch.cat([self.local[index].values, value], 2)
                past = key.shape[2] - width
                if key.shape[2] > self.context:
                    if has_memory:
                        self._append_to_memory(index, key[:, :, :past], value[:, :, :past], mask[..., :past], memory)
                    key, value, mask = key[:, :, past:], value[:, :, past:], mask[..., past:]
            self.local[index] = CachedKeysValues(key, value)
        if self.positionals or not has_memory:
            cos, sin = self.model.model.rotary_emb(hidden, torch.arange(key.shape[2])[None])
            query = _rotate(query, cos[:, -width:], sin[:, -width:])
            key = _rotate(key, cos, sin)
        attend = self._sdpa if self.sdpa else self._eager
        output = attend(query, key, value, mask, memory.get(index))
        if has_memory and not use_cache:
            self._append_to_memory(index, raw_key, local_value, mask, memory)
        return layer.o_proj(output.transpose(1, 2).reshape(hidden.shape[0], width, -1))

    def _append_to_memory(
        self, index: int, key: Tensor, value: Tensor, mask: Tensor, memory: dict[int, CachedKeysValues]
    ) -> None:
        """Concatenate a window to a layer's memory. (A rotary embedding leaves keys at position 0 as they are.)"""
        key, value, mask = key.to(self.mem_dtype), value.to(self.mem_dtype), mask[..., -1, :, None]
        if index in memory:
            existing = memory[index]
            assert existing.mask is not None
            key, value, mask = (
                torch.cat(pair, 2) for pair in ((existing.keys, key), (existing.values, value), (existing.mask, mask))
            )
        memory[index] = CachedKeysValues(key, value, mask)

    def _eager(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, memory: CachedKeysValues | None
    ) -> Tensor:
        scores, value = self._scores(query, key, mask), self._repeat_kv(value)
        if memory is not None:
            assert memory.mask is not None
            memory_scores = self._scores(query, memory.keys.to(query.dtype), memory.mask.squeeze(-1).unsqueeze(-2))
            scores = torch.cat([scores, memory_scores], -1)
            value = torch.cat([value, self._repeat_kv(memory.values.to(value.dtype))], 2)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value)

    def _scores(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(query, self._repeat_kv(key).transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = scores + mask
        return torch.max(scores, torch.tensor(LOWEST_SCORE, dtype=scores.dtype))

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, memory: CachedKeysValues | None) -> Tensor:
        if memory is not None:
            assert memory.mask is not None
            key = torch.cat([key, memory.keys.to(key.dtype)], 2)
            value = torch.cat([value, memory.values.to(value.dtype)], 2)
            memory_scores = memory.mask.squeeze(-1).unsqueeze(-2).expand(-1, -1, query.shape[2], -1)
            mask = torch.cat([mask, memory_scores], -1)
        return torch.nn.functional.scaled_dot_product_attention(
            query, self._repeat_kv(key), self._repeat_kv(value), attn_mask=mask
        )

    def _repeat_kv(self, tensor: Tensor) -> Tensor:
        """A key for each query head. (The published code knows no grouped queries; this is what plain code does.)"""
        return tensor if self.groups == 1 else tensor.repeat_interleave(self.groups, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, None] + rotate_half(x) * sin[:, None]

"""LongLLaMA in the plainest way: one dense softmax per token, over what the method says that token sees.

`Sight` says for each pair of tokens whether one sees the other locally or as memory, and at which position a token
stands; `logits` runs a stock LLaMA's weights under it. Slow, short, and sharing no code with the package.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


@dataclass
class Sight:
    """Who sees whom among the n real tokens of one row."""

    local: Tensor  # (n, n) bool
    memory: Tensor  # (n, n) bool
    position: Tensor  # (n,), of queries and keys in the local context
    memory_position: Tensor  # (n,), of queries to memory


def sight(prompt: int, more: int, context: int, last: int) -> Sight:
    """A prompt cut into windows, then `more` tokens one by one, with a sliding local context."""
    total = prompt + more
    window, position = [], []
    ahead = max(prompt - last, 0)
    for token in range(total):
        if token < ahead:
            window.append(token // context)
            position.append(token % context)
        else:
            window.append(ahead // context + 1)
            position.append(token - ahead)
    local = torch.zeros(total, total, dtype=torch.bool)
    memory = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(query + 1):
            near = window[key] == window[query] and query - key < context
            local[query, key], memory[query, key] = near, not near
    places = torch.tensor(position)
    return Sight(local, memory, places, places.clamp(max=context - 1))


def mounted_sight(documents: list[int], asked: int, context: int) -> Sight:
    """Documents of so many tokens, each read alone in windows, then tokens that see all of them as memory."""
    window, owner, position = [], [], []
    for number, length in enumerate([*documents, asked]):
        last = number == len(documents)
        window += [(number, 0 if last else token // context) for token in range(length)]
        position += [token if last else token % context for token in range(length)]
        owner += [number] * length
    total = len(owner)
    local = torch.zeros(total, total, dtype=torch.bool)
    memory = torch.zeros(total, total, dtype=torch.bool)
    for query in range(total):
        for key in range(query + 1):
            local[query, key] = window[query] == window[key]
            asks = owner[query] == len(documents)
            memory[query, key] = not local[query, key] and (asks or owner[query] == owner[key])
    places = torch.tensor(position)
    return Sight(local, memory, places, places.clamp(max=context - 1))


def rotated(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """(heads, n, d) turned to its position, pair (i, i + d/2) by position / theta^(2i/d)."""
    half = x.shape[-1] // 2
    angle = position[:, None].double() * theta ** (-torch.arange(half).double() / half)
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


@torch.no_grad()
def logits(
    model: LlamaForCausalLM,
    ids: Tensor,
    seen: Sight,
    mem_layers: list[int],
    positionals: bool = True,
    attention: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits (n, vocabulary) in float64 of one row's real tokens; each layer's probabilities go into `attention`."""
    config = model.config
    theta = config.rope_parameters["rope_theta"]
    weights = {name: value.double() for name, value in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name]

    def heads(x: Tensor, name: str) -> Tensor:
        return (x @ weights[name].T).view(len(ids), -1, config.head_dim).transpose(0, 1)

    hidden = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        x = norm(hidden, prefix + "input_layernorm.weight")
        own = layer in mem_layers and f"{prefix}self_attn.mem_q_proj.weight" in weights
        query, key, value = (heads(x, f"{prefix}self_attn.{name}_proj.weight") for name in "qkv")
        kind = "mem_" if own else ""
        far = [heads(x, f"{prefix}self_attn.{kind}{name}_proj.weight") for name in "qkv"]
        groups = len(query) // len(key)
        key, value, *far[1:] = (part.repeat_interleave(groups, 0) for part in (key, value, *far[1:]))
        turns = positionals or layer not in mem_layers
        near = [rotated(part, seen.position, theta) if turns else part for part in (query, key)]
        far_query = rotated(far[0], seen.memory_position, theta) if turns else far[0]
        score = near[0] @ near[1].transpose(1, 2)
        if layer in mem_layers:
            score = torch.where(seen.memory, far_query @ far[1].transpose(1, 2), score)
        visible = seen.local | seen.memory if layer in mem_layers else seen.local
        if layer in mem_layers and config.logn_attention_scale:
            counts = (seen.memory.sum(-1, keepdim=True) / config.logn_attention_start).clamp(min=1)
            score = score * (1 + config.logn_attention_scale * counts.log())
        score = score / math.sqrt(config.head_dim)
        if layer in mem_layers and config.memory_size_bias:
            counts = (seen.memory.sum(-1, keepdim=True) / config.memory_size_bias_start).clamp(min=1)
            score = torch.where(seen.memory & ~seen.local, score - config.memory_size_bias * counts.log(), score)
        score = score.masked_fill(~visible, -math.inf)
        if attention is not None:
            attention[layer] = score.softmax(-1)
        shares = score.softmax(-1)
        found = seen.memory & ~seen.local if layer in mem_layers else torch.zeros_like(seen.local)
        for part, kind, values in ((~found, "", value), (found, "mem_" if own else "", far[2])):
            mixed = ((shares * part) @ values).transpose(0, 1).reshape(len(ids), -1)
            hidden = hidden + mixed @ weights[f"{prefix}self_attn.{kind}o_proj.weight"].T
        x = norm(hidden, prefix + "post_attention_layernorm.weight")
        gate, up, down = (weights[f"{prefix}mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        hidden = hidden + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return norm(hidden, "model.norm.weight") @ weights["lm_head.weight"].T

"""LongLLaMA's configuration: Llama's, the published keys for memory, and ours."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from llamory.errors import LlamoryError
from llamory.memory.blocks import DTYPES
from llamory.memory.search import SEARCHES

DEFAULT_LAST_CONTEXT = 1024
OVERFLOWS = ("slide", "flush")
# Rotary embeddings whose frequencies depend on the input's length; memory holds windows of many lengths.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# Where they don't differ from `LlamaConfig`'s defaults.
_OPEN_LLAMA_3B: dict[str, Any] = {
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "mem_layers": [6, 12, 18],
}
_CODE_LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32016,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "mem_layers": [8, 16, 24],
}
PUBLISHED = {"longllama-3b": _OPEN_LLAMA_3B, "longllama-3b-v1.1": _OPEN_LLAMA_3B, "longllama-code-7b": _CODE_LLAMA_7B}

# Keys in configurations of earlier versions.
RENAMED_KEYS = {
    "mem_only_top_k": "mem_top_k_attention",
    "mem_log_scale": "logn_attention_scale",
    "mem_log_start": "logn_attention_start",
    "mem_log_bias": "memory_size_bias",
    "mem_log_bias_start": "memory_size_bias_start",
}


@strict
class LongLlamaConfig(LlamaConfig):
    """A `LlamaConfig` with memory. The context (the length of a window) is `max_position_embeddings`.

    Args:
        mem_layers: indices of the memory layers.
        mem_positionals: whether memory layers use the rotary embedding (memory keys are then at position 0).
        mem_projections: memory has its own projections `mem_q_proj` to `mem_o_proj`, initialized from the layer's own.
            Not in the paper.
        mem_dtype: dtype of memory: "float32", "bfloat16", "float16" or "int8" (one scale per token and head).
        mem_attention_grouping: (heads, queries) that attend to memory at once; None for no limit.
        torch_attention: published key without effect.
        gradient_checkpoint_every_ith: with gradient checkpointing, checkpoint every i-th layer.
        last_context_length: tokens of a prompt that stay in the local context; None for 1024, at most the context.
        local_cache_overflow: the local context evicts its oldest tokens one by one ("slide") or all tokens at once
            ("flush", as in the published code). Memory layers move evicted tokens to memory.
        mem_search: "exact", "pages" or "faiss".
        mem_top_k: pages or neighbors per query; None for the search's default.
        mem_top_k_attention: attend to the `mem_top_k` (by default 32) best tokens only, as the paper does at inference;
            for "exact" and "faiss".
        logn_attention_scale: s; scores of memory layers are multiplied by 1 + s · ln(n / n0) for n > n0 memory tokens
            (Chiang & Cholak 2022, arXiv:2202.12172; not in LongLLaMA's paper).
        logn_attention_start: n0.
        memory_size_bias: b; b · ln(n / n0) is subtracted from memory scores for n > n0 memory tokens. Not in the paper.
        memory_size_bias_start: n0.
        mem_device: device of memory; None for the device of its layer.

    Raises:
        LlamoryError: a value is out of range.
    """

    model_type = "longllama"

    mem_layers: list[int] | tuple[int, ...] = ()
    mem_positionals: bool = True
    mem_projections: bool = False
    mem_dtype: str = "bfloat16"
    mem_attention_grouping: list[int] | tuple[int, ...] | None = None
    torch_attention: bool = False
    gradient_checkpoint_every_ith: int = 1
    last_context_length: int | None = None
    local_cache_overflow: str = "slide"
    mem_search: str = "exact"
    mem_top_k: int | None = None
    mem_top_k_attention: bool = False
    logn_attention_scale: float = 0.0
    logn_attention_start: int = 8192
    memory_size_bias: float = 0.0
    memory_size_bias_start: int = 2048
    mem_device: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for old, new in RENAMED_KEYS.items():
            if old in kwargs:
                setattr(self, new, kwargs.pop(old))
        self.mem_layers = list(self.mem_layers)
        if self.last_context_length is None:
            self.last_context_length = min(DEFAULT_LAST_CONTEXT, self.max_position_embeddings)
        kwargs.pop("auto_map", None)  # published folders point to remote code, which this class replaces
        super().__post_init__(**kwargs)
        check_memory(self)
        # Registers the models with the Auto classes. Earlier, transformers itself may still be being imported.
        import_module("llamory.longllama.causal")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `PreTrainedConfig.get_config_dict`; the folder of a plain LLaMA is read as one of ours."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == LlamaConfig.model_type:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`, but changed values are set before defaults are derived from them."""
        config_dict = {RENAMED_KEYS.get(key, key): value for key, value in config_dict.items()}
        changed = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.__dataclass_fields__ and key != "dtype"}
        return super().from_dict({**config_dict, **changed}, **kwargs)

    @classmethod
    def published(cls, name: str, **overrides: Any) -> LongLlamaConfig:
        """The configuration of the published "longllama-3b", "longllama-3b-v1.1" or "longllama-code-7b"."""
        if name not in PUBLISHED:
            raise LlamoryError(f"Unknown published LongLLaMA {name}: choose one of {', '.join(PUBLISHED)}.")
        return cls(**PUBLISHED[name] | overrides)


def check_last_context(length: int, context: int) -> int:
    """Return `length`, or raise LlamoryError if the last window doesn't fit into the context."""
    if not 1 <= length <= context:
        raise LlamoryError(f"last_context_length is {length}, but it must be between 1 and the context, {context}.")
    return length


def check_projections(config: PretrainedConfig, name: str | os.PathLike[str], mem_layers: Sequence[int]) -> None:
    """Raise LlamoryError if `mem_layers` (if any) differ from the layers of model `name` with memory projections."""
    layers: Sequence[int] = getattr(config, "mem_layers", ())
    if getattr(config, "mem_projections", False) and mem_layers and set(mem_layers) != set(layers):
        raise LlamoryError(
            f"{name} has projections for the memory of layers {', '.join(map(str, layers))}; leave mem_layers out, or "
            "pass these."
        )


def check_memory(config: LongLlamaConfig) -> None:
    """Raise LlamoryError if a setting of memory is out of range; `from_pretrained` can change settings late."""
    layers, count = list(config.mem_layers), config.num_hidden_layers
    if invalid := [layer for layer in layers if not 0 <= layer < count]:
        raise LlamoryError(f"mem_layers names layer {invalid[0]}, but the model has {count} layers, from 0.")
    if len(set(layers)) != len(layers):
        raise LlamoryError(f"mem_layers names a layer twice: {layers}.")
    assert config.last_context_length is not None
    check_last_context(config.last_context_length, config.max_position_embeddings)
    for key, allowed in (("mem_dtype", tuple(DTYPES)), ("local_cache_overflow", OVERFLOWS), ("mem_search", SEARCHES)):
        if getattr(config, key) not in allowed:
            raise LlamoryError(f"{key} is {getattr(config, key)!r}, but it must be one of {', '.join(allowed)}.")
    grouping = config.mem_attention_grouping
    if grouping is not None and (len(grouping) != 2 or min(grouping) < 1):
        raise LlamoryError(f"mem_attention_grouping is {grouping}, but it must be two positive numbers.")
    if config.mem_top_k_attention and config.mem_search == "pages":
        raise LlamoryError("mem_top_k_attention needs mem_search exact or faiss; pages are read whole.")
    for name in ("mem_top_k", "gradient_checkpoint_every_ith"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise LlamoryError(f"{name} is {value}, but it must be at least 1.")
    starts = {"logn_attention_scale": "logn_attention_start", "memory_size_bias": "memory_size_bias_start"}
    for name, start in starts.items():
        value, first = getattr(config, name), getattr(config, start)
        if not 0 <= value < math.inf or first < 1:
            raise LlamoryError(f"{name} must be at least 0 and finite and {start} at least 1, not {value} and {first}.")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if config.mem_layers and rope_type in _LENGTH_DEPENDENT_ROPE:
        raise LlamoryError(f"rope_type is {rope_type}, but memory needs default, linear, llama3 or yarn.")


AutoConfig.register(LongLlamaConfig.model_type, LongLlamaConfig, exist_ok=True)

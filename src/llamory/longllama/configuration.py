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

_OPEN_LLAMA_3B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 3200,
    "intermediate_size": 8640,
    "num_hidden_layers": 26,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "mem_layers": [6, 12, 18],
}
_CODE_LLAMA_7B: dict[str, Any] = {
    "vocab_size": 32016,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
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
        mem_layers: indices of the memory layers; without any, the model is a plain LLaMA up to its context.
        mem_positionals: whether memory layers use the rotary embedding (memory keys are then at position 0).
        mem_projections: whether memory has its own projections (`mem_q_proj`, `mem_k_proj`, `mem_v_proj`,
            `mem_o_proj`), initialized from the layer's own. Training only these leaves the model without memory
            unchanged. Not in the paper.
        mem_dtype: dtype of memory: "float32", "bfloat16", "float16" or "int8" (one scale per token and head).
        mem_attention_grouping: (heads, queries) that attend to memory at once; None for no limit.
        torch_attention: published key without effect; attention always uses a fused kernel.
        gradient_checkpoint_every_ith: with gradient checkpointing, checkpoint every i-th layer.
        last_context_length: tokens of a prompt that stay in the local context; None for 1024, or the context if that is
            shorter.
        local_cache_overflow: "slide" evicts the oldest local tokens one by one, "flush" all of them at once, as in the
            published code. Memory layers move evicted tokens to memory.
        mem_search: "exact", "pages" or "faiss".
        mem_top_k: pages or neighbors per query; None for the search's default.
        mem_top_k_attention: attend to the `mem_top_k` best tokens only (32 by default), as the paper does at inference,
            instead of estimating the rest; for "exact" and "faiss".
        logn_attention_scale: multiply the scores of memory layers by 1 + scale · ln(n / `logn_attention_start`) for
            n > `logn_attention_start` memory tokens (Chiang & Cholak 2022, arXiv:2202.12172; not in LongLLaMA's paper).
            0 to disable.
        logn_attention_start: memory tokens up to which scores are not scaled.
        memory_size_bias: subtract bias · ln(n / `memory_size_bias_start`) from memory scores for
            n > `memory_size_bias_start` memory tokens. With 1, memory as a whole weighs as much as
            `memory_size_bias_start` tokens. Not in the paper. 0 to disable.
        memory_size_bias_start: memory tokens up to which nothing is subtracted.
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
        # Published folders point to remote code, which this class replaces.
        kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        check_memory(self)
        # This registers the models with the Auto classes, which create a configuration first. Registering them any
        # earlier would import Llama while transformers itself is being imported.
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
        """The configuration of a published checkpoint: "longllama-3b", "longllama-3b-v1.1" or "longllama-code-7b".

        Raises:
            LlamoryError: the name is unknown.
        """
        if name not in PUBLISHED:
            raise LlamoryError(f"Unknown published LongLLaMA {name}: choose one of {', '.join(PUBLISHED)}.")
        return cls(**PUBLISHED[name] | overrides)


def check_last_context(length: int, context: int) -> int:
    """Return `length`, or raise LlamoryError if the last window doesn't fit into the context."""
    if not 1 <= length <= context:
        raise LlamoryError(
            f"last_context_length is {length}, but it must be between 1 and the context, {context} tokens "
            "(max_position_embeddings)."
        )
    return length


def check_projections(config: PretrainedConfig, name: str | os.PathLike[str], mem_layers: Sequence[int]) -> None:
    """Raise LlamoryError if `mem_layers` (if any) differ from the layers that have projections for memory.

    Args:
        config: of the model.
        name: of the model, for the error.
        mem_layers: the requested memory layers; empty for the model's own.
    """
    if not getattr(config, "mem_projections", False) or not mem_layers:
        return
    config_layers: list[int] = config.mem_layers  # type: ignore[attr-defined]
    if set(mem_layers) != set(config_layers):
        layers = ", ".join(map(str, config_layers))
        raise LlamoryError(
            f"{name} has projections for the memory of layers {layers}; leave mem_layers out, or pass these."
        )


def check_memory(config: LongLlamaConfig) -> None:
    """Raise LlamoryError if a setting of memory is out of range; `from_pretrained` can change settings late."""
    _check_layers(list(config.mem_layers), config.num_hidden_layers)
    assert config.last_context_length is not None
    check_last_context(config.last_context_length, config.max_position_embeddings)
    for key, allowed in (("mem_dtype", tuple(DTYPES)), ("local_cache_overflow", OVERFLOWS), ("mem_search", SEARCHES)):
        if getattr(config, key) not in allowed:
            raise LlamoryError(f"{key} is {getattr(config, key)!r}, but it must be one of {', '.join(allowed)}.")
    grouping = config.mem_attention_grouping
    if grouping is not None and (len(grouping) != 2 or min(grouping) < 1):
        raise LlamoryError(
            f"mem_attention_grouping is {grouping}, but it must be two positive numbers, heads and queries."
        )
    if config.mem_top_k_attention and config.mem_search == "pages":
        raise LlamoryError("mem_top_k_attention needs mem_search exact or faiss; pages are read whole.")
    if config.mem_top_k is not None and config.mem_top_k < 1:
        raise LlamoryError(f"mem_top_k is {config.mem_top_k}, but it must be at least 1.")
    for name, start in (
        ("logn_attention_scale", "logn_attention_start"),
        ("memory_size_bias", "memory_size_bias_start"),
    ):
        value, first = getattr(config, name), getattr(config, start)
        if not 0 <= value < math.inf or first < 1:
            raise LlamoryError(f"{name} must be at least 0 and finite and {start} at least 1, not {value} and {first}.")
    if config.gradient_checkpoint_every_ith < 1:
        raise LlamoryError(
            f"gradient_checkpoint_every_ith is {config.gradient_checkpoint_every_ith}, but it must be at least 1."
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if config.mem_layers and rope_type in _LENGTH_DEPENDENT_ROPE:
        raise LlamoryError(
            f"Memory needs rotary embeddings that don't depend on the input's length, but rope_type is {rope_type}; "
            "choose default, linear, llama3 or yarn."
        )


def _check_layers(layers: list[int], count: int) -> None:
    invalid = [layer for layer in layers if not 0 <= layer < count]
    if invalid:
        raise LlamoryError(
            f"mem_layers names layer {invalid[0]}, but the model has {count} layers, numbered 0 to {count - 1}."
        )
    if len(set(layers)) != len(layers):
        raise LlamoryError(f"mem_layers names a layer twice: {layers}.")


AutoConfig.register(LongLlamaConfig.model_type, LongLlamaConfig, exist_ok=True)

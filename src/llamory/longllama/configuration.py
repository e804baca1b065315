"""LongLLaMA's configuration: Llama's, with the published keys of memory and ours."""

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
# Rotary embeddings whose frequencies change with the length seen; memory mixes windows, so they have no one length.
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
PUBLISHED = {
    "longllama-3b": _OPEN_LLAMA_3B,
    "longllama-3b-v1.1": _OPEN_LLAMA_3B,
    "longllama-code-7b": _CODE_LLAMA_7B,
}

# Keys of configurations that earlier versions wrote.
RENAMED_KEYS = {
    "mem_only_top_k": "mem_top_k_attention",
    "mem_log_scale": "logn_attention_scale",
    "mem_log_start": "logn_attention_start",
    "mem_log_bias": "memory_size_bias",
    "mem_log_bias_start": "memory_size_bias_start",
}


@strict
class LongLlamaConfig(LlamaConfig):
    """A `LlamaConfig` with memory.

    The context, that is the length of a window, is `max_position_embeddings`.

    Args:
        mem_layers: indices of the layers with memory; with none the model is a plain LLaMA up to its context.
        mem_positionals: whether memory layers use the rotary embedding (memory keys are then at position 0).
        mem_projections: whether memory layers have projections of their own for memory (`mem_q_proj`, `mem_k_proj`,
            `mem_v_proj`, `mem_o_proj`), which start as the layer's where a checkpoint has none. Training these alone
            changes nothing of what is read without memory (not in LongLLaMA's paper, whose layers have one kind).
        mem_dtype: how memory is kept: "float32", "bfloat16", "float16" or "int8" (one scale per token and head).
        mem_attention_grouping: (heads, queries), at most so many attend to memory at once; None for no limit.
        torch_attention: published key, kept for its files; attention is always a fused kernel here.
        gradient_checkpoint_every_ith: with gradient checkpointing, every i-th layer is checkpointed.
        last_context_length: tokens of a prompt that stay in the local context, at most the context; None for 1024, or
            the context where it is shorter.
        local_cache_overflow: "slide", the oldest local entries leave one by one, or "flush", all of them at once as in
            the published code. In memory layers they go to memory.
        mem_search: how memory is searched: "exact", "pages" or "faiss".
        mem_top_k: pages, or neighbours, that each query reads (None for the way's own default).
        mem_top_k_attention: leave out what isn't among the `mem_top_k` best tokens of memory (32 if not given), as the
            paper's inference does, instead of estimating it ("exact" or "faiss").
        logn_attention_scale: in memory layers, scores are multiplied by 1 + `logn_attention_scale` · ln(memory / `logn_attention_start`)
            once memory has more tokens than `logn_attention_start`, so that the right key isn't drowned by the number of
            others (log-n scaling: Chiang & Cholak 2022, arXiv:2202.12172; not in LongLLaMA's paper). 0 for never.
        logn_attention_start: tokens of memory up to which scores stay as they are.
        memory_size_bias: from scores of memory `memory_size_bias` · ln(memory / `memory_size_bias_start`) is taken off once memory
            has more tokens than `memory_size_bias_start`. With 1 all of memory weighs as much as that many of its tokens,
            so that what stands near isn't drowned by what is far (not in LongLLaMA's paper). 0 for never.
        memory_size_bias_start: tokens of memory up to which nothing is taken off.
        mem_device: where memory is kept; None for where its layer is.

    Raises:
        LlamoryError: a value isn't possible.
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
        # The Auto classes learn of the models here: whoever asks them for one has a configuration first, and earlier,
        # while transformers itself is being imported, the models couldn't be.
        import_module("llamory.longllama.causal")

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `PreTrainedConfig.get_config_dict`; a plain LLaMA's folder is taken for one of ours, which it can be."""
        config_dict, kwargs = super().get_config_dict(*args, **kwargs)
        if config_dict.get("model_type") == LlamaConfig.model_type:
            config_dict["model_type"] = cls.model_type
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As `PreTrainedConfig.from_dict`, but changed values are there before defaults are worked out from them."""
        changed = {key: kwargs.pop(key) for key in list(kwargs) if key in cls.__dataclass_fields__ and key != "dtype"}
        return super().from_dict({**config_dict, **changed}, **kwargs)

    @classmethod
    def published(cls, name: str, **overrides: Any) -> LongLlamaConfig:
        """The configuration of a published checkpoint: "longllama-3b", "longllama-3b-v1.1" or "longllama-code-7b".

        Raises:
            LlamoryError: there is no such name.
        """
        if name not in PUBLISHED:
            raise LlamoryError(f"No published LongLLaMA is called {name}: choose one of {', '.join(PUBLISHED)}.")
        return cls(**PUBLISHED[name] | overrides)


def check_last_context(length: int, context: int) -> int:
    """Check that the last window fits into the context.

    Raises:
        LlamoryError: it doesn't.
    """
    if not 1 <= length <= context:
        raise LlamoryError(
            f"last_context_length is {length}, but it must be between 1 and the context, {context} tokens "
            "(max_position_embeddings)."
        )
    return length


def check_projections(config: PretrainedConfig, name: str | os.PathLike[str], mem_layers: Sequence[int]) -> None:
    """Check that a model which has projections for memory is given memory where it has them.

    Args:
        config: the model's own.
        name: the model's, for what is told.
        mem_layers: the layers that are asked for; none for the model's own.

    Raises:
        LlamoryError: other layers.
    """
    if not getattr(config, "mem_projections", False) or not mem_layers:
        return
    config_layers: list[int] = config.mem_layers  # type: ignore[attr-defined]
    if set(mem_layers) != set(config_layers):
        layers = ", ".join(map(str, config_layers))
        raise LlamoryError(
            f"{name} has projections for the memory of layers {layers}; leave mem_layers out, or give these."
        )


def check_memory(config: LongLlamaConfig) -> None:
    """Check all that concerns memory; `from_pretrained` may have changed single values since the config was made.

    Raises:
        LlamoryError: a value isn't possible.
    """
    _check_layers(list(config.mem_layers), config.num_hidden_layers)
    assert config.last_context_length is not None
    check_last_context(config.last_context_length, config.max_position_embeddings)
    for key, allowed in (
        ("mem_dtype", tuple(DTYPES)),
        ("local_cache_overflow", OVERFLOWS),
        ("mem_search", SEARCHES),
    ):
        if getattr(config, key) not in allowed:
            raise LlamoryError(f"{key} is {getattr(config, key)!r}, but it must be one of {', '.join(allowed)}.")
    grouping = config.mem_attention_grouping
    if grouping is not None and (len(grouping) != 2 or min(grouping) < 1):
        raise LlamoryError(
            f"mem_attention_grouping is {grouping}, but it must be two positive numbers, heads and queries."
        )
    if config.mem_top_k_attention and config.mem_search == "pages":
        raise LlamoryError("mem_top_k_attention needs mem_search exact or faiss, as pages are read whole.")
    if config.mem_top_k is not None and config.mem_top_k < 1:
        raise LlamoryError(f"mem_top_k is {config.mem_top_k}, but it must be at least 1.")
    for name in ("logn_attention_scale", "memory_size_bias"):
        start = {"logn_attention_scale": "logn_attention_start"}.get(name) or f"{name}_start"
        value, first = getattr(config, name), getattr(config, start)
        if not 0 <= value < math.inf or first < 1:
            raise LlamoryError(f"{name} must be a number from 0 on and {start} at least 1, not {value} and {first}.")
    if config.gradient_checkpoint_every_ith < 1:
        raise LlamoryError(
            f"gradient_checkpoint_every_ith is {config.gradient_checkpoint_every_ith}, but it must be at least 1."
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if config.mem_layers and rope_type in _LENGTH_DEPENDENT_ROPE:
        raise LlamoryError(
            f"Memory needs rotary embeddings that don't change with the length, but this model's are of the type "
            f"{rope_type}; set rope_parameters to the type default, linear, llama3 or yarn."
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

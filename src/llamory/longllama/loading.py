"""Load any LLaMA with memory in some of its layers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llamory.errors import LlamoryError
from llamory.longllama.causal import LongLlamaForCausalLM
from llamory.longllama.configuration import LongLlamaConfig, check_projections
from llamory.models import base as backbone
from llamory.models.adapters import load_shared

# A model that wasn't trained for memory retrieves best with memory in all layers but the first few and with windows
# well below its context (SmolLM2-135M: layers 5 to 29 of 30, 512 tokens).
DEFAULT_WINDOW = 512
_MEMORY_FREE_DIVISOR = 6
DEFAULT_READER = "reader"  # the packaged adapter that "default" refers to


def resolve_reader_name(name: str | os.PathLike[str]) -> str:
    """The name of a reader for `models.base`: "default" is the packaged adapter."""
    packaged = backbone.packaged_name(name)
    if packaged is not None:
        return backbone.unshadowed_name(DEFAULT_READER) if packaged == "default" else packaged
    return name if isinstance(name, str) else os.path.abspath(name)  # noqa: PTH100


# Settings of `LongLlamaConfig` that `load_long_model` takes under their own names.
_CONFIG_SETTINGS = (
    "mem_projections last_context_length mem_search mem_top_k mem_top_k_attention logn_attention_scale "
    "logn_attention_start memory_size_bias memory_size_bias_start mem_dtype"
).split()


def load_long_model(
    name: str | Path = "default",
    *,
    mem_layers: Sequence[int] | None = None,
    context_length: int | None = None,
    dtype: Any = None,
    device: str | None = None,
    shared: bool = False,
    **kwargs: Any,
) -> LongLlamaForCausalLM:
    """Load a LongLLaMA, or any LLaMA with memory in some of its layers, in evaluation mode.

    Args:
        name: a folder, a hub id, a `.gguf` file, an adapter's folder, "default" or "reader" for SmolLM2-135M with the
            packaged adapter for answers from memory, or "base" for plain SmolLM2-135M.
        mem_layers: memory layers; by default the checkpoint's, or for a plain LLaMA all but the first sixth.
        context_length: tokens of a window; by default the context of a LongLLaMA, and at most 512 for a plain LLaMA.
        dtype: of the weights.
        device: where the model goes.
        shared: in float32, share the base model's weights with other models loaded so (`models.adapters`).
        kwargs: settings of memory of `LongLlamaConfig` (None for the default); others are for `from_pretrained`.

    Raises:
        LlamoryError: the model can't be loaded, or a setting isn't possible for it.
    """
    name = resolve_reader_name(name)
    config = backbone.load_config(name)
    check_projections(config, name, mem_layers or ())
    settings: dict[str, Any] = {
        "mem_layers": list(mem_layers) if mem_layers is not None else None,
        "max_position_embeddings": context_length,
        **{key: kwargs.pop(key, None) for key in _CONFIG_SETTINGS},
    }
    if not isinstance(config, LongLlamaConfig):
        count = config.num_hidden_layers
        if mem_layers is None:
            settings["mem_layers"] = list(range(count // _MEMORY_FREE_DIVISOR, count))
        if context_length is None:
            settings["max_position_embeddings"] = min(DEFAULT_WINDOW, config.max_position_embeddings)
    elif backbone.adapter_folder(name) is not None:
        # The model is loaded with the base model's configuration, which has no memory settings.
        last = settings.pop("last_context_length")
        settings = {key: getattr(config, key) if value is None else value for key, value in settings.items()}
        settings["last_context_length"] = last
    settings = {key: value for key, value in settings.items() if value is not None}
    window = settings.get("max_position_embeddings")
    if window is not None and not 1 <= window <= config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise LlamoryError(f"context_length is {window}, but must be between 1 and the model's context, {limit}.")
    if window is not None and isinstance(config, LongLlamaConfig):
        # A shorter window alone also shortens the last window.
        settings.setdefault("last_context_length", min(window, config.last_context_length or window))
    if dtype is None and backbone.adapter_folder(name) is None:
        dtype = config.dtype
    if shared and dtype in (None, "float32", torch.float32):
        model = load_shared(name, LongLlamaForCausalLM, device=device, **settings, **kwargs)
    else:
        model = backbone.load_model(name, LongLlamaForCausalLM, dtype=dtype, **settings, **kwargs)
    assert isinstance(model, LongLlamaForCausalLM)
    return (model.to(device) if device else model).eval()

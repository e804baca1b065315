"""Models with memory layers for training, and which of their weights are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PretrainedConfig

from llamory.errors import LlamoryError
from llamory.longllama.attention import PROJECTIONS
from llamory.longllama.causal import LongLlamaForCausalLM
from llamory.longllama.configuration import LongLlamaConfig, check_projections
from llamory.models import base as backbone
from llamory.training.run import with_lora
from llamory.training.settings import AdaptSettings, MemorySettings

_MEMORY_SIZE_KEYS = ("logn_attention_scale", "logn_attention_start", "memory_size_bias", "memory_size_bias_start")


def memory_config_overrides(
    settings: MemorySettings, config: PretrainedConfig, row_length: int, last_context_length: int | None = None
) -> dict[str, Any]:
    """Changes to the model's configuration: its memory layers, and the row length as its context.

    Raises LlamoryError if the model has no such layers, projections for other ones, or a shorter context.
    """
    name, layers = settings.model, settings.mem_layers
    if row_length > config.max_position_embeddings:
        maximum = config.max_position_embeddings
        raise LlamoryError(f"row_length {row_length} is longer than the context of {name}, {maximum} tokens.")
    check_projections(config, name, layers)
    layers = list(layers or getattr(config, "mem_layers", [])) or _default_mem_layers(config.num_hidden_layers)
    last = last_context_length or getattr(config, "last_context_length", None)
    config_overrides: dict[str, Any] = {"mem_layers": layers, "max_position_embeddings": row_length}
    projections = settings.trainable == "memory_projections" or getattr(config, "mem_projections", False)
    config_overrides["mem_projections"] = projections
    # Settings of an adapter, which its base model does not have.
    config_overrides |= {key: getattr(config, key) for key in _MEMORY_SIZE_KEYS if hasattr(config, key)}
    if settings.memory_size_bias is not None:
        config_overrides["memory_size_bias"] = settings.memory_size_bias
    if last is not None:
        config_overrides["last_context_length"] = min(last, row_length)
    LongLlamaConfig.from_dict(config.to_dict(), **config_overrides)
    if not layers:
        raise LlamoryError(f"{name} has too few layers for default memory layers; set mem_layers.")
    return config_overrides


def _default_mem_layers(count: int) -> list[int]:
    """Three layers at the quarters of the model: 6, 12, 18 of 26 and 8, 16, 24 of 32, as published."""
    step = max(1, count // 4)
    return [layer for layer in (step, 2 * step, 3 * step) if layer < count]


def load_trainable(settings: MemorySettings, config_overrides: Mapping[str, Any]) -> Any:
    """Load the model in float32 with changes to its configuration; adapters are added or other weights frozen."""
    attention = settings.attn_implementation
    model = backbone.load_model(
        settings.model, LongLlamaForCausalLM, dtype=torch.float32, attn_implementation=attention, **config_overrides
    )
    return select_trainable(model, settings, settings.trainable)


def select_trainable(model: Any, settings: AdaptSettings, trainable: str) -> Any:
    """Add adapters to the model, or freeze the weights that aren't trained; see `MemorySettings.trainable`."""
    if settings.lora:
        only: dict[str, Any] = {}
        if trainable != "all":
            only["layers_to_transform"] = list(model.config.mem_layers)
        if trainable == "memory_projections":
            only["target_modules"] = [f"mem_{name}" for name in PROJECTIONS if name in settings.lora_targets]
        adapted = with_lora(model, settings, **only)
        if (folder := backbone.adapter_folder(settings.model)) is not None:
            # peft would name the base model of that adapter, as if the adapter did not exist.
            name = backbone.packaged_name(settings.model) or str(folder.absolute())
            adapted.peft_config["default"].base_model_name_or_path = name
        return adapted
    if trainable != "all":
        model.requires_grad_(False)
        for layer in model.config.mem_layers:
            attention = model.model.layers[layer].self_attn
            for name, module in attention.named_children():
                module.requires_grad_(trainable == "memory_layers" or name.startswith("mem_"))
    return model

"""The models of runs that train memory: which layers have it, and which weights are trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig

from llamory.errors import LlamoryError
from llamory.longllama.causal import LongLlamaForCausalLM
from llamory.longllama.configuration import LongLlamaConfig, check_projections
from llamory.longllama.projections import PROJECTIONS
from llamory.models import base as backbone
from llamory.training.run import with_lora
from llamory.training.settings import AdaptSettings

_LOG = ("mem_log_scale", "mem_log_start", "mem_log_bias", "mem_log_bias_start")


def memory_changes(
    config: PretrainedConfig,
    name: str,
    *,
    mem_layers: Sequence[int],
    row_length: int,
    last_context_length: int | None = None,
    mem_projections: bool = False,
    mem_log_bias: float | None = None,
) -> dict[str, Any]:
    """What a model's configuration becomes: its memory layers, and rows as its context.

    Args:
        config: the model's own.
        name: the model's, for what is told.
        mem_layers: layers with memory; the model's own if empty, for a plain LLaMA three of them.
        row_length: tokens of a row.
        last_context_length: tokens of the last window; the model's own, within a row, if not given.
        mem_projections: whether memory is to have projections of its own; it keeps those that it has.
        mem_log_bias: see `LongLlamaConfig`; the model's own if not given.

    Raises:
        LlamoryError: the model has no such layers, projections for the memory of others, or a shorter context.
    """
    if row_length > config.max_position_embeddings:
        raise LlamoryError(
            f"Rows of {row_length} tokens are longer than the context of {name}, {config.max_position_embeddings} "
            "tokens; choose a smaller row_length."
        )
    check_projections(config, name, mem_layers)
    layers = list(mem_layers) or list(getattr(config, "mem_layers", ())) or _spread(config.num_hidden_layers)
    last = last_context_length or getattr(config, "last_context_length", None)
    changes: dict[str, Any] = {"mem_layers": layers, "max_position_embeddings": row_length}
    changes["mem_projections"] = mem_projections or getattr(config, "mem_projections", False)
    # An adapter's settings, of which the model below it knows nothing.
    changes |= {name: getattr(config, name) for name in _LOG if hasattr(config, name)}
    changes |= {} if mem_log_bias is None else {"mem_log_bias": mem_log_bias}
    if last is not None:
        changes["last_context_length"] = min(last, row_length)
    LongLlamaConfig.from_dict(config.to_dict(), **changes)
    if not layers:
        raise LlamoryError(f"{name} has too few layers for a default; give mem_layers.")
    return changes


def _spread(count: int) -> list[int]:
    """Three layers, a quarter of the model apart: 6, 12, 18 of 26 and 8, 16, 24 of 32, as published."""
    step = max(1, count // 4)
    return [layer for layer in (step, 2 * step, 3 * step) if layer < count]


def load_long(settings: AdaptSettings, changes: Mapping[str, Any]) -> LongLlamaForCausalLM:
    """The model in float32, with a changed configuration.

    Raises:
        LlamoryError: as `backbone.load_model`.
    """
    model = backbone.load_model(
        settings.model,
        LongLlamaForCausalLM,
        dtype=torch.float32,
        attn_implementation=settings.attn_implementation,
        **changes,
    )
    assert isinstance(model, LongLlamaForCausalLM)
    return model


def trained_part(model: LongLlamaForCausalLM, settings: AdaptSettings, trained: str) -> Any:
    """The model with adapters, or with those weights frozen that aren't trained.

    Args:
        model: the whole.
        settings: of the run.
        trained: "all", "memory_layers" or "memory_projections", which the model must have then.

    Raises:
        LlamoryError: adapters that don't fit the model.
    """
    if settings.lora:
        only: dict[str, Any] = {}
        if trained != "all":
            only["layers_to_transform"] = list(model.config.mem_layers)
        if trained == "memory_projections":
            only["target_modules"] = [f"mem_{name}" for name in PROJECTIONS if name in settings.lora_targets]
        adapted = with_lora(model, settings, **only)
        if (below := backbone.adapter_folder(settings.model)) is not None:
            # peft takes the name of the model below that one, as if there were no other adapter.
            adapted.peft_config["default"].base_model_name_or_path = (
                settings.model if settings.model in backbone.PACKAGED else str(below.absolute())
            )
        return adapted
    if trained != "all":
        model.requires_grad_(False)
        for layer in model.config.mem_layers:
            attention = model.model.layers[layer].self_attn
            for name, module in attention.named_children():
                module.requires_grad_(trained == "memory_layers" or name.startswith("mem_"))
    return model

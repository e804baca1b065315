"""What a memory refuses, and the sentences that say why."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llamory.errors import LlamoryError

_NAMES_SHOWN = 10


def check_name(name: str) -> None:
    """A segment needs a name."""
    if not isinstance(name, str) or not name:
        raise LlamoryError(f"A segment's name must be a text that isn't empty, not {name!r}.")


def check_tensors(keys: Tensor, values: Tensor, kv_heads: int, head_dim: int) -> None:
    """Keys and values must be (kv_heads, tokens, head_dim), of the same tokens, and floating numbers."""
    for name, tensor in (("Keys", keys), ("Values", values)):
        if tensor.dim() != 3 or tensor.shape[0] != kv_heads or tensor.shape[2] != head_dim:
            raise LlamoryError(
                f"{name} for this memory must be ({kv_heads} key/value heads, tokens, {head_dim}), "
                f"not {tuple(tensor.shape)}."
            )
        if not tensor.is_floating_point():
            raise LlamoryError(f"{name} for a memory must be floating numbers, not {dtype_name(tensor.dtype)}.")
    if keys.shape[1] != values.shape[1]:
        raise LlamoryError(f"Keys and values must be of the same tokens, not of {keys.shape[1]} and {values.shape[1]}.")


def check_fingerprint(what: str, actual: str, expected: str | None) -> None:
    """A memory must be of the model that uses it; where either isn't known, nothing can be said."""
    if actual and expected and actual != expected:
        raise LlamoryError(
            f"{what} was made by another model (fingerprint {actual}, not {expected}): "
            "use that model, or read the documents again with this model."
        )


def check_layers(what: str, actual: Sequence[int], expected: Sequence[int]) -> None:
    """A memory must be of the memory layers of the model that uses it."""
    if tuple(actual) != tuple(expected):
        raise LlamoryError(
            f"{what} is of the memory layers {format_layers(actual)}, not {format_layers(expected)}: "
            "use a model with those memory layers, or read the documents again with this model."
        )


def check_dtype(what: str, actual: torch.dtype, expected: torch.dtype) -> None:
    """Memories of different types aren't mixed."""
    if actual != expected:
        raise LlamoryError(
            f"{what} is kept as {dtype_name(actual)}, not as {dtype_name(expected)}: "
            f"use mem_dtype {dtype_name(actual)}, or read the documents again."
        )


def check_heads(what: str, actual: tuple[int, int], expected: tuple[int, int]) -> None:
    """A memory must have the model's key/value heads."""
    if actual != expected:
        raise LlamoryError(
            f"{what} has {actual[0]} key/value heads of size {actual[1]}, not {expected[0]} of size {expected[1]}: "
            "it is of another model."
        )


def format_layers(layers: Iterable[int]) -> str:
    """Layers, as a sentence lists them."""
    return ", ".join(map(str, layers)) or "none"


def format_names(names: Sequence[str]) -> str:
    """Segments, as a sentence lists them."""
    listed = ", ".join(map(repr, names[:_NAMES_SHOWN]))
    return f"{listed} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else listed or "none"


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")

"""A model's fingerprint: what a memory is marked with, so that no other model reads it."""

from __future__ import annotations

import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
import xxhash
from torch import nn

from llamory.models.adapters import merged

_CACHE: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()
_CHUNK_ELEMENTS = 1 << 22


def fingerprint(model: nn.Module) -> str:
    """The fingerprint of a LongLLaMA model: of its weights, as bfloat16, and of how it makes memory keys.

    Loading the same weights as float32 or as bfloat16 gives the same fingerprint; an adapter gives another one, the
    same one whether it is merged into the weights or beside them. The weights are read once, and again only if they
    have changed.
    """
    versions = tuple((name, parameter.data_ptr(), parameter._version) for name, parameter in model.named_parameters())
    config: Any = model.config
    key_settings = [
        config.mem_positionals,
        config.rope_parameters,
        list(config.mem_layers),
        config.max_position_embeddings,
    ]
    state = (versions, json.dumps(key_settings, default=str))
    cached = _CACHE.get(model)
    if cached is not None and cached[0] == state:
        return cached[1]
    digest = xxhash.xxh3_128(json.dumps(key_settings, default=str, sort_keys=True).encode())
    # A tied head has a name of its own only where it is offloaded, which mustn't make another model of this one.
    tied = getattr(model, "all_tied_weights_keys", {})
    # Shared ones count under each of their names, as models whose weights aren't shared have them.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    named = [(name, parameter) for name, parameter in parameters.items() if name not in tied]
    for name, make in sorted(merged(model, named), key=lambda item: item[0]):
        parameter = make()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        for start in range(0, len(flat), _CHUNK_ELEMENTS):
            part = flat[start : start + _CHUNK_ELEMENTS].to(torch.bfloat16).view(torch.int16).cpu()
            digest.update(part.numpy().tobytes())
    _CACHE[model] = (state, digest.hexdigest())
    return digest.hexdigest()

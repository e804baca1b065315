"""One base model in RAM for all of its adapters: finding and reading have the same weights, and take no turns.

A merged adapter is a whole model of its parameter_name. Here the base model's tensors are those that other models of the same base
already have, and each model's low-rank matrices stay beside them, so that two models take the room of one and there is
nothing to switch. What they compute is what the merged models compute, up to float32's rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from llamory.errors import LlamoryError
from llamory.models import base as backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Parameters of loaded base models, by all that they must have in common: the model's name, their parameter_name, type, device,
# shape and version, as a parameter that was changed or moved since isn't the base model's any more.
_SHARED_PARAMETERS: WeakValueDictionary[tuple[Any, ...], nn.Parameter] = WeakValueDictionary()
# Of peft's files.
_PEFT_PREFIX = "base_model.model."
_EMBEDDING_ROWS_SUFFIX = "token_adapter.trainable_tokens_delta"


def load_shared(
    name: str | Path, model_class: type[PreTrainedModel] | None = None, *, device: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a model in float32 with the very weights that others of the same base have that were loaded like this.

    It can't be trained or moved, as the others would change with it.

    Args:
        name: an adapter, or a base model; as for `llamory.models.base.resolve`.
        model_class: as for `llamory.models.base.load_model`.
        device: where the weights are; by default the CPU.
        kwargs: as for `llamory.models.base.load_model`.

    Raises:
        LlamoryError: there is no such model, or the adapter isn't one of low rank.
    """
    adapter = backbone.adapter_folder(name)
    source: str | Path = name if adapter is None else backbone.base_model_name(adapter)
    if backbone.adapter_folder(source) is None:
        source = backbone.resolve(source)
    model = backbone.load_model(source, model_class, dtype=torch.float32, **kwargs)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    _share_parameters(model, str(source))
    if adapter is not None:
        _inject_adapter(model, adapter)
    return model.requires_grad_(False).eval()


def merged(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """What a model would have with its adapters merged: names, and what makes the tensors one at a time.

    Args:
        model: with adapters of `load_shared` or peft's, or without any.
        tensors: its `named_parameters`, or the items of its `state_dict`.
    """
    special = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExtendedEmbedding) or hasattr(module, "lora_A")
    }
    special_prefixes = tuple(f"{name}." for name in special)
    for name, tensor in tensors:
        if not name.startswith(special_prefixes):
            yield name, lambda name=name, tensor=tensor: _materialize(model, name, tensor)  # type: ignore[misc]
    for name, module in special.items():
        parameter_name = ["weight"] if isinstance(module, ExtendedEmbedding) else dict(_base(module).named_parameters())
        for part in parameter_name:
            yield f"{name}.{part}", lambda module=module, part=part: _merged_parameter(module, part)  # type: ignore[misc]


class ExtendedEmbedding(nn.Module):
    """An embedding whose first rows belong to another one.

    Args:
        base: the embedding of the ids below its size.
        rows: (further ids, dimension)
    """

    def __init__(self, base: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.base = base
        self.rows = nn.Parameter(rows, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """(all ids, dimension), made anew."""
        return torch.cat([self.base.weight, self.rows])

    def forward(self, ids: Tensor) -> Tensor:
        """As `nn.Embedding`."""
        size = self.base.num_embeddings
        known = self.base(ids.clamp(max=size - 1))
        return torch.where((ids >= size)[..., None], self.rows[(ids - size).clamp(min=0)], known)


def _base(layer: Any) -> nn.Module:
    base: nn.Module = layer.get_base_layer()
    return base


def _merged_parameter(module: nn.Module, part: str) -> Tensor:
    if isinstance(module, ExtendedEmbedding):
        return module.weight
    hooks = [each._hf_hook for each in module.modules() if hasattr(each, "_hf_hook")]  # they know whole models
    layer: Any = copy.deepcopy(module, {id(hook): hook for hook in hooks})  # the weight below is others' too
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            module_path, _, parameter_name = name.rpartition(".")
            values = _materialize(module, name, parameter).clone()
            setattr(layer.get_submodule(module_path), parameter_name, nn.Parameter(values, requires_grad=False))
    if not layer.merged:
        layer.merge()
    return _base(layer).get_parameter(part)


def _materialize(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A model's tensor, from where accelerate keeps it if it is offloaded: there is none in the model then."""
    module_path, _, parameter_name = name.rpartition(".")
    hook = getattr(model.get_submodule(module_path), "_hf_hook", None) if tensor.is_meta else None
    offloaded: Tensor = tensor if hook is None else hook.weights_map[parameter_name]
    return offloaded


def _share_parameters(model: nn.Module, source: str) -> None:
    """Put the parameters of the same base model in module_path of a model's parameter_name, or keep these for those who come later."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        key = _key(source, name, parameter)
        shared_parameter = _SHARED_PARAMETERS.get(key)
        if shared_parameter is not None and _key(source, name, shared_parameter) == key:
            module_path, _, parameter_name = name.rpartition(".")
            setattr(model.get_submodule(module_path), parameter_name, shared_parameter)
        else:
            _SHARED_PARAMETERS[key] = parameter
    # Projections for memory start as the layer's parameter_name, and a base model has no others.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        like = parameters.get(name.replace(".mem_", "."))
        if like is not None and like is not parameter and torch.equal(like, parameter):
            module_path, _, parameter_name = name.rpartition(".")
            setattr(model.get_submodule(module_path), parameter_name, like)


def _key(source: str, name: str, parameter: nn.Parameter) -> tuple[Any, ...]:
    return source, name, parameter.dtype, parameter.device, parameter.shape, parameter._version


def _inject_adapter(model: PreTrainedModel, adapter: Path) -> None:
    """Put an adapter's matrices beside the weights, and its further embedding rows behind them."""
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        raise LlamoryError(f"The adapter {adapter} isn't one of low rank; load it merged.")
    adapter_config = backbone.load_config(adapter)
    if backbone.is_memory_only_adapter(adapter_config, model.config):
        return
    trainable_tokens, config.trainable_token_indices = config.trainable_token_indices or {}, None
    inject_adapter_in_model(config, model)
    state, rows = {}, None
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        parameter_name = name.removeprefix(_PEFT_PREFIX)
        if parameter_name.endswith(_EMBEDDING_ROWS_SUFFIX):
            rows = tensor.float()
        else:
            module_path, _, last = parameter_name.rpartition(".")
            state[f"{module_path}.default.{last}"] = tensor.float()
    if unknown := model.load_state_dict(state, strict=False).unexpected_keys:
        raise LlamoryError(f"The adapter {adapter} has weights that its model doesn't: {unknown[0]}.")
    if rows is not None:
        embedding: Any = model.get_input_embeddings()
        size = embedding.num_embeddings
        if list(trainable_tokens.values()) != [list(range(size, size + len(rows)))]:
            raise LlamoryError(f"The adapter {adapter} changes embeddings of its base model; load it merged.")
        extended: Any = ExtendedEmbedding(embedding, rows.to(embedding.weight.device))
        model.set_input_embeddings(extended)
        model.config.vocab_size = size + len(rows)
    backbone.merge_adapter_config(model.config, adapter_config)

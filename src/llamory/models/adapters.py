"""Models of one base model share its weights in RAM; each has only its low-rank matrices beside them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from llamory.common.io import PathLike
from llamory.errors import LlamoryError
from llamory.models import base as backbone

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# By `_key`, which has the version: a parameter that was changed since it was loaded is no longer the base model's.
_SHARED_PARAMETERS: WeakValueDictionary[tuple[Any, ...], nn.Parameter] = WeakValueDictionary()
_PEFT_PREFIX = "base_model.model."
_EMBEDDING_ROWS_SUFFIX = "token_adapter.trainable_tokens_delta"


def load_shared(
    name: PathLike, model_class: type[PreTrainedModel] | None = None, *, device: str | None = None, **kwargs: Any
) -> PreTrainedModel:
    """Load a model in float32 that shares the weights of its base model with others loaded by this function.

    Don't train it or move it to another device: the other models would change too. Arguments as for `base.load_model`.
    Raises LlamoryError if there is no such model, or the adapter isn't a LoRA adapter.
    """
    adapter = backbone.adapter_folder(name)
    source: PathLike = name if adapter is None else backbone.base_model_name(adapter)
    if backbone.adapter_folder(source) is None:
        source = backbone.resolve(source)
    model = backbone.load_model(source, model_class, **kwargs | {"dtype": torch.float32})
    if device is not None:
        model.to(device)  # type: ignore[arg-type]
    _share_parameters(model, str(source))
    if adapter is not None:
        _inject_adapter(model, adapter)
    return model.requires_grad_(False).eval()


def merged(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Names of a model's tensors as they are with its adapters merged, each with a function that computes the tensor.

    `tensors` are the model's `named_parameters`, or the items of its `state_dict`.
    """
    adapted: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ExtendedEmbedding) or hasattr(module, "lora_A")
    }
    prefixes = tuple(f"{name}." for name in adapted)
    for name, tensor in tensors:
        if not name.startswith(prefixes):
            yield name, partial(_materialize, model, name, tensor)
    for name, module in adapted.items():
        is_embedding = isinstance(module, ExtendedEmbedding)
        for parameter in ["weight"] if is_embedding else dict(module.get_base_layer().named_parameters()):
            yield f"{name}.{parameter}", partial(_merged_parameter, module, parameter)


class ExtendedEmbedding(nn.Module):
    """An embedding with further rows, (further ids, dimension), behind those of another one."""

    def __init__(self, base: nn.Embedding, rows: Tensor) -> None:
        super().__init__()
        self.base = base
        self.rows = nn.Parameter(rows, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        """(all ids, dimension), a new tensor."""
        return torch.cat([self.base.weight, self.rows])

    def forward(self, ids: Tensor) -> Tensor:
        """As `nn.Embedding`."""
        size = self.base.num_embeddings
        base_rows = self.base(ids.clamp(max=size - 1))
        return torch.where((ids >= size)[..., None], self.rows[(ids - size).clamp(min=0)], base_rows)


def _merged_parameter(module: nn.Module, parameter_name: str) -> Tensor:
    if isinstance(module, ExtendedEmbedding):
        return module.weight
    hooks = [each._hf_hook for each in module.modules() if hasattr(each, "_hf_hook")]  # they refer to whole models
    layer: Any = copy.deepcopy(module, {id(hook): hook for hook in hooks})  # the weight may be shared
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            _set_parameter(layer, name, nn.Parameter(_materialize(module, name, parameter).clone(), False))
    if not layer.merged:
        layer.merge()
    return layer.get_base_layer().get_parameter(parameter_name)


def _materialize(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """A model's tensor; if accelerate offloaded it, from accelerate's copy."""
    module_path, _, parameter_name = name.rpartition(".")
    hook = getattr(model.get_submodule(module_path), "_hf_hook", None) if tensor.is_meta else None
    return tensor if hook is None else hook.weights_map[parameter_name]


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    module_path, _, parameter_name = name.rpartition(".")
    setattr(model.get_submodule(module_path), parameter_name, parameter)


def _share_parameters(model: nn.Module, source: str) -> None:
    """Replace a model's parameters by those of other models of its base, and register the rest."""
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        key = _key(source, name, parameter)
        shared = _SHARED_PARAMETERS.get(key)
        if shared is not None and _key(source, name, shared) == key:
            _set_parameter(model, name, shared)
        else:
            _SHARED_PARAMETERS[key] = parameter
    # Projections for memory that equal the layer's projections, as in a base model, share these.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in parameters.items():
        projection = parameters.get(name.replace(".mem_", "."))
        if projection is not None and projection is not parameter and torch.equal(projection, parameter):
            _set_parameter(model, name, projection)


def _key(source: str, name: str, parameter: nn.Parameter) -> tuple[Any, ...]:
    return source, name, parameter.dtype, parameter.device, parameter.shape, parameter._version


def _inject_adapter(model: PreTrainedModel, adapter: Path) -> None:
    """Add an adapter's low-rank matrices to the layers, and its further embedding rows to the embedding."""
    from peft import LoraConfig, PeftConfig, inject_adapter_in_model
    from safetensors.torch import load_file

    config = PeftConfig.from_pretrained(str(adapter))
    if not isinstance(config, LoraConfig):
        raise LlamoryError(f"The adapter {adapter} isn't a LoRA adapter; load it merged.")
    adapter_config = backbone.load_config(adapter)
    if backbone.is_memory_only_adapter(adapter_config, model.config):
        return
    trainable_tokens, config.trainable_token_indices = config.trainable_token_indices or {}, None
    inject_adapter_in_model(config, model)
    state, rows = {}, None
    for name, tensor in load_file(adapter / "adapter_model.safetensors").items():
        if name.endswith(_EMBEDDING_ROWS_SUFFIX):
            rows = tensor.float()
        else:
            module_path, _, last = name.removeprefix(_PEFT_PREFIX).rpartition(".")
            state[f"{module_path}.default.{last}"] = tensor.float()
    if unknown := model.load_state_dict(state, strict=False).unexpected_keys:
        raise LlamoryError(f"The adapter {adapter} has weights that its base model lacks, such as {unknown[0]}.")
    if rows is not None:
        embedding: Any = model.get_input_embeddings()
        size = embedding.num_embeddings
        if list(trainable_tokens.values()) != [list(range(size, size + len(rows)))]:
            raise LlamoryError(f"The adapter {adapter} changes embeddings of its base model; load it merged.")
        extended: Any = ExtendedEmbedding(embedding, rows.to(embedding.weight.device))
        model.set_input_embeddings(extended)
        model.config.vocab_size = size + len(rows)
    if hasattr(adapter_config, "llara"):
        model.config.llara = adapter_config.llara

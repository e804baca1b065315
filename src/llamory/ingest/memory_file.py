"""Memory files of documents: the header, and loading the model that made them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.io import PathLike
from llamory.errors import LlamoryError
from llamory.memory import read_header
from llamory.models import base

if TYPE_CHECKING:
    from llamory.longllama import LongLlamaForCausalLM

_CHECKPOINT_SUFFIX = ".partial"


class MemoryFileInfo:
    """Header of a memory file.

    Args:
        path: the file.

    Attributes:
        path: as given.
        model: name of the model that made it (folders and files as absolute paths); None if unknown.
        context_length: window length, in tokens; None if unknown.
        layers, dtype, fingerprint: the memory's.
        segments: `name`, `tokens` and `metadata` of each document, in order.

    Raises:
        LlamoryError: the file doesn't exist, or isn't a complete memory file.
    """

    def __init__(self, path: PathLike):
        self.path = path
        if not Path(path).exists() and checkpoint_path(path).exists():
            raise LlamoryError(
                f"The memory {path} isn't finished: {checkpoint_path(path)} holds the work of a stopped run; read "
                "the same documents again to resume it."
            )
        self.header: dict[str, Any] = read_header(path)
        self.segments: list[dict[str, Any]] = self.header["segments"]
        self.layers: list[int] = self.header["layers"]
        self.dtype: str = self.header["dtype"]
        self.fingerprint: str = self.header["fingerprint"]
        recorded = self._recorded_value("model")
        # Before there was a packaged reader, "default" was the model as it is.
        model = "base" if recorded == "default" else recorded
        self.model: str | None = model and base.unshadowed_name(model)
        self.context_length: int | None = self._recorded_value("context_length")

    def _recorded_value(self, key: str) -> Any:
        return next((each["metadata"][key] for each in self.segments if key in each["metadata"]), None)

    def summary(self) -> dict[str, Any]:
        """All information as JSON-serializable values; `bytes` is the file size."""
        documents = []
        for segment in self.segments:
            metadata = {key: segment["metadata"][key] for key in ("title", "source") if key in segment["metadata"]}
            documents.append({"name": segment["name"], "tokens": segment["tokens"], **metadata})
        return {
            "memory": str(self.path),
            "model": self.model,
            "context_length": self.context_length,
            "mem_layers": self.layers,
            "mem_dtype": self.dtype,
            "fingerprint": self.fingerprint,
            "tokens": self.header["tokens"],
            "bytes": self.header["bytes"],
            "documents": documents,
        }


def checkpoint_path(path: PathLike) -> Path:
    """Path of the checkpoint of an ingest run."""
    path = Path(path)
    return path.with_name(f"{path.name}{_CHECKPOINT_SUFFIX}")


def canonical_name(name: PathLike) -> str:
    """A reader's name as files record it: `llamory.models.base.canonical_name`, with "default" as "reader"."""
    from llamory.longllama.loading import resolve_reader_name

    return base.canonical_name(resolve_reader_name(name))


def load_model_for(
    memory_files: Sequence[MemoryFileInfo],
    name: PathLike | None = None,
    *,
    mem_layers: Sequence[int] | None = None,
    context_length: int | None = None,
    mem_dtype: str | None = None,
    bf16: bool = False,
    device: str | None = None,
    **settings: Any,
) -> LongLlamaForCausalLM:
    """Load the model that made memory files; settings that aren't given are those of the files.

    Args:
        memory_files: headers of the files; none for a new memory.
        name: the model; by default the recorded one, or "default".
        mem_layers, context_length, mem_dtype: as for `load_long_model`.
        bf16: compute in bfloat16.
        device: torch device; by default an accelerator if there is one.
        settings: as for `load_long_model`.

    Raises:
        LlamoryError: the model can't be loaded, or another one made a memory file.
    """
    import torch

    from llamory.longllama.loading import load_long_model, resolve_reader_name
    from llamory.models.device import pick_device

    memory_file = memory_files[0] if memory_files else None
    if memory_file is not None:
        if name is None and memory_file.model is None:
            raise LlamoryError(f"The memory file {memory_file.path} doesn't record its model; give the model too.")
        _check_settings(memory_file, mem_layers, context_length, mem_dtype)
        mem_layers, mem_dtype = memory_file.layers, memory_file.dtype
        context_length = memory_file.context_length or context_length
    model_name = resolve_reader_name(name or (memory_file and memory_file.model) or "default")
    for each in memory_files:
        check_model_shape(each, model_name)
    model = load_long_model(
        model_name,
        mem_layers=mem_layers,
        context_length=context_length,
        mem_dtype=mem_dtype,
        dtype=torch.bfloat16 if bf16 else None,
        device=pick_device(device),
        **settings,
    )
    if not model.config.mem_layers:
        raise LlamoryError(f"The model {model_name} has no memory layers; set mem_layers.")
    check_model_matches(memory_files, model, model_name)
    return model


def check_model_matches(memory_files: Sequence[MemoryFileInfo], model: LongLlamaForCausalLM, name: str) -> None:
    """Check that a model made these memory files.

    Raises:
        LlamoryError: it didn't, or with other memory layers or another window length.
    """
    config = model.config
    for memory_file in memory_files:
        _check_settings(memory_file, config.mem_layers, config.max_position_embeddings, None)
        if memory_file.fingerprint not in ("", model.memory_fingerprint()):
            raise _model_mismatch(memory_file, name)


def check_model_shape(memory_file: MemoryFileInfo, name: str) -> None:
    """Check, before the weights are loaded, that a model of this shape can have made the memory file.

    Raises:
        LlamoryError: it can't, or there is no such model.
    """
    from llamory.models.base import load_config

    config: Any
    try:
        config = load_config(name)
    except LlamoryError as error:
        if name == memory_file.model and name not in base.PACKAGED_MODELS:
            raise LlamoryError(
                f"The model that made {memory_file.path} isn't where it was ({str(error).rstrip('.')}); "
                "name its new place."
            ) from error
        raise
    shape = (config.num_key_value_heads, config.head_dim)
    too_deep = max(memory_file.layers, default=0) >= config.num_hidden_layers
    if too_deep or shape != (memory_file.header["kv_heads"], memory_file.header["head_dim"]):
        raise _model_mismatch(memory_file, name)


def _model_mismatch(memory_file: MemoryFileInfo, name: str) -> LlamoryError:
    made_by = "" if memory_file.model is None else f", {memory_file.model} as it was then"
    return LlamoryError(
        f"The memory file {memory_file.path} was made by another model than {name}{made_by}: use the model "
        f"that made it, or {_alternative_advice(memory_file)}."
    )


def _check_settings(
    memory_file: MemoryFileInfo, mem_layers: Sequence[int] | None, context_length: int | None, mem_dtype: str | None
) -> None:
    for setting, requested, recorded in (
        ("memory layers", None if mem_layers is None else sorted(mem_layers), sorted(memory_file.layers)),
        ("a context of", context_length, memory_file.context_length),
        ("the dtype", mem_dtype, memory_file.dtype),
    ):
        if requested is not None and recorded is not None and requested != recorded:
            recorded_text, requested_text = (
                ", ".join(map(str, each)) if isinstance(each, list) else each for each in (recorded, requested)
            )
            raise LlamoryError(
                f"The memory file {memory_file.path} was made with {setting} {recorded_text}, not {requested_text}: "
                f"use the same, or {_alternative_advice(memory_file)}."
            )


def _alternative_advice(memory_file: MemoryFileInfo) -> str:
    if Path(memory_file.path).suffix == _CHECKPOINT_SUFFIX:
        return "remove that file to begin anew"
    return "read the documents into a new memory"

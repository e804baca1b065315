"""`llamory train`: one command per training recipe, with a flag for each of its settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import typer

from llamory.cli.settings import add_settings_command
from llamory.common.extras import require
from llamory.training.settings import FotSettings, InstructSettings, LlaraSettings, LookupSettings, RetrieverSettings

app = typer.Typer(help="Train a model.", rich_markup_mode="rich")

# Command: settings, module and function of the recipe, help.
COMMANDS: dict[str, tuple[type, str, str]] = {
    "llara": (
        LlaraSettings,
        "llamory.training.llara:train_llara",
        "Train a LLaMA to embed texts, without labels (LLARA).",
    ),
    "retriever": (
        RetrieverSettings,
        "llamory.training.retriever:train_retriever",
        "Train a LLARA model, or any LLaMA, on pairs of queries and documents.",
    ),
    "fot": (
        FotSettings,
        "llamory.training.fot.train:train_fot",
        "Train a LLaMA to attend to a memory of earlier text (Focused Transformer, LongLLaMA).",
    ),
    "instruct": (
        InstructSettings,
        "llamory.training.instruct.train:train_instruct",
        "Tune a LLaMA with memory to follow instructions and to chat.",
    ),
    "lookup": (
        LookupSettings,
        "llamory.training.lookup:train_lookup",
        "Train a small model from scratch on dictionary look-up.",
    ),
}


def _runner(target: str) -> Callable[[Any], Mapping[str, Any]]:
    module, _, function = target.partition(":")

    def run(settings: Any) -> Mapping[str, Any]:
        require("train")
        result: Mapping[str, Any] = getattr(import_module(module), function)(settings)
        return result

    return run


for _name, (_settings, _target, _help) in COMMANDS.items():
    add_settings_command(app, _name, _settings, _runner(_target), help=_help)

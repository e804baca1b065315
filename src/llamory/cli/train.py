"""`llamory train`: one command per training recipe, its flags taken from the recipe's settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from llamory.cli.options import add_dataclass_command
from llamory.common.extras import require
from llamory.training.settings import FotSettings, InstructSettings, LlaraSettings, LookupSettings, RetrieverSettings

app = typer.Typer(help="Train a model with one of the recipes.", rich_markup_mode=None)


@app.callback()
def _train() -> None:
    pass


def _llara(settings: LlaraSettings) -> Mapping[str, Any]:
    require("train")
    from llamory.training.llara import train_llara

    return train_llara(settings)


def _retriever(settings: RetrieverSettings) -> Mapping[str, Any]:
    require("train")
    from llamory.training.retriever import train_retriever

    return train_retriever(settings)


def _fot(settings: FotSettings) -> Mapping[str, Any]:
    require("train")
    from llamory.training.fot.train import train_fot

    return train_fot(settings)


def _instruct(settings: InstructSettings) -> Mapping[str, Any]:
    require("train")
    from llamory.training.instruct.train import train_instruct

    return train_instruct(settings)


def _lookup(settings: LookupSettings) -> Mapping[str, Any]:
    require("train")
    from llamory.training.lookup import train_lookup

    return train_lookup(settings)


add_dataclass_command(
    app, "llara", LlaraSettings, _llara, help="Train a LLaMA, without labels, to embed texts (LLARA)."
)
add_dataclass_command(
    app, "retriever", RetrieverSettings, _retriever, help="Train a LLARA model, or any LLaMA, on queries and documents."
)
add_dataclass_command(
    app,
    "fot",
    FotSettings,
    _fot,
    help="Train a LLaMA to use a memory of what it read (FoT, LongLLaMA).",
)
add_dataclass_command(
    app,
    "instruct",
    InstructSettings,
    _instruct,
    help="Tune a LLaMA with memory to follow instructions and to chat.",
)
add_dataclass_command(
    app, "lookup", LookupSettings, _lookup, help="Train a small model from scratch on dictionary look-up."
)

"""`llamory train`, one command per training recipe with a flag for each of its settings, and `llamory export`."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from llamory.cli import options
from llamory.cli.options import Option
from llamory.cli.output import print_result, stdout_redirected
from llamory.cli.settings import add_settings_command
from llamory.common.extras import require
from llamory.training.settings import FotSettings, InstructSettings, LlaraSettings, LookupSettings, RetrieverSettings

app = typer.Typer(help="Train a model.", rich_markup_mode="rich")

# Command: settings, module of the recipe, help.
COMMANDS: dict[str, tuple[type, str, str]] = {
    "llara": (LlaraSettings, "llara", "Train a LLaMA to embed texts, without labels (LLARA)."),
    "retriever": (
        RetrieverSettings,
        "retriever",
        "Train a LLARA model, or any LLaMA, on pairs of queries and documents.",
    ),
    "fot": (FotSettings, "fot.train", "Train a LLaMA to attend to a memory of earlier text (Focused Transformer)."),
    "instruct": (InstructSettings, "instruct.train", "Tune a LLaMA with memory to follow instructions and to chat."),
    "lookup": (LookupSettings, "lookup", "Train a small model from scratch on dictionary look-up."),
}


def _train(name: str, module: str, settings: Any) -> Any:
    require("train")
    return getattr(import_module(f"llamory.training.{module}"), f"train_{name}")(settings)


for _name, (_settings, _module, _help) in COMMANDS.items():
    add_settings_command(app, _name, _settings, partial(_train, _name, _module), help=_help)


def export(
    model: Annotated[
        str, typer.Argument(parser=options.name, help="A model of `llamory train llara`: folder or hub id.")
    ],
    output: Annotated[Path, Option("Folder to write.")],
    max_length: Annotated[int, Option("Largest number of tokens of a text with its prompt.")] = 512,
    query_prompt: options.QueryPrompt = None,
    whiten: Annotated[
        list[Path] | None, Option("Fit whitening on these files and folders; take some that will be searched.")
    ] = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Write a trained model as a Sentence Transformers folder."""
    with stdout_redirected(quiet=quiet):
        from llamory.embedding.pipeline import export_sentence_transformer, sample_passages
        from llamory.models.device import pick_device

        texts = sample_passages(model, whiten, max_length=max_length) if whiten else []
        settings: dict[str, Any] = {"max_length": max_length, "query_prompt": query_prompt, "whitening_texts": texts}
        export_sentence_transformer(model, output, device=pick_device(device), **settings)
    result = {"model": model, "output": str(output), "max_length": max_length}
    print_result(result | ({"whitened_on": len(texts)} if whiten else {}), as_json=as_json)

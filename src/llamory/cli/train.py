"""`llamory train`, one command per training recipe with a flag for each of its settings, and `llamory export`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def export(
    model: Annotated[
        str, typer.Argument(parser=options.name, help="A model trained with `llamory train llara`: folder or hub id.")
    ],
    output: Annotated[Path, Option("Folder to write.", metavar="DIR")],
    max_length: Annotated[int, Option("Largest number of tokens of a text with its prompt.")] = 512,
    query_prompt: options.QueryPrompt = None,
    whiten: Annotated[
        list[Path] | None,
        Option(
            "Fit whitening on these files and folders instead of keeping the model's; take some that will be "
            "searched (repeatable).",
            metavar="DOCUMENTS",
        ),
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

"""`llamory export`: writes a trained model as a Sentence Transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamory.cli.output import Json, Quiet, print_result, working


def export(
    model: Annotated[str, typer.Argument(help="A model trained with `llamory train llara`: its folder or hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    max_length: Annotated[int, typer.Option(help="Tokens that a text may have, with its prompt.")] = 512,
    query_prompt: Annotated[
        str | None,
        typer.Option(help="Prompt that queries get: prediction or summary; by default what the model says."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a trained model as a Sentence Transformers folder."""
    with working(quiet=quiet):
        from llamory.llara.retriever import export_sentence_transformer

        export_sentence_transformer(model, output, max_length=max_length, query_prompt=query_prompt)
    print_result({"model": model, "output": str(output), "max_length": max_length}, as_json=as_json)

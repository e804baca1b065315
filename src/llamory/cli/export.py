"""`llamory export`: writes a trained model as a Sentence Transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llamory.cli.output import Json, Quiet, print_result, stdout_redirected


def export(
    model: Annotated[str, typer.Argument(help="A model trained with `llamory train llara`: its folder or hub id.")],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    max_length: Annotated[int, typer.Option(help="Tokens that a text may have, with its prompt.")] = 512,
    query_prompt: Annotated[
        str | None,
        typer.Option(help="Prompt that queries get: prediction or summary; by default what the model says."),
    ] = None,
    whiten: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DOCUMENTS",
            help="Fit whitening on these files and folders, such as those that will be searched, instead of what the "
            "model has; repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a trained model as a Sentence Transformers folder."""
    with stdout_redirected(quiet=quiet):
        from llamory.embedding.pipeline import export_sentence_transformer, sample_passages

        texts = sample_passages(model, whiten, max_length=max_length) if whiten else []
        export_sentence_transformer(
            model, output, max_length=max_length, query_prompt=query_prompt, whitening_texts=texts
        )
    result = {"model": model, "output": str(output), "max_length": max_length}
    print_result(result | ({"whitened_on": len(texts)} if whiten else {}), as_json=as_json)

"""`llamory export`: writes a trained model as a Sentence Transformers folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from llamory.cli import options
from llamory.cli.options import integer, option
from llamory.cli.output import print_result, stdout_redirected


def export(
    model: Annotated[
        str, typer.Argument(parser=options.name, help="A model trained with `llamory train llara`: folder or hub id.")
    ],
    output: Annotated[Path, option("--output", options.path, "Folder to write.", metavar="DIR")],
    max_length: Annotated[
        int, option("--max-length", integer(), "Largest number of tokens of a text with its prompt.")
    ] = 512,
    query_prompt: Annotated[
        Literal["prediction", "summary"] | None,
        option("--query-prompt", None, "Prompt for queries; the one recorded in the model if not given."),
    ] = None,
    whiten: Annotated[
        list[Path] | None,
        option(
            "--whiten",
            options.path,
            "Fit whitening on these files and folders instead of keeping the model's; take some that will be "
            "searched (repeatable).",
            metavar="DOCUMENTS",
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
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

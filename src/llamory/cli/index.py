"""`llamory index`: reads files into a library."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from llamory.cli.output import Json, Quiet, print_json, working


def index(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders to read.")],
    library: Annotated[str, typer.Option(help="Folder (or object-store address) of the library; made if need be.")],
    model: Annotated[str | None, typer.Option(help="Embedding model of a new library.", show_default=False)] = None,
    passage_length: Annotated[
        int | None, typer.Option(min=1, help="Longest passage, in tokens.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field that holds the text in JSONL files.")] = "text",
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Pass over broken lines and files.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="Embed in bfloat16: faster, a little less exact.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read files into a library, or bring it up to date with them."""
    with working(quiet=quiet):
        from llamory.library import Library

        report = Library(library, model=model, bf16=bf16).add(
            paths, passage_length=passage_length, text_field=text_field, skip_broken=skip_broken
        )
    if as_json:
        print_json({"library": library, **asdict(report)})
    else:
        typer.echo(
            f"{library}: {report.added} added, {report.updated} updated, {report.unchanged} unchanged, "
            f"{report.removed} removed; {report.passages} passages."
        )

"""`llamory index`: reads files into a library."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamory.cli import asking_options as options
from llamory.cli.memory_options import show_size
from llamory.cli.output import Json, Quiet, print_json, working

if TYPE_CHECKING:
    from llamory.library.ahead import MemoryReport


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
    memory: Annotated[
        Literal["lazy", "eager"], typer.Option(help="Read documents into memory when they are asked, or now.")
    ] = "lazy",
    reader: options.ReaderName = None,
    mem_layers: options.MemLayers = None,
    context_length: options.ContextLength = None,
    mem_dtype: options.MemDtype = None,
    memory_budget: options.Budget = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read files into a library, or bring it up to date with them."""
    with working(quiet=quiet):
        from llamory.library import Library

        reading = options.reading_settings(locals())
        opened = Library(library, model=model, bf16=bf16, **reading)
        report = opened.add(paths, passage_length=passage_length, text_field=text_field, skip_broken=skip_broken)
        read = opened.read_ahead() if memory == "eager" else None
        if read is None and reading:
            opened.desk().note_reader(change=True)
    if as_json:
        print_json({"library": library, **asdict(report)} | ({} if read is None else {"memory": asdict(read)}))
    else:
        typer.echo(
            f"{library}: {report.added} added, {report.updated} updated, {report.unchanged} unchanged, "
            f"{report.removed} removed; {report.passages} passages."
        )
        if read is not None:
            _print_memory(read)


def _print_memory(read: MemoryReport) -> None:
    left = f", {read.left} left as the budget is full" if read.left else ""
    typer.echo(
        f"Memory: {read.read} read, {read.there} there{left}; {read.tokens:,} tokens read; "
        f"{show_size(read.bytes)} of {show_size(read.budget)} taken."
    )

"""`llamory index`: adds files to a library, updates them, and removes them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamory.cli import options
from llamory.cli.options import ADVANCED, READER, Option, explicit, number
from llamory.cli.output import print_json, print_skipped, show_size, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.library import AddReport
    from llamory.library.prefill import MemoryReport


def index(
    paths: options.Documents,
    library: Annotated[str, Option("Library: a folder or an object-store address; created if it does not exist.")],
    reader: options.ReaderOptions,
    model: Annotated[str | None, Option("Embedding model of a new library; the packaged one if not given.")] = None,
    device: options.Device = None,
    remove: Annotated[bool, Option("Remove the paths from the library instead.")] = False,
    chunk_size: Annotated[int | None, Option("Largest number of tokens of a passage.")] = None,
    text_field: options.TextField = "text",
    max_file_size: Annotated[
        float, Option("Skip and list larger files and JSON lines; inf is no limit.", None, number(infinite=True), "MIB")
    ] = 64.0,
    strict: Annotated[bool, Option("Stop at the first file that can't be read.")] = False,
    allow_empty: Annotated[bool, Option("Remove the documents of empty folders, which otherwise stay.")] = False,
    precompute_memory: Annotated[bool, Option("Encode documents into memory now, not when asked.", READER)] = False,
    wait: Annotated[bool, Option("Wait while another process writes.", ADVANCED, flag="--wait/--no-wait")] = True,
    engine: Annotated[Literal["local", "ray"], Option("Work in this process or on Ray.", ADVANCED)] = "local",
    ray_address: Annotated[
        str | None, Option("Ray cluster; one is started here if not given.", ADVANCED, metavar="HOST:PORT")
    ] = None,
    bf16: options.Bf16 = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Add files to a library, update what has changed, or remove files with --remove.

    Only new and changed files are embedded. Files that can't be read are listed at the end.
    """
    with stdout_redirected(quiet=quiet):
        from llamory.library import Library
        from llamory.library.store import PassageStore

        reader_settings = explicit(reader)
        if model is None and not remove and PassageStore.open(library) is None:
            model = "default"
        opened = Library(library, model=model, bf16=bf16, device=device, **reader_settings)
        if remove:
            report = opened.remove(paths, wait=wait)
        else:
            report = opened.add(
                paths,
                chunk_size=chunk_size,
                text_field=text_field,
                max_file_size=max_file_size,
                strict=strict,
                allow_empty=allow_empty,
                wait=wait,
                engine=engine,
                ray_address=ray_address,
            )
        memories = None
        if precompute_memory and not remove and len(opened):
            memories = opened.precompute_memory(engine=engine, ray_address=ray_address)
        elif reader_settings and len(opened):
            opened.qa_source().save_reader_config(change=True)
    if as_json:
        document = {"library": library, **dataclasses.asdict(report)}
        print_json(document | ({} if memories is None else {"memory": dataclasses.asdict(memories)}))
    else:
        _print_report(library, report)
        if memories is not None:
            _print_memory(memories)
    if report.failed and not (report.documents or report.removed):
        raise LlamoryError("Nothing could be indexed; correct what is listed, or give other files.")


def _print_report(library: str, report: AddReport) -> None:
    typer.echo(
        f"{library}: {report.added} added, {report.updated} updated, {report.unchanged} unchanged, "
        f"{report.removed} removed; {report.passages} passages."
    )
    print_skipped("could not be read", report.failed)
    print_skipped("skipped", report.skipped)


def _print_memory(report: MemoryReport) -> None:
    remaining = f", {report.remaining} left because the budget is full" if report.remaining else ""
    typer.echo(
        f"Memory: {report.read} read, {report.existing} existing{remaining}; {report.tokens:,} tokens read; "
        f"{show_size(report.bytes)} of {show_size(report.budget)} used."
    )

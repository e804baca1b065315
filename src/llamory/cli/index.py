"""`llamory index`: reads files into a library, and takes them out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamory.cli import ask_options as options
from llamory.cli.memory_options import show_size
from llamory.cli.output import Json, Quiet, print_json, printable, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.documents import SkippedFile
    from llamory.library import AddReport
    from llamory.library.prefill import MemoryReport

_MAX_LISTED = 20


def index(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders to read.")],
    library: Annotated[str, typer.Option(help="Folder (or object-store address) of the library; made if need be.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Embedding model of a new library.  [default: default, the packaged one]", show_default=False
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the paths out of the library instead.")] = False,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Longest passage, in tokens.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field that holds the text in JSONL files.")] = "text",
    max_file_size: Annotated[
        float | None,
        typer.Option(help="MiB; larger files, and longer JSON lines, are passed over and listed. [default: 64]"),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first file that can't be read.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait while another process writes to the library.")
    ] = True,
    bf16: Annotated[bool, typer.Option("--bf16", help="Embed in bfloat16: faster, a little less exact.")] = False,
    engine: Annotated[
        Literal["local", "ray"], typer.Option(help="Work in this process, or on the workers of a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Ray cluster; by default one is started on this machine.", show_default=False)
    ] = None,
    memory: Annotated[
        Literal["lazy", "eager"], typer.Option(help="Read documents into memory when they are asked, or now.")
    ] = "lazy",
    reader: options.ReaderName = None,
    mem_layers: options.MemLayers = None,
    context_length: options.ContextLength = None,
    mem_dtype: options.MemDtype = None,
    memory_budget: options.MemoryBudget = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read files into a library, or bring it up to date with them; or take them out with --remove.

    Only what is new or changed is embedded. What can't be read is listed at the end, and the rest goes in.
    """
    with stdout_redirected(quiet=quiet):
        from llamory.library import Library
        from llamory.library.store import PassageStore

        reading = options.reader_options(locals())
        if model is None and not remove and PassageStore.open(library) is None:
            model = "default"
        opened_library = Library(library, model=model, bf16=bf16, **reading)
        if remove:
            report = opened_library.remove(paths, wait=wait)
        else:
            sizes: dict[str, Any] = {} if max_file_size is None else {"max_file_size": max_file_size}
            report = opened_library.add(
                paths,
                chunk_size=chunk_size,
                text_field=text_field,
                strict=strict,
                wait=wait,
                engine=engine,
                ray_address=ray_address,
                **sizes,
            )
        ahead = memory == "eager" and not remove and len(opened_library)
        read = opened_library.precompute_memory(engine=engine, ray_address=ray_address) if ahead else None
        if read is None and reading and len(opened_library):
            opened_library.qa_session().save_reader_config(change=True)
    if as_json:
        print_json({"library": library, **asdict(report)} | ({} if read is None else {"memory": asdict(read)}))
    else:
        _print_report(library, report)
        if read is not None:
            _print_memory(read)
    if report.failed and not (report.documents or report.removed):
        raise LlamoryError("Nothing could be indexed; mend what is listed, or give other files.")


def _print_report(library: str, report: AddReport) -> None:
    typer.echo(
        f"{library}: {report.added} added, {report.updated} updated, {report.unchanged} unchanged, "
        f"{report.removed} removed; {report.passages} passages."
    )
    _print_list("could not be read", report.failed)
    _print_list("passed over", report.skipped)


def _print_memory(read: MemoryReport) -> None:
    remaining = f", {read.remaining} left as the budget is full" if read.remaining else ""
    typer.echo(
        f"Memory: {read.read} read, {read.existing} there{remaining}; {read.tokens:,} tokens read; "
        f"{show_size(read.bytes)} of {show_size(read.budget)} taken."
    )


def _print_list(what: str, failures: Iterable[SkippedFile]) -> None:
    failures = list(failures)
    if not failures:
        return
    typer.echo(f"{len(failures)} {what}:")
    for failure in failures[:_MAX_LISTED]:
        typer.echo(printable(f"  {failure.path}: {failure.reason}"))
    if len(failures) > _MAX_LISTED:
        typer.echo(f"  and {len(failures) - _MAX_LISTED} more (all with --json)")

"""`llamory read`: reads documents into a memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from llamory.cli.memory_options import Bf16, Device, MemSearch, MemTopK, parse_layers, show_size
from llamory.cli.output import Json, Quiet, print_json, stdout_redirected


def read(
    paths: Annotated[list[Path], typer.Argument(help="Files and folders to read.")],
    memory: Annotated[Path, typer.Option(help="File that keeps the memory; made if need be.")],
    model: Annotated[
        str | None,
        typer.Option(help="A model (folder, .gguf file, hub id or 'default') for a new memory.", show_default=False),
    ] = None,
    mem_layers: Annotated[
        str | None, typer.Option(help="Memory layers, such as 6,12,18 or 5-29.", show_default=False)
    ] = None,
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens that are read at once.", show_default=False)
    ] = None,
    mem_dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "int8"] | None,
        typer.Option(help="How a new memory is kept; int8 takes the least room.", show_default=False),
    ] = None,
    mem_search: MemSearch = None,
    mem_top_k: MemTopK = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Refuse documents of more tokens.", show_default=False)
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field that holds the text in JSONL files.")] = "text",
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Pass over broken lines and files.")] = False,
    bf16: Bf16 = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Read documents into a memory, or bring it up to date with them. A run that was stopped goes on."""
    with stdout_redirected(quiet=quiet):
        layers = parse_layers(mem_layers)
        from llamory.ingest.encode import read_documents_into

        report = read_documents_into(
            memory,
            paths,
            model=model,
            max_tokens=max_tokens,
            text_field=text_field,
            skip_broken=skip_broken,
            mem_layers=layers,
            context_length=context_length,
            mem_dtype=mem_dtype,
            mem_search=mem_search,
            mem_top_k=mem_top_k,
            bf16=bf16,
            device=device,
        )
    if as_json:
        print_json({"memory": str(memory), **asdict(report), "tokens_per_second": report.tokens_per_second})
        return
    speed = f" in {report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s" if report.tokens else ""
    before = f" ({report.resumed:,} more before it was stopped)" if report.resumed else ""
    typer.echo(
        f"{memory}: {report.added} added, {report.replaced} replaced, {report.unchanged} unchanged, "
        f"{report.removed} removed; {report.tokens:,} tokens read{before}{speed}."
    )
    typer.echo(
        f"It holds {report.documents} document{'' if report.documents == 1 else 's'}, {report.memory_tokens:,} "
        f"tokens, {show_size(report.bytes)}."
    )

"""`llamory read`: encodes documents into a memory file."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from llamory.cli import options
from llamory.cli.options import Option
from llamory.cli.output import print_json, print_skipped, show_count, show_size, stdout_redirected


def read(
    paths: options.Documents,
    memory: Annotated[Path, Option("Memory file, created if it does not exist.")],
    search: options.MemorySearchOptions,
    model: Annotated[str | None, Option("Model of a new memory: folder, .gguf file, hub id or 'default'.")] = None,
    device: options.Device = None,
    max_tokens: Annotated[int | None, Option("Refuse documents of more tokens.")] = None,
    text_field: options.TextField = "text",
    skip_broken: Annotated[bool, Option("Skip broken lines and files.")] = False,
    mem_layers: options.MemLayers = None,
    context_length: options.ContextLength = None,
    mem_dtype: options.MemDtype = None,
    bf16: options.Bf16 = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Encode documents into a memory file, or update the file. An interrupted run resumes."""
    with stdout_redirected(quiet=quiet):
        from llamory.ingest.encode import read_documents_into

        report = read_documents_into(
            memory,
            paths,
            model=model,
            max_tokens=max_tokens,
            text_field=text_field,
            skip_broken=skip_broken,
            mem_layers=mem_layers,
            context_length=context_length,
            mem_dtype=mem_dtype,
            mem_search=search.mem_search,
            mem_top_k=search.mem_top_k,
            bf16=bf16,
            device=device,
        )
    if as_json:
        fields = dataclasses.asdict(report)
        print_json({"memory": str(memory), **fields, "tokens_per_second": report.tokens_per_second})
        return
    speed = f" in {report.seconds:.1f} s, {report.tokens_per_second:,.0f} tokens/s" if report.tokens else ""
    resumed = f" ({report.resumed:,} more before the interruption)" if report.resumed else ""
    typer.echo(
        f"{memory}: {report.added} added, {report.replaced} replaced, {report.unchanged} unchanged, "
        f"{report.removed} removed; {report.tokens:,} tokens read{resumed}{speed}."
    )
    typer.echo(
        f"It holds {show_count(report.documents, 'document')}, {report.memory_tokens:,} tokens, "
        f"{show_size(report.bytes)}."
    )
    print_skipped("skipped", report.skipped)

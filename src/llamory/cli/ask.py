"""`llamory ask`: asks what was read into a memory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TextIO

import typer

from llamory.cli.memory_options import Bf16, Device, Search, TopK
from llamory.cli.output import Json, Quiet, print_json, working


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    memory: Annotated[list[Path], typer.Option(help="Memory file of `llamory read`; may be given several times.")],
    model: Annotated[
        str | None, typer.Option(help="The model that made the memory, if it was moved.", show_default=False)
    ] = None,
    documents: Annotated[
        list[str] | None,
        typer.Option(help="Only this document; may be given several times.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")] = 256,
    max_question_tokens: Annotated[
        int | None, typer.Option(min=1, help="Refuse a question of more tokens.", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Sample the answer; 0 takes the likeliest.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling.", show_default=False)] = None,
    last_context_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a long question that stay local.", show_default=False)
    ] = None,
    mem_search: Search = None,
    mem_top_k: TopK = None,
    bf16: Bf16 = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask what was read into one or more memories; the answer comes word by word."""
    out = sys.stdout
    with working(quiet=quiet):
        from llamory.reading.asking import OpenMemory

        opened = OpenMemory(
            memory,
            model=model,
            documents=documents or None,
            mem_search=mem_search,
            mem_top_k=mem_top_k,
            last_context_length=last_context_length,
            bf16=bf16,
            device=device,
        )
        answer = opened.ask(
            question,
            max_new_tokens=max_new_tokens,
            max_question_tokens=max_question_tokens,
            temperature=temperature,
            seed=seed,
            on_text=None if as_json else lambda text: _write(out, text),
        )
    if as_json:
        print_json({"memory": list(map(str, memory)), "model": opened.name, **asdict(answer)})
    else:
        out.write("\n")


def _write(out: TextIO, text: str) -> None:
    """Write text as it comes; what a model says must not steer the terminal."""
    shown = "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)
    encoding = out.encoding or "utf-8"
    out.write(shown.encode(encoding, "replace").decode(encoding))
    out.flush()

"""`llamory search`: finds the passages of a library that answer a query."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llamory.cli import options
from llamory.cli.options import Option
from llamory.cli.output import print_json, printable, stdout_redirected

if TYPE_CHECKING:
    from llamory.library import Hit

_SHOWN_LINES = 3


def search(
    query: Annotated[str, typer.Argument(parser=options.text, help="The query, in plain words.")],
    library: options.Library,
    top: Annotated[int, Option("Passages to return.", options.SEARCH)] = 10,
    mode: Annotated[Literal["dense", "bm25", "fused"], Option(options.SEARCH_MODE_HELP, options.SEARCH)] = "fused",
    source: options.Source = None,
    model: Annotated[str | None, Option("The embedding model of the library, if it has moved.")] = None,
    device: options.Device = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Search a library and print the best passages first."""
    with stdout_redirected(quiet=quiet):
        from llamory.library import Library

        opened = Library(library, model=model, device=device)
        hits = opened.search(query, top, source=source or None, mode=mode)
    if as_json:
        ranked = [{"rank": i, "location": hit.location, **dataclasses.asdict(hit)} for i, hit in enumerate(hits, 1)]
        print_json({"query": query, "library": library, "mode": mode, "hits": ranked})
    elif hits:
        _print_hits(hits)
    else:
        typer.echo("No passage was found.", err=True)


def _print_hits(hits: Iterable[Hit]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for rank, hit in enumerate(hits, start=1):
        heading = Text.assemble(
            f"{rank:>2}. ", (f"{hit.score:.3f}", "green"), "  ", (printable(hit.location), "bold cyan")
        )
        if hit.title:
            heading.append(f"  {printable(hit.title)}", style="bold")
        console.print(heading)
        lines = [line.rstrip() for line in hit.text.splitlines() if line.strip()]
        for line in lines[:_SHOWN_LINES]:
            shown = Text(f"    {printable(line)}")
            if console.is_terminal:
                shown.truncate(console.width, overflow="ellipsis")
            console.print(shown)

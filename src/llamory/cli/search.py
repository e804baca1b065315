"""`llamory search`: finds the passages of a library that answer a query."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from llamory.cli.output import Json, Quiet, print_json, working

if TYPE_CHECKING:
    from llamory.library import Hit

_SHOWN_LINES = 3


def search(
    query: Annotated[str, typer.Argument(help="What to look for, in plain words.")],
    library: Annotated[str, typer.Option(help="Folder (or object-store address) of the library.")],
    top: Annotated[int, typer.Option(min=1, help="How many passages to show.")] = 10,
    source: Annotated[
        str | None, typer.Option(help="Only passages of files that this pattern fits, such as 'docs/*.md'.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the library's model is, if it was moved.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the passages of a library that answer a query, best first."""
    with working(quiet=quiet):
        from llamory.library import Library

        hits = Library(library, model=model).search(query, top, source=source)
    if as_json:
        ranked = [{"rank": rank, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]
        print_json({"query": query, "library": library, "hits": ranked})
    elif hits:
        _print_hits(hits)
    else:
        typer.echo("No passage was found.", err=True)


def _print_hits(hits: Iterable[Hit]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for rank, hit in enumerate(hits, start=1):
        place = f"{hit.source}:{hit.line}"
        heading = Text.assemble(f"{rank:>2}. ", (f"{hit.score:.3f}", "green"), "  ", (_printable(place), "bold cyan"))
        if hit.title:
            heading.append(f"  {_printable(hit.title)}", style="bold")
        console.print(heading)
        lines = [line.rstrip() for line in hit.text.splitlines() if line.strip()]
        for line in lines[:_SHOWN_LINES]:
            shown = Text(f"    {_printable(line)}")
            if console.is_terminal:
                shown.truncate(console.width, overflow="ellipsis")
            console.print(shown)


def _printable(text: str) -> str:
    """Text without control characters: a file that was read must not steer the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)

"""`llamory search`: finds the passages of a library that answer a query."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from llamory.cli.output import Json, Quiet, print_json, printable, stdout_redirected

if TYPE_CHECKING:
    from llamory.library import Hit

_SHOWN_LINES = 3


class Mode(StrEnum):
    """Ways to search, as `llamory.library` names them."""

    dense = "dense"
    bm25 = "bm25"
    fused = "fused"


def search(
    query: Annotated[str, typer.Argument(help="What to look for, in plain words.")],
    library: Annotated[str, typer.Option(help="Folder (or object-store address) of the library.")],
    top: Annotated[int, typer.Option(min=1, help="How many passages to show.")] = 10,
    mode: Annotated[Mode, typer.Option(help="By meaning, by words, or by both.")] = Mode.fused,
    source: Annotated[
        list[str] | None,
        typer.Option(help="Only passages of files that this pattern fits, such as 'docs/*.md'; may be given again."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Where the library's model is, if it was moved.", show_default=False)
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Find the passages of a library that answer a query, best first."""
    with stdout_redirected(quiet=quiet):
        from llamory.library import Library

        hits = Library(library, model=model).search(query, top, source=source or None, mode=mode.value)
    if as_json:
        ranked = [{"rank": rank, "location": hit.location, **asdict(hit)} for rank, hit in enumerate(hits, start=1)]
        print_json({"query": query, "library": library, "mode": mode.value, "hits": ranked})
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

"""`llamory dataset`: builds real retrieval sets from what a machine has or fetches, to train and to judge with."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamory.cli.output import Json, Quiet, print_json, working
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.datasets.builder import Pair
    from llamory.evaluation.datasets.functions import Origin

app = typer.Typer(help="Build real retrieval sets, to train and to judge with.", rich_markup_mode=None)

Output = Annotated[Path, typer.Option(help="Folder to make: one BEIR folder each in train, dev and test.")]


@app.callback()
def _dataset() -> None:
    pass


@app.command()
def descriptions(
    output: Output,
    source: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="A Debian Translation-en file, or /var/lib/dpkg/status, instead of what apt-get fetches; repeatable.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the set of package descriptions: a Debian package's title asks for its long description."""
    with working(quiet=quiet):
        from llamory.evaluation.datasets.builder import check_free
        from llamory.evaluation.datasets.descriptions import about_lists, description_pairs, fetched_lists

        check_free(output)
        for path in source or ():
            if not path.is_file():
                raise LlamoryError(f"There is no file {path}.")
        with nullcontext(source) if source else fetched_lists() as files:
            result = _build(output, description_pairs(files), _DESCRIPTIONS.format(lists=about_lists(files)))
    _tell(output, result, as_json=as_json)


@app.command()
def functions(
    output: Output,
    package: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Take this installed package beside the standard library, not --packages; repeatable.",
            show_default=False,
        ),
    ] = None,
    packages: Annotated[
        Literal["usual", "all", "none"],
        typer.Option(
            help="Take packages beside the standard library: those that come with this one, all that are installed and "
            "have a permissive licence, or none."
        ),
    ] = "usual",
    source: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Take the Python files of this folder, nothing else; repeatable."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the set of Python functions: a docstring asks for the function it was taken out of."""
    with working(quiet=quiet):
        from llamory.evaluation.datasets.builder import check_free
        from llamory.evaluation.datasets.functions import (
            folder_origin,
            function_pairs,
            installed_packages,
            standard_library,
            usual_packages,
        )

        if package and source:
            raise LlamoryError("--package can't be given with --source; give one of them.")
        check_free(output)
        if source:
            origins = [folder_origin(folder) for folder in source]
        else:
            origins = [standard_library()]
            if package or packages == "all":
                origins += installed_packages(package)
            elif packages == "usual":
                origins += usual_packages()
        told = "\n".join(f"- {origin.name}: {origin.licence}" for origin in origins)
        with _Files("Python files", origins) as progress:
            pairs = function_pairs(origins, progress.step)
            result = _build(output, pairs, _FUNCTIONS.format(origins=told))
    _tell(output, result, as_json=as_json)


@app.command()
def sections(
    documents: Annotated[list[Path], typer.Argument(help="Files and folders of documents with headings.")],
    output: Output,
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Put all pairs into the test part, to judge with and never to train on.")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a set of documents of your own: a heading asks for the section that stands under it."""
    with working(quiet=quiet):
        from llamory.evaluation.datasets.builder import check_free
        from llamory.evaluation.datasets.sections import section_pairs

        check_free(output)
        told = "\n".join(f"- {path.name}" for path in documents)
        pairs = section_pairs(documents)
        result = _build(output, pairs, _SECTIONS.format(documents=told), {"test": 1.0} if test_only else None)
    _tell(output, result, as_json=as_json)


def _build(output: Path, pairs: Iterable[Pair], about: str, shares: dict[str, float] | None = None) -> dict[str, Any]:
    from llamory.evaluation.datasets.builder import PARTS, split_pairs, write_set

    parts = split_pairs(pairs, shares or PARTS)
    counts = {part: len(found) for part, found in parts.pairs.items()}
    rows = "\n".join(f"| {part} | {count:,} |" for part, count in counts.items())
    left_out = f"{parts.copies:,} copies and {parts.near_copies:,} near copies were left out."
    write_set(output, parts, f"{about}\n| part | pairs |\n|---|---:|\n{rows}\n\n{left_out}\n{_PARTS}")
    return {"pairs": counts, "copies_left_out": parts.copies, "near_copies_left_out": parts.near_copies}


def _tell(output: Path, result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), **result})
    else:
        counts = ", ".join(f"{count:,} {part}" for part, count in result["pairs"].items())
        typer.echo(f"{output}: {counts} pairs; {result['copies_left_out']:,} copies and ", nl=False)
        typer.echo(f"{result['near_copies_left_out']:,} near copies were left out.")


class _Files:
    """A bar on standard error, on a terminal, that counts files."""

    def __init__(self, title: str, origins: Iterable[Origin]) -> None:
        import sys

        from rich.console import Console
        from rich.progress import Progress

        console = Console(file=sys.stderr)
        self.bar = Progress(console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=sum(len(origin.files) for origin in origins))

    def __enter__(self) -> _Files:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def step(self) -> None:
        self.bar.advance(self.task)


_DESCRIPTIONS = """# Package descriptions

Titles and long descriptions of Debian packages, made by `llamory dataset descriptions`: a title asks for the
description it belongs to. Of packages whose descriptions begin with the same paragraph, one is here.

Source:

{lists}

A description is part of its package and under that package's licence, which the Debian Free Software Guidelines allow
to be used, changed and passed on; see https://metadata.ftp-master.debian.org/changelogs/ for each.
"""

_FUNCTIONS = """# Python functions

Docstrings and functions, made by `llamory dataset functions`: the first paragraph of a docstring asks for the function
that it was taken out of.

Sources, each under its own licence:

{origins}
"""

_SECTIONS = """# Sections

Headings and sections of documents, made by `llamory dataset sections`: a heading asks for the text under it.

Documents, each under its own licence:

{documents}
"""

_PARTS = """
The parts are BEIR folders of their own (corpus.jsonl, queries.jsonl, qrels/PART.tsv). A pair's part follows from a hash
of its text, so that new sources move no pair. No query and no text stands in two parts, in other case or punctuation
neither; of texts in different parts that share half of the shorter one's runs of five words, the one in test stays,
before dev, before train.
"""

"""`llamory dataset`: builds real retrieval sets from what a machine has or fetches, to train and to judge with."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamory.cli.output import Json, Quiet, print_json, stdout_redirected
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
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation.datasets.builder import require_empty_folder
        from llamory.evaluation.datasets.descriptions import (
            description_pairs,
            downloaded_package_lists,
            format_package_lists,
        )

        require_empty_folder(output)
        for path in source or ():
            if not path.is_file():
                raise LlamoryError(f"There is no file {path}.")
        with nullcontext(source) if source else downloaded_package_lists() as files:
            result = _build_dataset(
                output, description_pairs(files), _DESCRIPTIONS.format(lists=format_package_lists(files))
            )
    _print_summary(output, result, as_json=as_json)


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
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation.datasets.builder import require_empty_folder
        from llamory.evaluation.datasets.functions import (
            default_packages,
            function_pairs,
            installed_packages,
            origin_of_folder,
            standard_library,
        )

        if package and source:
            raise LlamoryError("--package can't be given with --source; give one of them.")
        require_empty_folder(output)
        if source:
            origins = [origin_of_folder(folder) for folder in source]
        else:
            origins = [standard_library()]
            if package or packages == "all":
                origins += installed_packages(package)
            elif packages == "usual":
                origins += default_packages()
        source_list = "\n".join(f"- {origin.name}: {origin.licence}" for origin in origins)
        with _FileProgress("Python files", origins) as progress:
            pairs = function_pairs(origins, progress.step)
            result = _build_dataset(output, pairs, _FUNCTIONS.format(origins=source_list))
    _print_summary(output, result, as_json=as_json)


@app.command()
def sections(
    documents: Annotated[list[Path], typer.Argument(help="Files and folders of documents with headings.")],
    output: Output,
    test_only: Annotated[
        bool,
        typer.Option("--test-only", help="Put all pairs into the test split, to judge with and never to train on."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a set of documents of your own: a heading asks for the section that stands under it."""
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation.datasets.builder import require_empty_folder
        from llamory.evaluation.datasets.sections import section_pairs

        require_empty_folder(output)
        source_list = "\n".join(f"- {path.name}" for path in documents)
        pairs = section_pairs(documents)
        result = _build_dataset(
            output, pairs, _SECTIONS.format(documents=source_list), {"test": 1.0} if test_only else None
        )
    _print_summary(output, result, as_json=as_json)


def _build_dataset(
    output: Path, pairs: Iterable[Pair], readme: str, fractions: dict[str, float] | None = None
) -> dict[str, Any]:
    from llamory.evaluation.datasets.builder import SPLITS, split_pairs, write_set

    splits = split_pairs(pairs, fractions or SPLITS)
    counts = {split: len(found) for split, found in splits.pairs.items()}
    rows = "\n".join(f"| {split} | {count:,} |" for split, count in counts.items())
    removed = f"{splits.duplicates:,} duplicates and {splits.near_duplicates:,} near duplicates were left out."
    write_set(output, splits, f"{readme}\n| split | pairs |\n|---|---:|\n{rows}\n\n{removed}\n{_SPLITS_NOTE}")
    return {"pairs": counts, "duplicates_removed": splits.duplicates, "near_duplicates_removed": splits.near_duplicates}


def _print_summary(output: Path, result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), **result})
    else:
        counts = ", ".join(f"{count:,} {split}" for split, count in result["pairs"].items())
        typer.echo(f"{output}: {counts} pairs; {result['duplicates_removed']:,} duplicates and ", nl=False)
        typer.echo(f"{result['near_duplicates_removed']:,} near duplicates were left out.")


class _FileProgress:
    """A bar on standard error, on a terminal, that counts files."""

    def __init__(self, title: str, origins: Iterable[Origin]) -> None:
        import sys

        from rich.console import Console
        from rich.progress import Progress

        console = Console(file=sys.stderr)
        self.bar = Progress(console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task(title, total=sum(len(origin.files) for origin in origins))

    def __enter__(self) -> _FileProgress:
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

A description is split of its package and under that package's licence, which the Debian Free Software Guidelines allow
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

_SPLITS_NOTE = """
The splits are BEIR folders of their own (corpus.jsonl, queries.jsonl, qrels/PART.tsv). A pair's split follows from a hash
of its text, so that new sources move no pair. No query and no text stands in two splits, in other case or punctuation
neither; of texts in different splits that share half of the shorter one's runs of five words, the one in test stays,
before dev, before train.
"""

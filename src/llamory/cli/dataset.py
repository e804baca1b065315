"""`llamory dataset`: builds retrieval datasets for training and evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llamory.cli import options
from llamory.cli.options import Option
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.evaluation.datasets.builder import Pair

app = typer.Typer(help="Build retrieval datasets for training and evaluation.", rich_markup_mode="rich")

Output = Annotated[Path, Option("Folder for the BEIR folders train, dev and test.")]


def descriptions(
    output: Output,
    package_list: Annotated[
        list[Path] | None,
        Option("A Debian Translation-en file, or /var/lib/dpkg/status, instead of the lists that apt-get downloads."),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Pair the titles of Debian packages with their long descriptions."""
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation.datasets import descriptions as module
        from llamory.evaluation.datasets.builder import require_empty_folder

        require_empty_folder(output)
        for path in package_list or ():
            if not path.is_file():
                raise LlamoryError(f"There is no file {path}.")
        with nullcontext(package_list) if package_list else module.downloaded_package_lists() as files:
            readme = _DESCRIPTIONS.format(lists=module.format_package_lists(files))
            result = _build_dataset(output, module.description_pairs(files), readme)
    _print_summary(output, result, as_json=as_json)


def functions(
    output: Output,
    package: Annotated[
        list[str] | None, Option("Installed package besides the standard library, instead of --package-set.")
    ] = None,
    package_set: Annotated[
        Literal["default", "all", "none"],
        Option("Packages besides the standard library: llamory's dependencies, all permissive ones, or none."),
    ] = "default",
    folder: Annotated[list[Path] | None, Option("Take the Python files of this folder and nothing else.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Pair the docstrings of Python functions with the functions."""
    with stdout_redirected(quiet=quiet):
        from llamory.common.progress import ProgressBar
        from llamory.evaluation.datasets import functions as module
        from llamory.evaluation.datasets.builder import require_empty_folder

        if package and folder:
            raise LlamoryError("--package can't be given with --folder; give one of them.")
        require_empty_folder(output)
        if folder:
            origins = [module.origin_of_folder(each) for each in folder]
        else:
            origins = [module.standard_library()]
            if package or package_set == "all":
                origins += module.installed_packages(package)
            elif package_set == "default":
                origins += module.default_packages()
        readme = _FUNCTIONS.format(origins="\n".join(f"- {origin.name}: {origin.licence}" for origin in origins))
        with ProgressBar("Python files", sum(len(origin.files) for origin in origins), unit="files") as progress:
            result = _build_dataset(output, module.function_pairs(origins, progress.advance), readme)
    _print_summary(output, result, as_json=as_json)


def sections(
    documents: options.Documents,
    output: Output,
    test_only: Annotated[bool, Option("Put all pairs into the test split, for evaluation only.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Pair the headings of your own documents with the sections under them."""
    with stdout_redirected(quiet=quiet):
        from llamory.evaluation.datasets.builder import require_empty_folder
        from llamory.evaluation.datasets.sections import section_pairs

        require_empty_folder(output)
        readme = _SECTIONS.format(documents="\n".join(f"- {path.name}" for path in documents))
        result = _build_dataset(output, section_pairs(documents), readme, {"test": 1.0} if test_only else None)
    _print_summary(output, result, as_json=as_json)


options.add_command(app, descriptions, "descriptions")
options.add_command(app, functions, "functions")
options.add_command(app, sections, "sections")


def _build_dataset(
    output: Path, pairs: Iterable[Pair], readme: str, fractions: dict[str, float] | None = None
) -> dict[str, Any]:
    from llamory.evaluation.datasets.builder import SPLITS, split_pairs, write_set

    splits = split_pairs(pairs, fractions or SPLITS)
    counts = {split: len(found) for split, found in splits.pairs.items()}
    rows = "\n".join(f"| {split} | {count:,} |" for split, count in counts.items())
    removed = f"{splits.duplicates:,} duplicates and {splits.near_duplicates:,} near duplicates were removed."
    write_set(output, splits, f"{readme}\n| split | pairs |\n|---|---:|\n{rows}\n\n{removed}\n{_SPLITS_NOTE}")
    return {"pairs": counts, "duplicates_removed": splits.duplicates, "near_duplicates_removed": splits.near_duplicates}


def _print_summary(output: Path, result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), **result})
        return
    counts = ", ".join(f"{count:,} {split}" for split, count in result["pairs"].items())
    typer.echo(
        f"{output}: {counts} pairs; {result['duplicates_removed']:,} duplicates and "
        f"{result['near_duplicates_removed']:,} near duplicates were removed."
    )


_DESCRIPTIONS = """# Package descriptions

Titles and long descriptions of Debian packages, made by `llamory dataset descriptions`. The query is a title, the
relevant text is the description of that package. Of descriptions that begin with the same paragraph, one is included.

Source:

{lists}

A description is part of its package and has its licence, which under the Debian Free Software Guidelines allows use,
modification and redistribution; see https://metadata.ftp-master.debian.org/changelogs/.
"""

_FUNCTIONS = """# Python functions

Docstrings and functions, made by `llamory dataset functions`. The query is the first paragraph of a docstring, the
relevant text is the function without it.

Sources, each under its own licence:

{origins}
"""

_SECTIONS = """# Sections

Headings and sections of documents, made by `llamory dataset sections`. The query is a heading, the relevant text is
the section under it.

Documents, each under its own licence:

{documents}
"""

_SPLITS_NOTE = """
Each split is a BEIR folder (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv). A hash of its text assigns a pair to a
split, so new sources move no pair. No query and no text is in two splits, regardless of case and punctuation. Of texts
in different splits that share half of the five-word sequences of the shorter one, only one is kept: test comes before
dev, dev before train.
"""

"""`llamory dataset`: builds retrieval datasets for training and evaluation."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from llamory.cli import options
from llamory.cli.options import Option
from llamory.cli.output import print_json, stdout_redirected
from llamory.errors import LlamoryError

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
        from llamory.evaluation.datasets import build_dataset, require_empty_folder
        from llamory.evaluation.datasets import descriptions as module

        require_empty_folder(output)
        for path in package_list or ():
            if not path.is_file():
                raise LlamoryError(f"There is no file {path}.")
        with nullcontext(package_list) if package_list else module.downloaded_package_lists() as files:
            result = build_dataset("descriptions", output, module.format_package_lists(files), files)
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
        from llamory.evaluation.datasets import build_dataset, require_empty_folder
        from llamory.evaluation.datasets import functions as module

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
        sources = "\n".join(f"- {origin.name}: {origin.licence}" for origin in origins)
        with ProgressBar("Python files", sum(len(origin.files) for origin in origins), unit="files") as progress:
            result = build_dataset("functions", output, sources, origins, progress.advance)
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
        from llamory.evaluation.datasets import SPLITS, build_dataset, require_empty_folder

        require_empty_folder(output)
        sources = "\n".join(f"- {path.name}" for path in documents)
        fractions = {"test": 1.0} if test_only else SPLITS
        result = build_dataset("sections", output, sources, documents, fractions=fractions)
    _print_summary(output, result, as_json=as_json)


for _command in (descriptions, functions, sections):
    options.add_command(app, _command)


def _print_summary(output: Path, result: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json({"output": str(output), **result})
        return
    counts = ", ".join(f"{count:,} {split}" for split, count in result["pairs"].items())
    typer.echo(
        f"{output}: {counts} pairs; {result['duplicates_removed']:,} duplicates and "
        f"{result['near_duplicates_removed']:,} near duplicates were removed."
    )

"""The command line `llamory COMMAND ...`; the commands import heavy libraries when they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from llamory import __version__
from llamory.cli import ask, dataset, index, info, read, search, train
from llamory.cli import eval as evaluate
from llamory.cli.options import add_command
from llamory.cli.output import INTERRUPTED, exit_interrupted, open_closed_streams, silence_libraries, user_errors

app = typer.Typer(
    name="llamory",
    help="Retrieval and long-term memory for LLaMA-family models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
_DATA, _MODELS = "Libraries and memories", "Models"
for _command in (index.index, search.search, ask.ask, ask.chat, read.read, info.info):
    add_command(app, _command, panel=_DATA)
app.add_typer(train.app, name="train", rich_help_panel=_MODELS)
add_command(app, train.export, panel=_MODELS)
app.add_typer(evaluate.app, name="eval", rich_help_panel=_MODELS)
app.add_typer(dataset.app, name="dataset", rich_help_panel=_MODELS)


@app.callback(invoke_without_command=True)
def _llamory(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the messages of libraries.")] = False,
) -> None:
    if version:
        typer.echo(f"llamory {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        context.get_help()  # prints it
    if not debug:
        silence_libraries()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, with the arguments of `sys.argv` by default, and exit.

    Exit codes: 0 success, 1 a fault of llamory, 2 an error that the user can correct, 130 stopped with Ctrl-C.
    """
    open_closed_streams()
    debug, remaining = _extract_debug_flag(list(sys.argv[1:] if arguments is None else arguments))
    with user_errors(debug=debug):
        code = get_command(app).main(remaining, prog_name="llamory", standalone_mode=False)
        sys.stdout.flush()
    if code == INTERRUPTED:  # how typer reports Ctrl-C inside a command
        exit_interrupted()
    sys.exit(code if isinstance(code, int) else 0)


def _extract_debug_flag(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether to show tracebacks, and the arguments with `--debug` moved to the front, as it may follow the command."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" in arguments[:end]:
        remaining = [argument for argument in arguments[:end] if argument != "--debug"]
        return True, ["--debug", *remaining, *arguments[end:]]
    if os.environ.get("LLAMORY_DEBUG", "0") not in ("", "0"):
        return True, ["--debug", *arguments]
    return False, arguments

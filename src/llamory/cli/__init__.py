"""The command line: `llamory VERB ...`, one module per verb, with heavy imports inside the commands."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer
from typer.main import get_command

from llamory import __version__
from llamory.cli import ask, chat, dataset, export, index, info, read, search, train
from llamory.cli import eval as evaluate
from llamory.cli.errors import INTERRUPTED, discard_stdout, extract_debug_flag, print_error
from llamory.cli.output import silence_libraries

app = typer.Typer(
    name="llamory",
    help="Retrieval and long-term memory for LLaMA-family models.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(train.app, name="train")
app.command(name="export")(export.export)
app.command(name="index")(index.index)
app.command(name="search")(search.search)
app.command(name="read")(read.read)
app.command(name="ask")(ask.ask)
app.command(name="chat")(chat.chat)
app.command(name="info")(info.info)
app.add_typer(evaluate.app, name="eval")
app.add_typer(dataset.app, name="dataset")


@app.callback(invoke_without_command=True)
def _llamory(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' own messages.")] = False,
) -> None:
    if version:
        typer.echo(f"llamory {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
    if not debug:
        silence_libraries()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line (with `sys.argv`'s arguments if none are arguments_list) and leave with its exit code.

    Exit codes: 0 done, 1 a fault of llamory's own, 2 an error that the user can mend, 130 stopped with Ctrl-C.
    """
    arguments_list = list(sys.argv[1:] if arguments is None else arguments)
    debug, arguments_list = extract_debug_flag(arguments_list)
    try:
        code = get_command(app).main(arguments_list, prog_name="llamory", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        discard_stdout()
        code = 0
    except (Exception, KeyboardInterrupt) as error:
        code = print_error(error, debug=debug)
    else:
        # typer turns Ctrl-C inside a command into this exit code.
        if code == INTERRUPTED:
            print_error(KeyboardInterrupt(), debug=False)
    sys.exit(code if isinstance(code, int) else 0)

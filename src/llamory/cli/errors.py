"""What the command line says when something goes wrong, and the exit code that goes with it."""

from __future__ import annotations

import errno
import os
import sys
import traceback

import typer

from llamory.errors import LlamoryError

INTERNAL_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130


def extract_debug_flag(arguments: list[str]) -> tuple[bool, list[str]]:
    """Whether tracebacks are wanted, and the arguments with `--debug` first, as it may stand after the verb too."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    if "--debug" in arguments[:end]:
        remaining = [argument for argument in arguments[:end] if argument != "--debug"]
        return True, ["--debug", *remaining, *arguments[end:]]
    if os.environ.get("LLAMORY_DEBUG", "0") not in ("", "0"):
        return True, ["--debug", *arguments]
    return False, arguments


def print_error(error: BaseException, *, debug: bool) -> int:
    """Write an error to standard error, as one message unless tracebacks are wanted, and give the exit code."""
    if isinstance(error, KeyboardInterrupt):
        typer.echo("Interrupted.", err=True)
        return INTERRUPTED
    if debug:
        traceback.print_exception(error)
    message = user_message(error)
    if message is None:
        message = f"llamory failed unexpectedly ({type(error).__name__}: {error})"
        message += "." if debug else "; run the command with --debug to see where."
        typer.echo(f"Error: {message}", err=True)
        return INTERNAL_ERROR
    typer.echo(f"Error: {message}", err=True)
    return USER_ERROR


def user_message(error: BaseException) -> str | None:
    """One message for an error that the user can mend; None for any other."""
    if isinstance(error, typer.TyperException):
        return error.format_message()
    if isinstance(error, LlamoryError):
        return str(error)
    # Libraries written in Rust report a full disk as an error of their own, with the system's words in it.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"The disk is full{where}: free some space and run the command again."
    if _is_out_of_memory(error):
        return "The memory is too small for this: choose a smaller batch, shorter passages or a smaller model."
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        if isinstance(error, FileNotFoundError):
            return f"There is no file or folder {error.filename}."
        if isinstance(error, PermissionError):
            return f"You have no permission to use {error.filename}."
        return f"{error.filename} can't be used: {error.strerror}."
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    # By name, as the error's class is torch's and torch may never have been imported.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )


def discard_stdout() -> None:
    """Send what is left of standard output nowhere, so that Python doesn't complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

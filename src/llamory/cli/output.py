"""What the command line prints: results on standard output, all else on standard error; errors and exit codes."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import typer

from llamory.errors import LlamoryError

_MAX_LISTED = 20

INTERNAL_ERROR, USER_ERROR, INTERRUPTED = 1, 2, 130


@contextmanager
def stdout_redirected(*, quiet: bool = False) -> Iterator[None]:
    """Send to standard error what libraries print to standard output; with `quiet`, discard both."""
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(redirect_stderr(stack.enter_context(Path(os.devnull).open("w"))))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def print_json(document: Any) -> None:
    """Write one JSON document to standard output; NaN and infinity, which JSON lacks, become null."""
    text = json.dumps(_finite(document), ensure_ascii=False, indent=2, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal without Unicode, or a file name that is no text
        text = json.dumps(json.loads(text), indent=2)
    sys.stdout.write(text + "\n")


def print_result(pairs: Mapping[str, Any], *, as_json: bool) -> None:
    """Write a result to standard output, as a JSON document or as one line per name and value."""
    if as_json:
        print_json(pairs)
        return
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        shown = ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, Mapping) else value
        sys.stdout.write(f"{name.replace('_', ' '):<{width}}  {shown}\n")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write columns to standard output, aligned right."""
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        typer.echo("  ".join(f"{entry:>{width}}" for entry, width in zip(line, widths, strict=True)))


def write_printable(out: TextIO, text: str) -> None:
    """Write text and flush; control characters and what the encoding of `out` lacks are replaced."""
    encoding = out.encoding or "utf-8"
    out.write(printable(text, keep="\n\t").encode(encoding, "replace").decode(encoding))
    out.flush()


def printable(text: str, keep: str = "") -> str:
    """Text with spaces in place of control characters, which could steer the terminal, other than those of `keep`."""
    return "".join(letter if letter.isprintable() or letter in keep else " " for letter in text)


def show_size(size: int) -> str:
    """A number of bytes with a unit."""
    value = float(size)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"


def show_count(count: int, noun: str) -> str:
    """A count with its noun, which gets an s unless the count is 1."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def silence_libraries() -> None:
    """Turn off the notices of libraries before they are imported; variables that the user has set stay."""
    values = {f"{library}_VERBOSITY": "error" for library in ("TRANSFORMERS", "DATASETS", "HF_HUB")}
    values |= {"TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    for name, value in values.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


@contextmanager
def user_errors(*, debug: bool) -> Iterator[None]:
    """Turn an exception into one message on standard error and an exit code; with `debug`, print the traceback too."""
    try:
        yield
    except BrokenPipeError:
        # The reader, such as `head`, has seen enough; without a target Python would complain at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        exit_interrupted()
    except Exception as error:
        if debug:
            traceback.print_exception(error)
        message, code = user_message(error), USER_ERROR
        if message is None:
            hint = "." if debug else "; run the command with --debug to see where."
            message, code = f"llamory failed unexpectedly ({type(error).__name__}: {error}){hint}", INTERNAL_ERROR
        typer.echo(f"Error: {message}", err=True)
        sys.exit(code)


def exit_interrupted() -> None:
    """Leave after Ctrl-C."""
    typer.echo("Interrupted.", err=True)
    sys.exit(INTERRUPTED)


def user_message(error: BaseException) -> str | None:
    """One sentence for an error that the user can correct; None for any other."""
    from llamory.common.extras import explain_import_error
    from llamory.common.ram import is_out_of_memory

    if isinstance(error, typer.TyperException):
        return error.format_message()
    if isinstance(error, LlamoryError):
        return str(error)
    if isinstance(error, ImportError):
        return explain_import_error(error)
    # Libraries written in Rust report a full disk as an error of their own that quotes the system.
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error):
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return f"The disk is full{where}: free some space and run the command again."
    if is_out_of_memory(error):
        return "The memory is too small for this: choose a smaller batch, shorter passages or a smaller model."
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        if isinstance(error, FileNotFoundError):
            return f"There is no file or folder {error.filename}."
        if isinstance(error, PermissionError):
            return f"You have no permission to use {error.filename}."
        return f"{error.filename} can't be used: {error.strerror}."
    return None


def open_closed_streams() -> None:
    """Open the null device for standard streams that were closed, so that no file gets their descriptors."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def print_skipped(what: str, skipped: Iterable[Any]) -> None:
    """Write how many paths were skipped or failed, and the first of them with their reasons."""
    if skipped := list(skipped):
        typer.echo(f"{len(skipped)} {what}:")
        for each in skipped[:_MAX_LISTED]:
            typer.echo(printable(f"  {each.path}: {each.reason}"))
        if len(skipped) > _MAX_LISTED:
            typer.echo(f"  and {len(skipped) - _MAX_LISTED} more (all with --json)")

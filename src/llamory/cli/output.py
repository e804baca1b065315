"""Where the command line writes: results to standard output, everything else to standard error."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress and no messages, only errors.")]


@contextmanager
def stdout_redirected(*, quiet: bool = False) -> Iterator[None]:
    """Keep standard output free for the result while a verb works; `quiet` silences standard error too.

    Whatever libraries print meanwhile goes to standard error. Errors are raised through, so they are still told.
    """
    with ExitStack() as stack:
        if quiet:
            stack.enter_context(redirect_stderr(stack.enter_context(Path(os.devnull).open("w"))))
        stack.enter_context(redirect_stdout(sys.stderr))
        yield


def print_json(document: Any) -> None:
    """Write one JSON document to standard output; numbers that JSON doesn't know (NaN, infinity) become null."""
    text = json.dumps(_finite(document), ensure_ascii=False, indent=2, default=str)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a terminal without Unicode, or a file name that is no text
        text = json.dumps(json.loads(text), indent=2)
    sys.stdout.write(text + "\n")


def print_key_values(pairs: Mapping[str, Any]) -> None:
    """Write names and values to standard output, one pair a line."""
    width = max(map(len, pairs), default=0)
    for name, value in pairs.items():
        shown = ", ".join(f"{key} {entry}" for key, entry in value.items()) if isinstance(value, Mapping) else value
        sys.stdout.write(f"{name:<{width}}  {shown}\n")


def print_result(pairs: Mapping[str, Any], *, as_json: bool) -> None:
    """Write a verb's result as a JSON document or as lines of names and values."""
    if as_json:
        print_json(pairs)
    else:
        print_key_values({name.replace("_", " "): value for name, value in pairs.items()})


def printable(text: str) -> str:
    """Text without control characters: a file that was read must not steer the terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def silence_libraries() -> None:
    """Keep the notices of transformers, datasets and their friends off the terminal; what the user set stays.

    Must run before those libraries are imported.
    """
    for name, value in {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value

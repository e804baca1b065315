"""The options that several commands share: each has one name, one meaning, one parser and one help panel."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from llamory.errors import LlamoryError

SEARCH, READER, GENERATION, OUTPUT, ADVANCED = "Search", "Reader", "Generation", "Output", "Advanced"
MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_LAYERS = 10_000


# ---- parsers ---------------------------------------------------------------------------------------------------------


def text(value: str) -> str:
    """Parse a text argument. Bytes that the locale can't decode are read as UTF-8.

    Raises:
        typer.BadParameter: the bytes are not UTF-8.
    """
    try:
        return os.fsencode(value).decode("utf-8") if any("\udc80" <= letter <= "\udcff" for letter in value) else value
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise typer.BadParameter(f"{value!a} is not valid UTF-8 text.") from error


def name(value: str) -> str:
    """Parse a text argument that must not be blank, such as the name of a model or a library."""
    value = text(value)
    if not value.strip():
        raise typer.BadParameter("It is empty.")
    return value


def path(value: str | Path) -> Path:
    """Parse the path of a file or folder, which must not be empty."""
    if not str(value):
        raise typer.BadParameter("The path is empty.")
    return Path(value)


def integer(low: int = 1, high: int = MAX_COUNT) -> Callable[[str], int]:
    """A parser of whole numbers from `low` to `high`."""

    def parse(value: str) -> int:
        try:
            number = int(value)
        except ValueError:
            number = low - 1
        if not low <= number <= high:
            raise typer.BadParameter(f"{value!r} is not a whole number from {low} to {high}.")
        return number

    return parse


def number(low: float = 0.0, *, infinite: bool = False) -> Callable[[str], float]:
    """A parser of numbers from `low` on; infinity is one of them only if `infinite`."""

    def parse(value: str) -> float:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not number >= low or (math.isinf(number) and not infinite):
            raise typer.BadParameter(f"{value!r} is not a number from {low:g} on.")
        return number

    return parse


def token_count(value: str) -> int:
    """Parse a number of tokens; 16k is 16 * 1024 and 1M is 1024k."""
    factor = {"k": 1 << 10, "m": 1 << 20}.get(value[-1:].lower())
    return int(value) if factor is None else int(value[:-1]) * factor


def token_counts(values: Sequence[str]) -> list[int]:
    """Parse numbers of tokens, separated by commas or given by repeated flags."""
    return comma_separated(values, token_count, "numbers of tokens, such as 2048,16k")


def comma_separated(values: Sequence[str], parse: Callable[[str], Any], expected: str) -> list[Any]:
    """Parse non-negative numbers, separated by commas or given by repeated flags; `expected` describes them."""
    numbers = []
    for part in filter(None, (part.strip() for value in values for part in str(value).split(","))):
        try:
            number = parse(part)
        except (ValueError, OverflowError):
            number = -1
        if not 0 <= number <= 1 << 40:
            raise typer.BadParameter(f"{part!r} should be {expected}.")
        numbers.append(number)
    if not numbers:
        raise typer.BadParameter(f"It is empty; it should be {expected}.")
    return numbers


def layers(values: Sequence[str]) -> list[int]:
    """Parse layers such as `6,12,18`, `5-29` or `3,7-9`; a flag that is given several times adds up.

    Raises:
        typer.BadParameter: the text has another form, or a range ends before it begins.
    """
    found: list[int] = []
    for part in ",".join(map(str, values)).replace(" ", ",").split(","):
        first, dash, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)):
            raise typer.BadParameter(f"{','.join(map(str, values))!r} should be layers, such as 6,12,18 or 5-29.")
        start, stop = int(first), int(last or first)
        if stop < start:
            raise typer.BadParameter(f"The range {part} ends before it begins; write {stop}-{start}.")
        if stop >= MAX_LAYERS:
            raise typer.BadParameter(f"There is no layer {stop}; the layers of a model count from 0.")
        found += range(start, stop + 1)
    return sorted(set(found))


def show_layers(layers: Sequence[int]) -> str:
    """Layers in the shortest form that `layers` parses."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


_METAVARS: dict[Any, str] = {text: "TEXT", name: "TEXT", path: "PATH", token_counts: "TOKENS", layers: "LAYERS"}


# ---- options ---------------------------------------------------------------------------------------------------------


def option(
    flag: str,
    parser: Callable[[Any], Any] | None,
    help: str,
    panel: str | None = None,
    *,
    parse_all: bool = False,
    metavar: str | None = None,
) -> Any:
    """A typer option with a parser of its values, or of the list of all its values; None leaves that to typer."""
    settings: dict[str, Any] = {"help": help, "rich_help_panel": panel}
    if parser is not None:
        settings["metavar"] = metavar or _METAVARS.get(parser, "NUMBER")
        settings["parser"] = text if parse_all else parser
        settings["callback"] = (lambda values: parser(values) if values else None) if parse_all else None
    return typer.Option(flag, **settings)


def distinct_names(names: list[str]) -> list[str]:
    """The names of models, none of which may be given twice.

    Raises:
        LlamoryError: one is given twice.
    """
    for name in names:
        if names.count(name) > 1:
            raise LlamoryError(f"The model {name} was named twice; compare it with another one.")
    return names


Json = Annotated[bool, option("--json", None, "Print the result as one JSON document.", OUTPUT)]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print no progress and no messages, only errors.", rich_help_panel=OUTPUT)
]
Documents = Annotated[list[Path], typer.Argument(parser=path, help="Files and folders.")]
Library = Annotated[str, option("--library", name, "Library: a folder or an object-store address.")]
TextField = Annotated[str, option("--text-field", name, "Key of the text in JSONL files.")]
Device = Annotated[
    str | None, option("--device", name, "Device, such as cpu, cuda or cuda:1; the accelerator if there is one.")
]
Bf16 = Annotated[bool, option("--bf16", None, "Compute in bfloat16 instead of float32.", ADVANCED)]
Seed = Annotated[int | None, option("--seed", integer(0, MAX_SEED), "Random seed for sampling.", GENERATION)]
EvalSeed = Annotated[int, option("--seed", integer(0, MAX_SEED), "Random seed.")]
Source = Annotated[
    list[str] | None,
    option(
        "--source",
        name,
        "Search only files that match this pattern, such as 'docs/*.md' (repeatable).",
        SEARCH,
        metavar="PATTERN",
    ),
]
SEARCH_MODE_HELP = "Search by meaning (dense), by words (bm25) or by both (fused)."
MemLayers = Annotated[
    list[Any] | None,
    option("--mem-layers", layers, "Layers that attend to memory, such as 5-29 or 3,7-9.", ADVANCED, parse_all=True),
]
ContextLength = Annotated[int | None, option("--context-length", integer(), "Tokens per encoder window.", ADVANCED)]
LastContextLength = Annotated[
    int | None,
    option(
        "--last-context-length", integer(), "Tokens at the end of the prompt that stay in the local context.", ADVANCED
    ),
]
MemDtype = Annotated[
    Literal["float32", "bfloat16", "float16", "int8"] | None,
    option("--mem-dtype", None, "Data type of stored keys and values.", ADVANCED),
]
MemSearch = Annotated[
    Literal["exact", "pages", "faiss"] | None,
    option(
        "--mem-search",
        None,
        "Search of the memory: exact reads all of it; pages and faiss read the best matches of a large memory.",
        ADVANCED,
    ),
]
MemTopK = Annotated[
    int | None, option("--mem-top-k", integer(), "Pages or neighbours that a memory search reads.", ADVANCED)
]
ReaderName = Annotated[
    str | None,
    option(
        "--reader",
        name,
        "Model that reads the library's documents: folder, .gguf file, hub id or 'default'; the recorded one if "
        "not given.",
        READER,
    ),
]
MemoryBudget = Annotated[
    str | None,
    option("--memory-budget", name, "Disk space for the memories of a library, such as 10GB.", READER, metavar="SIZE"),
]


@dataclasses.dataclass(kw_only=True)
class ReaderOptions:
    """The reader of a library."""

    reader: ReaderName = None
    memory_budget: MemoryBudget = None
    mem_layers: MemLayers = None
    context_length: ContextLength = None
    mem_dtype: MemDtype = None


@dataclasses.dataclass(kw_only=True)
class MemorySearchOptions:
    """How a model searches its memory."""

    mem_search: MemSearch = None
    mem_top_k: MemTopK = None


def explicit(options: Any, *names: str) -> dict[str, Any]:
    """The options of a group that were given, or those of them with these names."""
    values = {name: getattr(options, name) for name in names or vars(options)}
    return {name: value for name, value in values.items() if value not in (None, []) and value is not False}


def device_kwargs(device: str | None) -> dict[str, Any]:
    """The argument `device` for a function that chooses one by default, if the option was given.

    Raises:
        LlamoryError: the machine has no such device.
    """
    from llamory.models.device import pick_device

    return {} if device is None else {"device": pick_device(device)}


def add_command(app: typer.Typer, command: Callable[..., None], name: str, *, panel: str | None = None) -> None:
    """Add a command to an app; its docstring is the help.

    A parameter that is a dataclass of options, such as `reader: ReaderOptions`, becomes one option per field, and the
    command gets an instance.
    """
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name=name, help=help, rich_help_panel=panel)(_with_option_groups(command))


def _with_option_groups(command: Callable[..., None]) -> Callable[..., None]:
    hints = get_type_hints(command, include_extras=True)
    hints.pop("return", None)
    groups: dict[str, tuple[type, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    keyword = inspect.Parameter.KEYWORD_ONLY
    for parameter in inspect.signature(command).parameters.values():
        kind = hints[parameter.name]
        if not dataclasses.is_dataclass(kind):
            parameters.append(parameter.replace(kind=keyword, annotation=kind))
            continue
        assert isinstance(kind, type)
        field_hints, fields = get_type_hints(kind, include_extras=True), dataclasses.fields(kind)
        groups[parameter.name] = kind, [field.name for field in fields]
        parameters += [
            inspect.Parameter(field.name, keyword, default=field.default, annotation=field_hints[field.name])
            for field in fields
        ]

    @functools.wraps(command)
    def run(**values: Any) -> None:
        made = {
            parameter: kind(**{field: values.pop(field) for field in fields})
            for parameter, (kind, fields) in groups.items()
        }
        command(**values, **made)

    del run.__wrapped__  # type: ignore[attr-defined]
    # typer reads the options of a command from its signature.
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run

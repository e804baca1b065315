"""The options that several commands share: each has one name, one meaning, one parser and one help panel."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from llamory.errors import LlamoryError

SEARCH, READER, GENERATION, OUTPUT, ADVANCED = "Search", "Reader", "Generation", "Output", "Advanced"
MAX_COUNT = 2**31 - 1
MAX_SEED = 2**63 - 1
MAX_LAYERS = 10_000


def text(value: str) -> str:
    """Parse a text argument. Bytes that the locale can't decode are read as UTF-8."""
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
    """Parse layers such as `6,12,18`, `5-29` or `3,7-9`; a flag that is given several times adds up."""
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


def device(value: str) -> str:
    """Parse the name of a device of this machine."""
    from llamory.models.device import pick_device

    try:
        return pick_device(value)
    except LlamoryError as error:
        raise typer.BadParameter(str(error)) from error


def distinct_names(names: list[str]) -> list[str]:
    """The names of models; raises LlamoryError if one is given twice."""
    for name in names:
        if names.count(name) > 1:
            raise LlamoryError(f"The model {name} was named twice; compare it with another one.")
    return names


_PARSERS: dict[Any, Callable[[Any], Any]] = {int: integer(), float: number(), str: name, Path: path}
_METAVARS = {int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}


@dataclasses.dataclass(frozen=True)
class Option:
    """An option of a command; the parameter's name and type give the flag and the parser.

    `parser` parses each value instead, and `parse_all` the list of the values of all flags.
    """

    help: str
    panel: str | None = None
    parser: Callable[[str], Any] | None = None
    metavar: str | None = None
    flag: str | None = None
    parse_all: Callable[[list[str]], Any] | None = None

    def for_parameter(self, name: str, hint: Any) -> Any:
        """The typer option for a parameter of this name and type."""
        kind, parse_all, help = without_none(hint), self.parse_all, self.help
        if get_origin(kind) is list:
            kind, help = get_args(kind)[0], help if parse_all else f"{help.removesuffix('.')} (repeatable)."
        return typer.Option(
            *(self.flag or f"--{name.replace('_', '-')}").split(),
            help=help,
            rich_help_panel=self.panel,
            metavar=self.metavar or _METAVARS.get(kind),
            parser=text if parse_all else self.parser or _PARSERS.get(kind),
            callback=(lambda values: parse_all(values) if values else None) if parse_all else None,
        )


def without_none(hint: Any) -> Any:
    """A type without `| None`."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    return kinds[0] if NoneType in get_args(hint) and len(kinds) == 1 else hint


def parameter(name: str, hint: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """A parameter of a command, whose annotation may hold an `Option`."""
    if get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], Option):
        kind, option = get_args(hint)
        hint = Annotated[kind, option.for_parameter(name, kind)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def set_parameters(command: Callable[..., None], parameters: Sequence[inspect.Parameter]) -> None:
    """Give a function the signature that typer reads the options of a command from."""
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}


def add_command(app: typer.Typer, command: Callable[..., None], *, panel: str | None = None) -> None:
    """Add a function to an app as the command of its name; its docstring is the help.

    A parameter that is a dataclass of options becomes one option per field, and the command gets an instance.
    """
    groups: dict[str, type] = {}
    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for each in inspect.signature(command).parameters.values():
        kind = hints[each.name]
        if dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            groups[each.name], fields = kind, get_type_hints(kind, include_extras=True)
            parameters += [parameter(f.name, fields[f.name], f.default) for f in dataclasses.fields(kind)]
        else:
            parameters.append(parameter(each.name, kind, each.default))

    def run(**values: Any) -> None:
        made = {
            group: kind(**{field.name: values.pop(field.name) for field in dataclasses.fields(kind)})
            for group, kind in groups.items()
        }
        command(**values, **made)

    set_parameters(run, parameters)
    paragraphs = (inspect.getdoc(command) or "").split("\n\n")
    help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    app.command(name=command.__name__, help=help, rich_help_panel=panel)(run)


def explicit(options: Any, *names: str) -> dict[str, Any]:
    """The options of a group that were given, or those of them with these names."""
    values = {name: getattr(options, name) for name in names or vars(options)}
    return {name: value for name, value in values.items() if value not in (None, []) and value is not False}


Json = Annotated[bool, Option("Print the result as one JSON document.", OUTPUT, flag="--json")]
Quiet = Annotated[bool, Option("Print no progress and no messages, only errors.", OUTPUT, flag="--quiet -q")]
Documents = Annotated[list[Path], typer.Argument(parser=path, help="Files and folders.")]
Library = Annotated[str, Option("Library: a folder or an object-store address.")]
TextField = Annotated[str, Option("Key of the text in JSONL files.")]
Device = Annotated[str | None, Option("Device, such as cpu or cuda:1; an accelerator if there is one.", None, device)]
Bf16 = Annotated[bool, Option("Compute in bfloat16 instead of float32.", ADVANCED)]
EvalSeed = Annotated[int, Option("Random seed.", None, integer(0, MAX_SEED))]
QueryPrompt = Annotated[
    Literal["prediction", "summary"] | None, Option("Prompt of LLARA models for queries; the model's own if not given.")
]
Source = Annotated[
    list[str] | None, Option("Search only files that match this pattern, such as 'docs/*.md'.", SEARCH, None, "PATTERN")
]
SEARCH_MODE_HELP = "Search by meaning (dense), by words (bm25) or by both (fused)."
MemLayers = Annotated[
    list[Any] | None, Option("Layers that attend to memory, such as 3,7-9.", ADVANCED, None, "LAYERS", parse_all=layers)
]
ContextLength = Annotated[int | None, Option("Tokens per encoder window.", ADVANCED)]
LastContextLength = Annotated[int | None, Option("Tokens of the prompt's end in the local context.", ADVANCED)]
MemDtype = Annotated[
    Literal["float32", "bfloat16", "float16", "int8"] | None, Option("Data type of stored keys and values.", ADVANCED)
]


@dataclasses.dataclass(kw_only=True)
class ReaderOptions:
    """The reader of a library."""

    reader: Annotated[
        str | None, Option("Model that reads (folder, .gguf file, hub id, 'default'), if not the recorded one.", READER)
    ] = None
    memory_budget: Annotated[str | None, Option("Disk space for memories, such as 10GB.", READER, None, "SIZE")] = None
    mem_layers: MemLayers = None
    context_length: ContextLength = None
    mem_dtype: MemDtype = None


@dataclasses.dataclass(kw_only=True)
class MemorySearchOptions:
    """How a model searches its memory."""

    mem_search: Annotated[
        Literal["exact", "pages", "faiss"] | None,
        Option("Memory search: exact reads all; pages and faiss read the best matches of a large memory.", ADVANCED),
    ] = None
    mem_top_k: Annotated[int | None, Option("Pages or neighbours that a memory search reads.", ADVANCED)] = None

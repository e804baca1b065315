"""Commands made from dataclasses of settings: every field is a flag and a key of a YAML file."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from llamory.cli import options
from llamory.cli.options import Option, parameter, set_parameters, without_none
from llamory.cli.output import print_result, stdout_redirected
from llamory.errors import LlamoryError

Settings = TypeVar("Settings")

_EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def add_settings_command(
    app: typer.Typer,
    name: str,
    settings_class: type[Settings],
    run: Callable[[Settings], Mapping[str, Any]],
    *,
    help: str | None = None,
) -> None:
    """Add a command whose flags are the fields of a dataclass, and which prints what `run` returns.

    `--config FILE.yaml` holds values by field; flags take precedence. Fields are str, int, float, bool, Path, Literal
    or lists of these, or None; `metadata["help"]` is the help of one. A field `quiet` replaces the flag `--quiet`.
    """
    fields = _fields(settings_class)

    def command(context: typer.Context, config: Path | None, as_json: bool, **values: Any) -> None:
        quiet = values["quiet"]
        overrides = {key: values[key] for key in fields if _is_explicit(context, key)}
        overrides |= {key: False for key in fields if _is_explicit(context, f"no_{key}")}
        settings = read_settings(settings_class, config, overrides)
        with stdout_redirected(quiet=bool(getattr(settings, "quiet", quiet))):
            result = run(settings)
        if os.environ.get("RANK", "0") == "0":  # one of the processes that train together prints
            print_result(result, as_json=as_json)

    config_option = Option("Settings by name; flags take precedence.", metavar="FILE.yaml")
    parameters = [
        parameter("context", typer.Context),
        parameter("config", Annotated[Path | None, config_option], None),
        *(each for field, hint in fields.values() for each in _parameters(field, hint)),
        parameter("as_json", options.Json, False),
    ]
    if "quiet" not in fields:
        parameters.append(parameter("quiet", options.Quiet, False))
    set_parameters(command, parameters)
    app.command(name=name, help=help or inspect.getdoc(settings_class))(command)


def read_settings(settings_class: type[Settings], file: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """Make a dataclass of settings from a YAML file and from values that take precedence over it.

    Raises LlamoryError if the file can't be read, or a key is unknown, missing or invalid.
    """
    from pydantic import TypeAdapter, ValidationError

    from llamory.training.settings import describe_problem

    fields = _fields(settings_class)
    values = _file_values(file, fields) if file else {}
    values |= overrides
    missing = [_flag(name) for name, (field, _) in fields.items() if name not in values and is_required(field)]
    if missing:
        raise LlamoryError(f"{' and '.join(missing)} must be given, as flags or as keys of the --config file.")
    try:
        return TypeAdapter(settings_class).validate_python(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if key in fields:
            where = _flag(key) if key in overrides else f"{key} in {file}"
            raise LlamoryError(f"{where} {describe_problem(first)}.") from error
        raise LlamoryError(first["msg"].removeprefix("Value error, ")) from error


def _fields(settings_class: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(settings_class)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(settings_class) if field.init}


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field has no default."""
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _parameters(field: dataclasses.Field[Any], hint: Any) -> list[inspect.Parameter]:
    kind, flag = without_none(hint), _flag(field.name)
    help = field.metadata.get("help", "")
    if get_origin(kind) is list:
        help = f"{help} (repeatable)" if help else "(repeatable)"
    default: Any = None
    if is_required(field):
        help += " Required here or in --config."
    else:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    callback = None
    if field.name == "mem_layers":
        kind, default = list[str], [options.show_layers(default)] if default else None
        callback = lambda values: options.layers(values) if values else None  # noqa: E731
    no_flag = f"--no-{flag[2:]}"
    names, panel = (f"{flag}/{no_flag}" if default else flag, "Switches") if kind is bool else (flag, None)
    option = typer.Option(names, help=help.replace("[", r"\[").strip(), rich_help_panel=panel, callback=callback)
    annotation: Any = Annotated[kind if isinstance(default, bool) else kind | None, option]
    parameters = [parameter(field.name, annotation, default)]
    if kind is bool and not default:
        # It overrides a setting of the file. Help is easier to read without it.
        hidden = Annotated[bool, typer.Option(no_flag, hidden=True)]
        parameters.append(parameter(f"no_{field.name}", hidden, False))
    return parameters


def _is_explicit(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


def _file_values(file: Path, fields: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in _read_yaml(file).items():
        name = str(key).replace("-", "_")
        if name not in fields:
            close = get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"the keys are {', '.join(fields)}."
            raise LlamoryError(f"{file} has an unknown key, {key}; {hint}")
        kind = without_none(fields[name][1])
        if name == "mem_layers" and isinstance(value, int | str):
            try:
                values[name] = options.layers([str(value)])
            except typer.BadParameter as error:
                raise LlamoryError(f"{name} in {file}: {error.message}") from error
            continue
        is_list = get_origin(kind) is list
        entries = value if is_list and isinstance(value, list) else [value]
        scalar = get_args(kind)[0] if is_list else kind
        optional, where = kind is not fields[name][1], f"{name} in {file}"
        entries = [_scalar(scalar, entry, optional=optional, where=where) for entry in entries]
        values[name] = entries if is_list and value is not None else entries[0]
    return values


def _scalar(kind: Any, value: Any, *, optional: bool, where: str) -> Any:
    """A value as the type of its field; truth values are no numbers, and `1e3`, text in YAML, is one."""
    if value is None and optional:
        return None
    from pydantic import TypeAdapter, ValidationError

    try:
        if isinstance(value, bool) != (kind is bool):
            raise ValueError(value)
        return TypeAdapter(kind).validate_python(float(value) if kind is int and isinstance(value, str) else value)
    except (ValueError, ValidationError) as error:
        expected = _EXPECTED.get(kind) or f"one of {', '.join(map(str, get_args(kind)))}"
        raise LlamoryError(f"{where} must be {expected}, not {value!r}.") from error


def _read_yaml(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LlamoryError(f"There is no settings file {file}.") from error
    except UnicodeDecodeError as error:
        raise LlamoryError(f"The settings file {file} is not a text file in UTF-8.") from error
    except yaml.YAMLError as error:
        position = getattr(error, "problem_mark", None)
        where = f" in line {position.line + 1}" if position else ""
        raise LlamoryError(f"{file} is not valid YAML: {getattr(error, 'problem', error)}{where}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LlamoryError(f"{file} must hold settings, one `name: value` a line, not a {type(content).__name__}.")
    return content

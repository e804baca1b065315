"""Commands made from dataclasses: every field is a flag, and a YAML file may give the same names."""

from __future__ import annotations

import dataclasses
import inspect
import os
import types
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer

from llamory.cli.output import Json, Quiet, print_result, stdout_redirected
from llamory.errors import LlamoryError

Settings = TypeVar("Settings")

_SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}


def add_dataclass_command(
    app: typer.Typer,
    name: str,
    settings_class: type[Settings],
    run: Callable[[Settings], Mapping[str, Any]],
    *,
    help: str | None = None,
) -> None:
    """Add a command whose flags are a dataclass's fields.

    A field `learning_rate` is the flag `--learning-rate`; its help is `metadata["help"]`. `--config FILE.yaml` gives
    values under the fields' names, and flags win over it. The command prints what `run` gives.

    Args:
        app: where the command goes.
        name: the command's name.
        settings_class: a dataclass with fields of str, int, float, bool, Path, a Literal of texts, a list of one of
            these, or one of these or None. Its own field `quiet`, if any, takes the place of the flag `--quiet`.
        run: does the work.
        help: what the command does, for its help page.
    """
    fields = _fields(settings_class)

    def command(*, config: Path | None, as_json: bool, **flags: Any) -> None:
        quiet = False if "quiet" in fields else flags.pop("quiet")
        given = {key: value for key, value in flags.items() if value is not None and value != []}
        settings = read_settings(settings_class, config, given)
        with stdout_redirected(quiet=bool(getattr(settings, "quiet", quiet))):
            result = run(settings)
        if os.environ.get("RANK", "0") == "0":  # of several processes that train together, one speaks
            print_result(result, as_json=as_json)

    parameters = [_flag(field, hint) for field, hint in fields.values()]
    config_option = typer.Option(
        "--config", metavar="FILE.yaml", show_default=False, help="Settings under the flags' names; flags win."
    )
    parameters += [
        _parameter("config", Path | None, config_option),
        inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Json),
    ]
    if "quiet" not in fields:
        parameters.append(inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet))
    # typer reads a command's options from its signature, which here is only known now.
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name=name, help=help or inspect.getdoc(settings_class))(command)


def read_settings(settings_class: type[Settings], file: Path | None, given: Mapping[str, Any]) -> Settings:
    """Make a dataclass from a YAML file and from values that win over it.

    Raises:
        LlamoryError: the file can't be read, a key is unknown, a value has the wrong type, or one is missing; the
            sentence names it.
    """
    fields = _fields(settings_class)
    values: dict[str, Any] = {}
    for key, value in (_read_yaml(file) if file else {}).items():
        name = str(key).replace("-", "_")
        if name not in fields:
            close = get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it may have {', '.join(fields)}."
            raise LlamoryError(f"{file} has an unknown key, {key}; {hint}")
        values[name] = _value(fields[name][1], value, f"{name} in {file}")
    values.update(given)
    missing = [_flag_name(name) for name, (field, _) in fields.items() if name not in values and _required(field)]
    if missing:
        raise LlamoryError(f"{' and '.join(missing)} must be given, as flags or as keys of the --config file.")
    return settings_class(**values)


# ---- flags -----------------------------------------------------------------------------------------------------------


def _fields(settings_class: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    hints = get_type_hints(settings_class)
    found = dataclasses.fields(settings_class)
    return {field.name: (field, hints[field.name]) for field in found if field.init}


def _flag(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    kind, _ = _without_none(hint)
    flag = _flag_name(field.name)
    help = field.metadata.get("help", "")
    if get_origin(kind) is list:
        help += "  [repeatable]"
    if _required(field):
        help += "  [required]"
    else:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if default not in (None, [], ""):
            help += f"  [default: {_format_default(default)}]"
    option = typer.Option(f"{flag}/--no-{flag[2:]}" if kind is bool else flag, help=help.strip(), show_default=False)
    return _parameter(field.name, kind | None, option)


def _parameter(name: str, annotation: Any, option: Any) -> inspect.Parameter:
    """A parameter whose value is None unless its flag is given, so that a file's value isn't hidden by a default."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def _flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def _format_default(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return ", ".join(map(str, default)) if isinstance(default, list) else str(default)


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type without `| None`, and whether None was part of it."""
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    if len(kinds) != 1:
        raise TypeError(f"A flag must have one type, not {hint}.")
    return kinds[0], True


# ---- files -----------------------------------------------------------------------------------------------------------


def _read_yaml(file: Path) -> dict[Any, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LlamoryError(f"There is no settings file {file}.") from error
    except UnicodeDecodeError as error:
        raise LlamoryError(f"The settings file {file} is not a text file in UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise LlamoryError(f"{file} is not valid YAML: {getattr(error, 'problem', error)}{where}.") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise LlamoryError(f"{file} must hold settings, one `name: value` a line, not a {type(content).__name__}.")
    return content


def _value(hint: Any, value: Any, where: str) -> Any:
    """A YAML value as the type that a field asks for."""
    kind, optional = _without_none(hint)
    if value is None and optional:
        return None
    if get_origin(kind) is list:
        (entry,) = get_args(kind)
        return [_value(entry, each, where) for each in (value if isinstance(value, list) else [value])]
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise LlamoryError(f"{where} must be one of {', '.join(map(str, get_args(kind)))}, not {value!r}.")
        return value
    try:
        return _scalar(kind, value)
    except ValueError as error:
        raise LlamoryError(f"{where} must be {_SCALARS[kind]}, not {value!r}.") from error


def _scalar(kind: type, value: Any) -> Any:
    if kind is int and type(value) is int:
        return value
    if kind in (int, float) and not isinstance(value, bool) and isinstance(value, int | float | str):
        number = float(value)  # also from a str, as YAML reads 1e-5 as text
        if kind is float:
            return number
        if number.is_integer():
            return int(number)
    elif kind is Path and isinstance(value, str):
        return Path(value)
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    raise ValueError(value)

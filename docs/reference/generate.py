"""Writes cli.md and settings.md, the reference of the command line and of the training settings, from the code.

Run `python docs/reference/generate.py` after a change of an option, a setting or a help text.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.testing import CliRunner

from llamory.cli import app
from llamory.cli.settings import is_required
from llamory.cli.train import COMMANDS

FOLDER = Path(__file__).parent
NOTE = "<!-- Written by docs/reference/generate.py; change the code instead. -->\n\n"
ENVIRONMENT = {"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
ANSI_CODES = re.compile(r"\x1b\[[0-9;]*m")


def pages() -> dict[str, str]:
    """The text of every generated page by its file name."""
    return {"cli.md": NOTE + cli_page(), "settings.md": NOTE + settings_page()}


def cli_page() -> str:
    """The help of every command, as `llamory COMMAND --help` prints it in 100 columns."""
    sections = ["# Command line\n", "The settings of `llamory train` are in [settings.md](settings.md).\n"]
    for arguments in commands(typer.main.get_command(app)):
        if arguments[:1] == ("train",) and len(arguments) > 1:
            continue
        result = CliRunner().invoke(app, [*arguments, "--help"], prog_name="llamory", env=ENVIRONMENT)
        assert result.exit_code == 0, result.output
        lines = [line.strip("\n").rstrip() for line in ANSI_CODES.sub("", result.output).splitlines()]
        text = "\n".join(lines).strip("\n")
        sections.append(f"## {' '.join(['llamory', *arguments])}\n\n```text\n{text}\n```\n")
    return "\n".join(sections)


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The names of a command and all its subcommands, outer ones first."""
    yield path
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from commands(subcommand, (*path, name))


def settings_page() -> str:
    """A table per class of training settings; each lists the settings that it declares itself."""
    sections = [
        "# Training settings\n",
        "Every setting is a flag (`learning_rate` is `--learning-rate`, and `--no-streaming` turns `streaming` off)",
        "and a key of the YAML file given as `--config`; flags take precedence. A command has the settings of its own",
        "class and of the classes that it extends.\n",
    ]
    users: dict[type, list[str]] = {}
    for name, (settings, *_) in COMMANDS.items():
        for each in reversed(settings.__mro__):
            if dataclasses.is_dataclass(each):
                users.setdefault(each, []).append(name)
    for settings, names in users.items():
        commands_ = ", ".join(f"`llamory train {name}`" for name in names)
        sections.append(f"## {settings.__name__}\n\nOf {commands_}.\n\n{settings_table(settings)}")
    return "\n".join(sections)


def settings_table(settings: type) -> str:
    """The settings that a class declares itself: name, type, default and meaning."""
    hints = get_type_hints(settings)
    lines = ["| setting | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(settings):
        if field.name in vars(settings).get("__annotations__", {}):
            help = field.metadata.get("help", "").replace("|", "\\|")
            lines.append(f"| `{field.name}` | {type_name(hints[field.name])} | {default_text(field)} | {help} |")
    return "\n".join(lines) + "\n"


def type_name(hint: Any) -> str:
    """A type in words."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    if NoneType in get_args(hint):
        return " or ".join(map(type_name, kinds))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in kinds)
    if get_origin(hint) in (list, tuple):
        return f"list of {type_name(kinds[0])}"
    return str(getattr(hint, "__name__", hint))


def default_text(field: dataclasses.Field[Any]) -> str:
    """A default as it is written in YAML."""
    if is_required(field):
        return "required"
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if isinstance(default, list | tuple):
        default = f"[{', '.join(map(str, default))}]"
    return "" if default is None else f"`{str(default).lower() if isinstance(default, bool) else default}`"


if __name__ == "__main__":
    for file, page in pages().items():
        (FOLDER / file).write_text(page, encoding="utf-8")

"""The documentation names what exists: files, functions, links, commands and flags."""

from __future__ import annotations

import ast
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "llamory"
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
REFERENCE = ROOT / "docs" / "reference"

page_of_docs = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@cache
def names_in(path: Path) -> frozenset[str]:
    """Functions, methods, classes and constants that a module defines or imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return frozenset(names)


@page_of_docs
def test_named_files_and_functions_exist(page: Path) -> None:
    for path, name in re.findall(r"`(?:src/llamory/)?([\w/]+\.py)(?::(\w+))?`", page.read_text(encoding="utf-8")):
        found = [folder / path for folder in (SOURCE, ROOT) if (folder / path).exists()]
        if "/" not in path or path.endswith("/NAME.py"):
            continue  # a name without its folder, or a placeholder
        assert found, f"{path} does not exist"
        if name:
            assert name in names_in(found[0]), f"{path} has no {name}"


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@page_of_docs
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{target} does not exist"
        if anchor:
            assert anchor in anchors(linked), f"{target}: no such heading"


@cache
def cli() -> Any:
    import typer

    from llamory.cli import app

    return typer.main.get_command(app)


def commands_in(page: Path) -> list[list[str]]:
    """The words of every `llamory ...` line in the page's code blocks."""
    blocks = re.findall(r"(?ms)^```bash\n(.*?)^```", page.read_text(encoding="utf-8"))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("llamory ")]


@page_of_docs
def test_commands_and_flags_exist(page: Path) -> None:
    for words in commands_in(page):
        command = cli()
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command, words = command.commands[words[0]], words[1:]
        assert not hasattr(command, "commands"), f"{words[:1]} is no command"
        flags = {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)}
        unknown = [word for word in words if word.startswith("--") and word.partition("=")[0] not in flags]
        assert not unknown, f"{command.name} has no {unknown}"


def test_the_commands_of_the_readme_are_read() -> None:
    assert len(commands_in(ROOT / "README.md")) >= 8


def test_pages_stay_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
    assert len((ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()) <= 200

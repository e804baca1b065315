"""Runs the command line inside the test, and puts back what it changes in the process."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from llamory.cli import main
from llamory.documents import SkippedFile
from llamory.library import AddReport, Hit


class Ran(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


Llamory = Callable[..., Ran]


@pytest.fixture
def llamory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Llamory]:
    """The command line, as a function of its arguments."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("LLAMORY_DEBUG", raising=False)
    before = dict(os.environ)

    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end, warnings.catch_warnings():
            main([str(argument) for argument in arguments])
        assert isinstance(end.value.code, int)
        return Ran(end.value.code, *capsys.readouterr())

    yield run
    os.environ.clear()
    os.environ.update(before)


HITS = [
    Hit(
        "A lamp gives light.\n\nIt needs oil.\nAnd a wick.\nAnd a match.",
        "docs/lamp.md",
        "Lamps",
        12,
        0.8125,
        cosine=0.8125,
    ),
    Hit("Wicks are cotton\x1b[31m.", "docs/wick.md", "", 1, 0.5),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands in for the library and records what it is asked."""
    made: list[tuple] = []

    class Library:
        def __init__(self, path: str, **settings: Any) -> None:
            made.append(("library", path, settings))

        def search(self, query: str, top: int, **settings: Any) -> list[Hit]:
            print("searching ...")
            made.append(("search", query, top, settings))
            return [] if query == "nothing" else HITS[:top]

        def add(self, paths: list[Path], **settings: Any) -> AddReport:
            print("reading ...")
            made.append(("add", paths, settings))
            broken = [SkippedFile("b/bad\x1b.txt", "no text")] if "b" in map(str, paths) else []
            nothing = AddReport(failed=broken)
            return nothing if paths == [Path("b")] else AddReport(3, 2, 1, 0, 41, broken)

        def remove(self, paths: list[Path], **settings: Any) -> AddReport:
            made.append(("remove", paths, settings))
            return AddReport(removed=2)

        def info(self) -> dict[str, Any]:
            return {"path": made[-1][1], "documents": 3, "passages": 41}

    monkeypatch.setitem(sys.modules, "llamory.library", SimpleNamespace(Library=Library))
    return made

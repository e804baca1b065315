"""Runs the command line inside the test, and puts back what it changes in the process."""

import os
import warnings
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from llamory.cli import main


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

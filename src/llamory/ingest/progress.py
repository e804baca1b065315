"""How far reading has come: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

_SECONDS_BETWEEN_LINES = 10.0


class _Speed(ProgressColumn):
    """Tokens per second, lately."""

    def render(self, task: Any) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} tokens/s")


class ReadingBar:
    """Tokens read, tokens per second and the time left, on standard error.

    Args:
        tokens: all that is to be read.
        read: what was read before; it doesn't count for the speed.
        shown: whether anything is shown.
    """

    def __init__(self, tokens: int, read: int = 0, *, shown: bool = True):
        console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._lines = shown and not console.is_terminal
        self._console = console
        self._bar = Progress(
            TextColumn("Reading {task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
            _Speed(),
            TimeRemainingColumn(),
            console=console,
            disable=not shown or self._lines,
        )
        self._task = self._bar.add_task("", total=tokens, completed=read)
        self._tokens, self._read, self._now = tokens, read, 0
        self._started = self._said = time.perf_counter()

    def __enter__(self) -> ReadingBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, name: str, tokens: int) -> None:
        """So many more tokens of a document are read."""
        self._now += tokens
        self._bar.update(self._task, advance=tokens, description=name)
        now = time.perf_counter()
        if self._lines and now - self._said >= _SECONDS_BETWEEN_LINES:
            self._said = now
            speed = self._now / (now - self._started)
            done = self._read + self._now
            left = int((self._tokens - done) / speed)
            self._console.print(
                f"{name}: {done:,} of {self._tokens:,} tokens, {speed:,.0f} tokens/s, {left // 60}:{left % 60:02} left",
                markup=False,
            )

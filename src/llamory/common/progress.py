"""Progress on standard error: a rich bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


class _Speed(ProgressColumn):
    """Recent units per second."""

    def render(self, task: Any) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {task.fields['unit']}/s")


class ProgressBar:
    """Units done, units per second and the time remaining; a context manager.

    Args:
        title: what is being done, such as "Indexing".
        unit: name of a unit in the plural, such as "tokens".
        completed: units done by an earlier run; they don't count for the speed.
        shown: whether anything is written.
        speed: whether the bar shows units per second.
    """

    def __init__(
        self, title: str, total: int, *, unit: str, completed: int = 0, shown: bool = True, speed: bool = False
    ):
        self._console = console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._shown, self._lines = shown, shown and not console.is_terminal
        self._title, self._total, self._earlier = title, total, completed
        self._start = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} {task.fields[unit]}", markup=False),
            *([_Speed()] if speed else []),
            TimeRemainingColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
            disable=not shown or self._lines or not total,
        )
        self._bar.add_task(title, total=total, completed=completed, unit=unit, detail="")
        self._task = self._bar.tasks[0]

    def __enter__(self) -> ProgressBar:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Draw the bar; the time counts from here."""
        self._start = self._last_line = time.monotonic()
        self._bar.start()

    def stop(self) -> None:
        """Give the terminal back; may be called twice."""
        self._bar.stop()

    def advance(self, units: int = 1, *, description: str | None = None, detail: str | None = None) -> None:
        """Count more units; `description` names the current item, `detail` is text behind the figures."""
        heading = self._task.description if description is None else f"{self._title} {description}".rstrip()
        detail = self._task.fields["detail"] if detail is None else detail
        self._bar.update(self._task.id, advance=units, description=heading, detail=detail)
        now = time.monotonic()
        if self._lines and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            self.print(self._line(now - self._start))

    def print(self, line: str) -> None:
        """Write a line above the bar."""
        if self._shown:
            self._console.print(line, markup=False)

    def _line(self, elapsed: float) -> str:
        completed, unit, detail = self._task.completed, self._task.fields["unit"], self._task.fields["detail"]
        line = f"{self._task.description}: {completed:,} of {self._total:,} {unit}"
        if rate := (completed - self._earlier) / elapsed if elapsed else 0.0:
            minutes, seconds = divmod(max(0, round((self._total - completed) / rate)), 60)
            line += f", {rate:,.{0 if rate >= 10 else 1}f} {unit}/s, {minutes}:{seconds:02} remaining"
        return f"{line}, {detail}" if detail else line

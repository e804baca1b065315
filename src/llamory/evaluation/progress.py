"""Progress of an evaluation on standard error: a rich bar on a terminal, a line per cell where there is none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from llamory.evaluation.passkey import Cell


class CellProgress:
    """Shows how far an evaluation is; the bar counts tokens, as long prompts take longer."""

    def __init__(self, title: str | None, lengths: Sequence[int], trials: int) -> None:
        """`lengths` are those of the cells to come; no title: nothing is shown."""
        self.title = title
        self.total = sum(lengths) * trials
        self.cells, self.num_reported = len(lengths), 0
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        self.task: Any = None

    def __enter__(self) -> CellProgress:
        if self.title is not None and self.cells and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self.bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, tokens: int) -> None:
        """Move the bar by one prompt."""
        if self.bar is not None:
            self.bar.advance(self.task, tokens)

    def report(self, cell: Cell) -> None:
        """Say what a finished cell has shown."""
        self.num_reported += 1
        if self.title is not None:
            self.console.print(
                f"{self.title} {self.num_reported}/{self.cells}: {cell.length:,} tokens, depth {cell.depth:.0%}: "
                f"found {cell.accuracy:.0%} ({cell.seconds:.1f} s a prompt)",
                highlight=False,
                soft_wrap=True,
                markup=False,
            )

"""Training progress on a terminal: a rich bar with the losses, plain lines where there is no terminal."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

_DISPLAYED_METRICS = (
    "loss",
    "ar_loss",
    "bow_summarize_loss",
    "bow_predict_loss",
    "teacher_loss",
    "accuracy",
    "lines",
    "contexts",
    "eval_loss",
    "eval_loss_without_memory",
)


class RichProgress(TrainerCallback):
    """Shows steps, losses and the time left on standard error."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.console = Console(file=sys.stderr)
        self.bar: Progress | None = None
        self.task: Any = None
        self.started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start the bar at the step that the run begins or goes on from."""
        self.started = time.perf_counter()
        if state.is_world_process_zero and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"))
            self.bar = Progress(*columns, *times, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, losses="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Show the newest losses."""
        shown = "  ".join(f"{key} {_number(logs[key])}" for key in _DISPLAYED_METRICS if key in (logs or {}))
        if not shown or not state.is_world_process_zero:
            return
        if self.bar is not None:
            self.bar.update(self.task, losses=shown)
        seconds = time.perf_counter() - self.started
        self.console.print(
            f"step {state.global_step}/{state.max_steps}  {shown}  ({seconds:.0f} s)", highlight=False, soft_wrap=True
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Stop the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also after an error."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"

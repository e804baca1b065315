"""Stages that a run goes through as its training accuracy rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_KEPT = 0.9  # of the running mean, at each step
_LEAST_STEPS = 10


class Growth:
    """Goes to the next stage when the running mean of accuracy reaches what the stage asks for.

    Args:
        stages: of anything, the last entry of each being the accuracy at which the next begins.
    """

    def __init__(self, stages: Sequence[tuple[int, int, float]]) -> None:
        self.stages = list(stages)
        self.at, self.mean, self.steps = 0, 0.0, 0

    @property
    def stage(self) -> tuple[int, int, float]:
        """The present one."""
        return self.stages[self.at]

    @property
    def is_last(self) -> bool:
        """Whether no other follows."""
        return self.at + 1 == len(self.stages)

    def observe(self, accuracy: float) -> None:
        """Hear the training accuracy of a step; the running mean begins anew with each stage."""
        self.mean = _KEPT * self.mean + (1 - _KEPT) * accuracy if self.steps else accuracy
        self.steps += 1
        if self.steps >= _LEAST_STEPS and self.mean >= self.stage[-1] and not self.is_last:
            self.at, self.steps = self.at + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {"at": self.at, "mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self.at, self.mean, self.steps = state["at"], state["mean"], state["steps"]

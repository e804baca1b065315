"""Stages that a run goes through as its training accuracy rises."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from llamory.errors import LlamoryError

_DECAY = 0.9  # of the running mean, at each step
_MIN_STEPS = 10

Stage = TypeVar("Stage")


class Curriculum(Generic[Stage]):
    """Goes to the next stage when the running mean of accuracy reaches what the stage asks for.

    Args:
        stages: each with the accuracy at which the next one begins; at least one.
    """

    def __init__(self, stages: Sequence[tuple[Stage, float]]) -> None:
        self.stages = list(stages)
        self.stage_index, self.mean, self.steps = 0, 0.0, 0

    @property
    def stage(self) -> Stage:
        """The present one."""
        return self.stages[self.stage_index][0]

    @property
    def is_last(self) -> bool:
        """Whether no other follows."""
        return self.stage_index + 1 == len(self.stages)

    def observe(self, accuracy: float) -> None:
        """Hear the training accuracy of a step; the running mean begins anew with each stage, at its first accuracy.

        Raises:
            LlamoryError: not an accuracy.
        """
        if not 0 <= accuracy <= 1:
            raise LlamoryError(f"An accuracy is between 0 and 1, not {accuracy}.")
        self.mean = _DECAY * self.mean + (1 - _DECAY) * accuracy if self.steps else accuracy
        self.steps += 1
        if self.steps >= _MIN_STEPS and self.mean >= self.stages[self.stage_index][1] and not self.is_last:
            self.stage_index, self.steps = self.stage_index + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {"at": self.stage_index, "mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            LlamoryError: the state is of more stages.
        """
        if not 0 <= state["at"] < len(self.stages):
            raise LlamoryError(
                f"This run has grown to its size {state['at'] + 1}, but {len(self.stages)} sizes are given; give those "
                "that it was begun with."
            )
        self.stage_index, self.mean, self.steps = state["at"], state["mean"], state["steps"]

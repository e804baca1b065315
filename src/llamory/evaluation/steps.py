"""Progress of an evaluation whose steps say themselves, in a line, what they have shown."""

from __future__ import annotations

from llamory.evaluation.progress import CellProgress


class StepProgress(CellProgress):
    """A bar that counts tokens, and a line per step; `lengths` are the tokens of the steps to come."""

    def __enter__(self) -> StepProgress:
        super().__enter__()
        return self

    def step(self, tokens: int, text: str) -> None:
        """A step of so many tokens is done, and this is what it has shown."""
        self.advance(tokens)
        self.num_reported += 1
        if self.title is not None:
            self.console.print(
                f"{self.title} {self.num_reported}/{self.cells}: {text}", highlight=False, soft_wrap=True, markup=False
            )

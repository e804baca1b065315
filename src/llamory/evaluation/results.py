"""Results of an evaluation on disk: one JSON file, whole at any moment, and taken up again by a later run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TextIO, TypeVar

from llamory.errors import LlamoryError

Score = TypeVar("Score")


class Record(Generic[Score]):
    """What one or more models scored at the same task, kept in a JSON file.

    Attributes:
        path: the file.
        task: the evaluation's name, which the file begins with.
        settings: all that the scores depend on but the model and what tells one score from another; JSON-able.
        scores: per model, by its name, what was scored so far.
        facts: per model, JSON-able facts that its scores depend on.
    """

    def __init__(
        self,
        path: Path,
        task: str,
        settings: Mapping[str, Any],
        score_class: Callable[..., Score],
        summarise: Callable[[Sequence[Score]], Sequence[Any]],
    ) -> None:
        """Take up the scores that the file has, if any.

        Args:
            path: the file.
            task: the evaluation's name.
            settings: what the scores depend on.
            score_class: the dataclass of a score; lists of the file come back to it as lists.
            summarise: makes the points of a curve, dataclasses too, of a model's scores.

        Raises:
            LlamoryError: the file has scores of other settings, or isn't such a file.
        """
        self.path, self.task = path, task
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it comes back from the file
        self._score_class, self._summarise = score_class, summarise
        self.scores: dict[str, list[Score]] = {}
        self.facts: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._take_up()

    def run(self, name: str, facts: Mapping[str, Any]) -> list[Score]:
        """The scores of a model, with what was scored before, to be filled.

        Raises:
            LlamoryError: what was scored before is of another model.
        """
        known: dict[str, Any] = json.loads(json.dumps(facts))
        refuse_other(self.path, self.facts.get(name, known), known)
        self.facts[name] = known
        return self.scores.setdefault(name, [])

    def curve(self, name: str) -> list[Any]:
        """The points of a model's curve."""
        return list(self._summarise(self.scores[name]))

    def document(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        runs = {
            name: self.facts[name]
            | {"curve": [asdict(point) for point in self.curve(name)], "scores": [vars(score) for score in scores]}
            for name, scores in self.scores.items()
        }
        return {"evaluation": self.task, "settings": self.settings, "runs": runs}

    def write(self) -> None:
        """Write the file: beside it first, then renamed, so that a kill leaves the old one or the new one."""
        write_whole(self.path, self.document())

    def _take_up(self) -> None:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["evaluation"] != self.task:
                raise KeyError("evaluation")
            settings = dict(document["settings"])
            for name, run in document["runs"].items():
                self.scores[name] = [self._score_class(**entry) for entry in run["scores"]]
                self.facts[name] = {key: value for key, value in run.items() if key not in ("curve", "scores")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LlamoryError(
                f"{self.path} holds no {self.task} results to go on with; give another --output, or remove the file."
            ) from error
        refuse_other(self.path, settings, self.settings)


def write_whole(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file: beside it first, then renamed, so that a kill leaves the old one or the new one."""
    with _beside(path) as file:
        json.dump(document, file, ensure_ascii=False, indent=1)
        file.write("\n")


def write_lines(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON lines file, as `write_whole` does."""
    with _beside(path) as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


@contextmanager
def _beside(path: Path) -> Iterator[TextIO]:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def refuse_other(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that what a file was made with is what is given now.

    Raises:
        LlamoryError: it isn't; the first difference is told.
    """
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key):
            change = f"{key.replace('_', ' ')} {_short(before.get(key))}, now {_short(now.get(key))}"
            raise LlamoryError(
                f"{path} holds results made with other settings ({change}); give another --output, or remove the file."
            )


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

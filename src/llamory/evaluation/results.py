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


class ResultsFile(Generic[Score]):
    """What one or more models scored at the same task, kept in a JSON file.

    Attributes:
        path: the file.
        task: the evaluation's name, which the file begins with.
        settings: all that the scores depend on but the model and what tells one score from another; JSON-able.
        scores: per model, by its name, what was scored so far.
        metadata: per model, JSON-able metadata that its scores depend on.
    """

    def __init__(
        self,
        path: Path,
        task: str,
        settings: Mapping[str, Any],
        score_class: Callable[..., Score],
        summarize: Callable[[Sequence[Score]], Sequence[Any]],
    ) -> None:
        """Take up the scores that the file has, if any.

        Args:
            path: the file.
            task: the evaluation's name.
            settings: what the scores depend on.
            score_class: the dataclass of a score; lists of the file come back to it as lists.
            summarize: makes the points of a curve, dataclasses too, of a model's scores.

        Raises:
            LlamoryError: the file has scores of other settings, or isn't such a file.
        """
        self.path, self.task = path, task
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))  # as it comes back from the file
        self._score_class, self._summarize = score_class, summarize
        self.scores: dict[str, list[Score]] = {}
        self.metadata: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._load()

    def run(self, name: str, metadata: Mapping[str, Any]) -> list[Score]:
        """The scores of a model, with what was scored saved, to be filled.

        Raises:
            LlamoryError: what was scored saved is of another model.
        """
        metadata_json: dict[str, Any] = json.loads(json.dumps(metadata))
        require_same_settings(self.path, self.metadata.get(name, metadata_json), metadata_json)
        self.metadata[name] = metadata_json
        return self.scores.setdefault(name, [])

    def curve(self, name: str) -> list[Any]:
        """The points of a model's curve."""
        return list(self._summarize(self.scores[name]))

    def document(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        runs = {
            name: self.metadata[name]
            | {"curve": [asdict(point) for point in self.curve(name)], "scores": [vars(score) for score in scores]}
            for name, scores in self.scores.items()
        }
        return {"evaluation": self.task, "settings": self.settings, "runs": runs}

    def write(self) -> None:
        """Write the file: beside it first, then renamed, so that a kill leaves the old one or the new one."""
        write_json_atomic(self.path, self.document())

    def _load(self) -> None:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            if document["evaluation"] != self.task:
                raise KeyError("evaluation")
            settings = dict(document["settings"])
            for name, run in document["runs"].items():
                self.scores[name] = [self._score_class(**entry) for entry in run["scores"]]
                self.metadata[name] = {key: value for key, value in run.items() if key not in ("curve", "scores")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LlamoryError(
                f"{self.path} holds no {self.task} results to go on with; give another --output, or remove the file."
            ) from error
        require_same_settings(self.path, settings, self.settings)


def write_json_atomic(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON file: beside it first, then renamed, so that a kill leaves the old one or the new one."""
    with _atomic_writer(path) as file:
        json.dump(document, file, ensure_ascii=False, indent=1)
        file.write("\n")


def write_jsonl(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSON lines file, as `write_json_atomic` does."""
    with _atomic_writer(path) as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


@contextmanager
def _atomic_writer(path: Path) -> Iterator[TextIO]:
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def require_same_settings(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that what a file was made with is what is given now.

    Raises:
        LlamoryError: it isn't; the first difference is told.
    """
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            change = f"{key.replace('_', ' ')} {_short(saved.get(key))}, now {_short(now.get(key))}"
            raise LlamoryError(
                f"{path} holds results made with other settings ({change}); give another --output, or remove the file."
            )


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."

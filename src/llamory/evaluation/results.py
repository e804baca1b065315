"""Resumable results of all evaluations, in a JSON file that is complete after every write, and their loops."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from llamory.common.io import write_json
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.evaluation.plots import Line

Item = TypeVar("Item")
Score = TypeVar("Score")

# Keys that earlier versions wrote, and the names they have now.
_OLD_KEYS = {
    "focus": "evidence_ratio",
    "measure": "score_type",
    "mem_only_top_k": "mem_top_k_attention",
    "mem_log_scale": "logn_attention_scale",
    "mem_log_start": "logn_attention_start",
    "mem_log_bias": "memory_size_bias",
    "mem_log_bias_start": "memory_size_bias_start",
    "whole": "value_accuracy",
    "asked": "num_values",
    "reading": "encode_seconds",
    "asking": "query_seconds",
    "peak": "peak_bytes",
}
_OLD_VALUES = {("windows", "apart"): "independent"}


class ResultsFile(Generic[Score]):
    """Scores of models at one evaluation, in a JSON file that a later run resumes.

    `settings` holds all that scores depend on except the model and the keys of a single score, and `metadata` what the
    scores of each model depend on; both are JSON-able. Without a path nothing is written.
    """

    evaluation: ClassVar[str]
    score_class: ClassVar[Callable[..., Any]]
    scores_key: ClassVar[str] = "scores"
    summary_keys: ClassVar[tuple[str, ...]] = ()  # of what `_summary` returns

    def __init__(self, path: Path | None, settings: Mapping[str, Any] | None = None) -> None:
        """Load the scores of the file, if it exists; without `settings`, its settings too.

        Raises a LlamoryError if the folder is a file, or the file has scores of other settings or another evaluation.
        """
        if path is not None and path.parent.exists() and not path.parent.is_dir():
            raise LlamoryError(f"{path.parent} is a file; give a folder as --output.")
        self.path = path
        self.settings: dict[str, Any] = _as_json(settings or {})
        self.scores: dict[str, list[Score]] = {}
        self.metadata: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            saved = self._load(path)
            if settings is None:
                self.settings = saved
            _require_same(path, saved, self.settings)

    def run(self, name: str, metadata: Mapping[str, Any]) -> list[Score]:
        """The scores of a model, with those of earlier runs, as a list to extend; other metadata is an error."""
        metadata = _as_json(metadata)
        if self.path is not None:
            _require_same(self.path, self.metadata.get(name, metadata), metadata)
        self.metadata[name] = metadata
        return self.scores.setdefault(name, [])

    def document(self) -> dict[str, Any]:
        """The content of the file."""
        return {
            "evaluation": self.evaluation,
            "settings": self.settings,
            "runs": {name: self.metadata[name] | self._summary(name) | self._entries(name) for name in self.scores},
        }

    def write(self) -> None:
        """Write the file atomically."""
        if self.path is not None:
            write_json(self.path, self.document())

    def _encode(self, score: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        return asdict(score)

    def _decode(self, entry: Mapping[str, Any]) -> Any:
        return self.score_class(**_with_new_keys(entry))

    def _summary(self, name: str) -> dict[str, Any]:  # noqa: ARG002
        """Entries about all scores of a model."""
        return {}

    def _entries(self, name: str) -> dict[str, Any]:
        """The entry with the scores of a model."""
        return {self.scores_key: [self._encode(score, self.metadata[name]) for score in self.scores[name]]}

    def _load_scores(self, name: str, run: Mapping[str, Any]) -> list[Score]:  # noqa: ARG002
        return [self._decode(entry) for entry in run[self.scores_key]]

    def _load(self, path: Path) -> dict[str, Any]:
        """Load scores and metadata, and return the settings."""
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["evaluation"] != self.evaluation:
                raise ValueError(f"results of {document['evaluation']}")
            settings = _with_new_keys(document["settings"])
            for name, run in document["runs"].items():
                self.scores[name] = self._load_scores(name, run)
                hidden = (self.scores_key, *self.summary_keys)
                self.metadata[name] = _with_new_keys({key: run[key] for key in run if key not in hidden})
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            message = f"{path} holds no {self.evaluation} results to resume; give another --output, or remove the file."
            raise LlamoryError(message) from error
        return settings


class CurveResultsFile(ResultsFile[Score]):
    """Results with a curve for each model: means over the scores at each length."""

    summary_keys = ("curve",)
    make_curve: ClassVar[Callable[..., list[Any]]]

    def curve(self, name: str) -> list[Any]:
        """The points of a model's curve."""
        return self.make_curve(self.scores[name])

    def lines(self, x: str, y: str, error: str | None = None) -> list[Line]:
        """Lines of a plot, one for each model that has scores, from attributes of the points of its curve."""
        lines = []
        for name, shown in display_names(self.scores).items():
            if curve := self.curve(name):
                xs, ys = ([getattr(point, each) for point in curve] for each in (x, y))
                bars = None if error is None else [getattr(point, error) for point in curve]
                lines.append(Line(shown, xs, ys, None if bars is None or None in bars else bars))
        return lines

    def _summary(self, name: str) -> dict[str, Any]:
        return {"curve": [asdict(point) for point in self.curve(name)]}


def run_models(
    results: ResultsFile[Score],
    names: Sequence[str],
    run: Callable[[str, Any, list[Score], str], Any],
    model_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Load one model after the other, run it, and write the results.

    Existing scores are resumed: `run` gets a name, the model, the list of its scores, to extend, and its display name.
    """
    from llamory.longllama.loading import load_long_model

    for name, title in display_names(names).items():
        model = load_long_model(name, **(model_kwargs or {}))
        run(name, model, results.run(name, model_metadata(model)), title)
        del model  # two models at once may not fit
    results.write()


def run_pending(
    pending: Sequence[Item],
    run: Callable[[Item, ProgressBar], tuple[Score, str]],
    *,
    tokens: int,
    add: Callable[[Score], Any],
    on_score: Callable[[Score], Any] | None,
    title: str | None,
) -> None:
    """Run each item, with progress on standard error unless `title` is None.

    `run` advances the progress, by `tokens` in total, and returns the score and a line about it; `add` stores the
    score, `on_score` is called after that.
    """
    with ProgressBar(title or "", tokens, unit="tokens", shown=title is not None) as bar:
        for number, item in enumerate(pending, 1):
            score, line = run(item, bar)
            add(score)
            bar.print(f"{title} {number}/{len(pending)}: {line}")
            if on_score is not None:
                on_score(score)


def file_identity(paths: Sequence[Path]) -> dict[str, Any]:
    """Names and digest of the files in some paths, so that results of another text aren't resumed."""
    from llamory.documents import find_files

    digest, files = hashlib.sha256(), find_files(paths, log_skipped=False)
    for path in files:
        digest.update(path.read_bytes())
    return {"files": [path.name for path in files[:10]], "sha256": digest.hexdigest()}


def model_metadata(model: Any) -> dict[str, Any]:
    """The properties of a model with memory that its answers depend on."""
    config = model.config
    metadata = {
        "fingerprint": model.memory_fingerprint(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "context_length": config.max_position_embeddings,
    }
    names = ["last_context_length", "mem_layers", "mem_dtype", "mem_search", "mem_top_k"]
    # Settings that are off have no key, as in the files of versions before they existed.
    names += ["mem_top_k_attention"] if config.mem_top_k_attention else []
    names += ["logn_attention_scale", "logn_attention_start"] if config.logn_attention_scale else []
    names += ["memory_size_bias", "memory_size_bias_start"] if config.memory_size_bias else []
    return metadata | {name: getattr(config, name) for name in names}


def display_names(names: Iterable[str]) -> dict[str, str]:
    """For each model its name in tables and plots: the last part of a folder's path if no other model has it."""
    names = list(names)
    short = [Path(name).resolve().name if Path(name).exists() else name for name in names]
    return {name: each if short.count(each) == 1 else name for name, each in zip(names, short, strict=True)}


def _require_same(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a LlamoryError that names the first difference between two sets of settings."""
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            change = f"{key.replace('_', ' ')} {_short(saved.get(key))}, now {_short(now.get(key))}"
            raise LlamoryError(f"{path} holds results made with other settings ({change}); give another --output.")


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as a file returns it, with lists for tuples."""
    return dict(json.loads(json.dumps(value)))


def _with_new_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Settings or metadata of an earlier version under today's names."""
    return {
        _OLD_KEYS.get(key, key): _OLD_VALUES.get((key, value), value) if isinstance(value, str) else value
        for key, value in entry.items()
    }

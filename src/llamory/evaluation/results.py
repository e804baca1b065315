"""One resumable results store for all evaluations: a JSON file that is complete after every write."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from llamory.common.io import write_json
from llamory.errors import LlamoryError

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
}
_OLD_VALUES = {("windows", "apart"): "independent"}


class ResultsFile(Generic[Score]):
    """Scores of one or more models at one evaluation, in a JSON file that a later run resumes.

    A subclass names its evaluation and says how a score is written and read.

    Attributes:
        path: the file; None writes nothing.
        settings: JSON-able; everything the scores depend on except the model and the keys of a single score.
        scores: for each model, by name, its scores so far.
        metadata: for each model, what its scores depend on; JSON-able.
    """

    evaluation: ClassVar[str]
    score_class: ClassVar[Callable[..., Any]]
    scores_key: ClassVar[str] = "scores"
    summary_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of a model's entry that `_summary` makes; they are not metadata."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any] | None = None) -> None:
        """Load the scores that the file has, if it exists.

        Args:
            path: the file.
            settings: of this run; None takes those of the file.

        Raises:
            LlamoryError: the folder is a file, or the file has scores of other settings or of no such evaluation.
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
        """The list of a model's scores, with those of earlier runs; the caller extends it.

        Raises:
            LlamoryError: the earlier scores are those of another model or of other settings.
        """
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

    # ---- what a subclass may define anew -----------------------------------------------------------------------------

    def _encode(self, score: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """A score as a JSON object."""
        return asdict(score)

    def _decode(self, entry: Mapping[str, Any]) -> Any:
        """A score from its JSON object."""
        return self.score_class(**entry)

    def _summary(self, name: str) -> dict[str, Any]:  # noqa: ARG002
        """Entries about all scores of a model, under `summary_keys`."""
        return {}

    def _entries(self, name: str) -> dict[str, Any]:
        """The entry with a model's scores."""
        return {self.scores_key: [self._encode(score, self.metadata[name]) for score in self.scores[name]]}

    def _load_scores(self, name: str, run: Mapping[str, Any]) -> list[Score]:  # noqa: ARG002
        """A model's scores from its entry."""
        return [self._decode(entry) for entry in run[self.scores_key]]

    # ------------------------------------------------------------------------------------------------------------------

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
            raise LlamoryError(
                f"{path} holds no {self.evaluation} results to resume; give another --output, or remove the file."
            ) from error
        return settings


class CurveResultsFile(ResultsFile[Score]):
    """A results file whose models also have a curve: means over the scores at each length."""

    summary_keys = ("curve",)
    make_curve: ClassVar[Callable[..., list[Any]]]

    def curve(self, name: str) -> list[Any]:
        """The points of a model's curve."""
        return self.make_curve(self.scores[name])

    def _summary(self, name: str) -> dict[str, Any]:
        return {"curve": [asdict(point) for point in self.curve(name)]}


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
    metadata |= {
        name: getattr(config, name) for name in ("last_context_length", "mem_layers", "mem_dtype", "mem_search")
    }
    metadata["mem_top_k"] = config.mem_top_k
    # Settings that are off have no key, as in the files of versions before they existed.
    for setting, start in (
        ("mem_top_k_attention", None),
        ("logn_attention_scale", "logn_attention_start"),
        ("memory_size_bias", "memory_size_bias_start"),
    ):
        if getattr(config, setting):
            metadata[setting] = getattr(config, setting)
            if start is not None:
                metadata[start] = getattr(config, start)
    return metadata


def display_names(names: Iterable[str]) -> dict[str, str]:
    """For each model its name in tables and plots: the last part of a folder's path where that is unambiguous."""
    names = list(names)
    short = [Path(name).resolve().name if Path(name).exists() else name for name in names]
    return {name: each if short.count(each) == 1 else name for name, each in zip(names, short, strict=True)}


def _require_same(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise a LlamoryError that names the first difference between two sets of settings."""
    for key in sorted({*saved, *now}):
        if saved.get(key) != now.get(key):
            change = f"{key.replace('_', ' ')} {_short(saved.get(key))}, now {_short(now.get(key))}"
            raise LlamoryError(
                f"{path} holds results made with other settings ({change}); give another --output, or remove the file."
            )


def _short(value: Any) -> str:
    text = "none" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_json(value: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping as it comes back from a file, with lists for tuples."""
    return dict(json.loads(json.dumps(value)))


def _with_new_keys(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Settings or metadata of an earlier version under today's names."""
    return {
        _OLD_KEYS.get(key, key): _OLD_VALUES.get((key, value), value) if isinstance(value, str) else value
        for key, value in entry.items()
    }

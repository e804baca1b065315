"""Results of a retrieval evaluation on disk: a JSON file and a line per query and model, taken up by a later run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llamory.errors import LlamoryError
from llamory.evaluation.qrels import RetrievalDataset
from llamory.evaluation.results import require_same_settings, write_json_atomic, write_jsonl
from llamory.evaluation.retrieval import CONFIDENCE, METRICS, QueryScore, differences, summarize

TASK = "retrieval"
JSON_FILE, LINES_FILE = "retrieval.json", "queries.jsonl"


class RetrievalResultsFile:
    """What several models found on the same queries and documents.

    Attributes:
        settings: all that scores depend on but the model; JSON-able.
        metadata: per model, by its name, what its scores depend on, and their means; JSON-able.
        scores: per model, one score per query, in the set's order.
    """

    def __init__(self, data: RetrievalDataset, folder: Path | None = None, per_query: Path | None = None) -> None:
        """Take up what the folder has, if any.

        Args:
            data: the set.
            folder: an existing folder for `retrieval.json` and `queries.jsonl`; None keeps nothing.
            per_query: another file for the lines per query.

        Raises:
            LlamoryError: the folder has results of another set, or isn't such a folder.
        """
        self.folder, self.per_query = folder, per_query
        self.settings: dict[str, Any] = {
            "data": data.name,
            "split": data.split,
            "queries": len(data.queries),
            "documents": len(data.ids),
            "relevant_documents_missing": data.missing_relevant,
            "queries_that_are_documents": len(data.self_documents),
            "fingerprint": data.fingerprint,
            "confidence": CONFIDENCE,
            "trec_eval": f"pytrec-eval-terrier {version('pytrec-eval-terrier')}",
        }
        self.metadata: dict[str, dict[str, Any]] = {}
        self.scores: dict[str, list[QueryScore]] = {}
        self._queries = list(data.queries)
        if folder is not None and (folder / JSON_FILE).exists():
            self._load(folder / JSON_FILE, folder / LINES_FILE)

    def has(self, name: str, metadata: Mapping[str, Any]) -> bool:
        """Whether a model was scored before.

        Raises:
            LlamoryError: another model was, under this name.
        """
        if name not in self.metadata or name not in self.scores:
            return False
        assert self.folder is not None
        require_same_settings(
            self.folder / JSON_FILE, {key: self.metadata[name].get(key) for key in metadata}, metadata
        )
        return True

    def add(self, name: str, metadata: Mapping[str, Any], scores: Sequence[QueryScore], seconds: float) -> None:
        """Take up a model's scores and write what there is."""
        self.scores[name] = list(scores)
        self.metadata[name] = {**metadata, **summarize(scores), "seconds": seconds}
        if self.folder is not None:
            # Lines first: a model counts once it stands in the JSON file.
            write_jsonl(self.folder / LINES_FILE, self._lines())
            write_json_atomic(self.folder / JSON_FILE, self.document())
        if self.per_query is not None:
            write_jsonl(self.per_query, self._lines())

    def finish(self) -> None:
        """Write the lines per query also where all models were scored before."""
        if self.per_query is not None:
            write_jsonl(self.per_query, self._lines())

    def document(self) -> dict[str, Any]:
        """All of it but the single queries, JSON-able."""
        return {
            "evaluation": TASK,
            "settings": self.settings,
            "runs": self.metadata,
            "differences": differences(self.scores),
        }

    def _lines(self) -> Iterator[dict[str, Any]]:
        return (score.line(name) for name, scores in self.scores.items() for score in scores)

    def _load(self, path: Path, lines: Path) -> None:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["evaluation"] != TASK:
                raise KeyError("evaluation")
            settings, metadata = dict(document["settings"]), dict(document["runs"])
            scores = _read_lines(lines)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise LlamoryError(
                f"{path} holds no {TASK} results to go on with; give another --output, or remove the file."
            ) from error
        require_same_settings(path, settings, self.settings)
        for name, found in metadata.items():
            if [score.query for score in scores.get(name, [])] == self._queries:
                self.metadata[name], self.scores[name] = found, scores[name]


def _read_lines(path: Path) -> dict[str, list[QueryScore]]:
    scores: dict[str, list[QueryScore]] = {}
    with path.open(encoding="utf-8") as file:
        for entry in map(json.loads, file):
            values = {metric: entry[metric] for metric in METRICS}
            scores.setdefault(entry["model"], []).append(QueryScore(entry["query"], values, entry["found"]))
    return scores

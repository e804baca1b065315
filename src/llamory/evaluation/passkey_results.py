"""Passkey results on disk: one JSON file per evaluation, whole at any moment, and taken up again by a later run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamory.errors import LlamoryError
from llamory.evaluation.passkey import Cell, PasskeyResult, Trial
from llamory.evaluation.results import require_same_settings, write_json_atomic

_TASK = "passkey"


class PasskeyResultsFile:
    """What one or more models found on the same prompts, kept in a JSON file.

    Attributes:
        path: the file.
        settings: all that the prompts and answers depend on but lengths and depths; JSON-able.
        results: per model ("memory", "baseline") what it found.
        metadata: per model, JSON-able metadata of it; `context_length` says which prompts are beyond its context.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Take up the results that the file has, if any.

        Raises:
            LlamoryError: the file has results of other settings, or isn't such a file.
        """
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as it comes back from the file: lists for tuples
        self.results: dict[str, PasskeyResult] = {}
        self.metadata: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._load(_read(path))

    def result(self, name: str, metadata: Mapping[str, Any]) -> PasskeyResult:
        """The result of a model, with what was found before, to be filled.

        Raises:
            LlamoryError: what was found before is of another model.
        """
        metadata_json: dict[str, Any] = json.loads(json.dumps(metadata))
        require_same_settings(self.path, self.metadata.get(name, metadata_json), metadata_json)
        self.metadata[name] = metadata_json
        return self.results.setdefault(name, PasskeyResult())

    def document(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        runs = {
            name: self.metadata[name] | {"cells": [_cell_entry(cell, self.metadata[name]) for cell in result.cells]}
            for name, result in self.results.items()
        }
        return {"evaluation": _TASK, "settings": self.settings, "runs": runs}

    def write(self) -> None:
        """Write the file: beside it first, then renamed, so that a kill leaves the old one or the new one."""
        write_json_atomic(self.path, self.document())

    def _load(self, document: Mapping[str, Any]) -> None:
        try:
            settings, runs = document["settings"], document["runs"]
            for name, run in runs.items():
                self.results[name] = PasskeyResult([_cell(entry) for entry in run["cells"]])
                self.metadata[name] = {key: value for key, value in run.items() if key != "cells"}
        except (KeyError, TypeError, AttributeError) as error:
            raise _unreadable_error(self.path) from error
        require_same_settings(self.path, settings, self.settings)


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _unreadable_error(path) from error
    if not isinstance(document, dict) or document.get("evaluation") != _TASK:
        raise _unreadable_error(path)
    return document


def _unreadable_error(path: Path) -> LlamoryError:
    return LlamoryError(f"{path} holds no passkey results to go on with; give another --output, or remove the file.")


def _cell_entry(cell: Cell, metadata: Mapping[str, Any]) -> dict[str, Any]:
    context = metadata.get("context_length")
    return {
        "length": cell.length,
        "depth": cell.depth,
        "accuracy": cell.accuracy,
        "digits": cell.digits,
        "tokens": cell.tokens,
        "seconds": cell.seconds,
        "beyond_context": context is not None and cell.tokens > context,
        "trials": [vars(trial) for trial in cell.trials],
    }


def _cell(entry: Mapping[str, Any]) -> Cell:
    return Cell(entry["length"], entry["depth"], tuple(Trial(**trial) for trial in entry["trials"]))

"""`llamory export` passes its options on and names the folder."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_export_hands_on_the_model_and_names_the_folder(llamory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def export(
        model: str, output: Path, *, max_length: int, query_prompt: str | None, whitening_texts: list[str]
    ) -> None:
        asked.append((model, output, max_length, query_prompt, whitening_texts))

    def texts(model: str, paths: list[Path], *, max_length: int) -> list[str]:
        return [f"{path} for {model} in {max_length}" for path in paths]

    module = SimpleNamespace(export_sentence_transformer=export, sample_passages=texts)
    monkeypatch.setitem(sys.modules, "llamory.embedding.pipeline", module)
    ran = llamory("export", "trained", "--output", "out", "--max-length", "256", "--json")
    assert json.loads(ran.out) == {"model": "trained", "output": "out", "max_length": 256}
    assert llamory("export", "trained", "--output", "out", "--query-prompt", "summary").code == 0
    ran = llamory("export", "trained", "--output", "out", "--whiten", "one", "--whiten", "two", "--json")
    assert json.loads(ran.out)["whitened_on"] == 2
    assert asked == [
        ("trained", Path("out"), 256, None, []),
        ("trained", Path("out"), 512, "summary", []),
        ("trained", Path("out"), 512, None, ["one for trained in 512", "two for trained in 512"]),
    ]

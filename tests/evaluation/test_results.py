"""The results file is complete after every write, and an interrupted run resumes from it."""

import contextlib
import json
from pathlib import Path

import pytest

from llamory.errors import LlamoryError
from llamory.evaluation.lookup import LookupResultsFile
from llamory.evaluation.manyshot import ManyshotResultsFile
from llamory.evaluation.passkey import PasskeyResultsFile, run_passkey
from llamory.evaluation.perplexity import PerplexityResultsFile, Score

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SETTINGS = {"model": "tiny", "trials": 2, "seed": 0}
FACTS = {"context_length": 500, "mem_layers": (0, 1)}


def without_seconds(document: dict) -> dict:
    for run in document["runs"].values():
        for cell in run["cells"]:
            for part in (cell, *cell["trials"]):
                assert part.pop("seconds") >= 0
    return document


def test_the_file_has_all_cells(tmp_path, cell) -> None:
    report = PasskeyResultsFile(tmp_path / "passkey.json", SETTINGS)
    report.run("memory", FACTS)
    result = report.results["memory"]
    result.add(cell(502, 0.5, True, True))
    result.add(cell(501, 0.5, True, False))
    result.add(cell(400, 0.0, True, True))
    assert result.lengths_beyond_context(500) == [502]
    report.write()
    document = json.loads((tmp_path / "passkey.json").read_text())
    assert document == report.document()
    assert document["settings"] == SETTINGS
    run = document["runs"]["memory"]
    assert (run["context_length"], run["mem_layers"]) == (500, [0, 1])
    # A prompt of 500 tokens is just within a context of 500.
    short, long, longest = run["cells"]
    assert (longest["tokens"], longest["beyond_context"]) == (501, True)
    assert (short["length"], short["depth"], short["accuracy"], short["beyond_context"]) == (400, 0.0, 1.0, False)
    assert (long["length"], long["depth"], long["accuracy"], long["beyond_context"]) == (501, 0.5, 0.5, False)
    assert [trial["correct"] for trial in long["trials"]] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == ["passkey.json"]


def test_an_interrupted_run_resumes(tmp_path, tokenizer, oracle) -> None:
    def run(name: str, model) -> PasskeyResultsFile:
        report = PasskeyResultsFile(tmp_path / name, SETTINGS)
        report.run("memory", FACTS)
        result = report.results["memory"]
        with contextlib.suppress(KeyboardInterrupt):
            run_passkey(model, tokenizer, [300, 900], [0, 1], trials=2, result=result, on_cell=lambda _: report.write())
        return report

    class Stopped(type(oracle(0))):
        def generate(self, **settings):
            if len(self.prompts) == 5:
                raise KeyboardInterrupt
            return super().generate(**settings)

    run("stopped.json", Stopped(tokenizer, 500))
    assert len(json.loads((tmp_path / "stopped.json").read_text())["runs"]["memory"]["cells"]) == 2
    second, whole = oracle(sees=500), oracle(sees=500)
    gone_on, straight = run("stopped.json", second), run("straight.json", whole)
    assert (len(second.prompts), len(whole.prompts)) == (4, 8)
    assert without_seconds(gone_on.document()) == without_seconds(straight.document())


@pytest.mark.parametrize(
    ("settings", "facts", "sentence"),
    [
        (SETTINGS | {"seed": 1}, FACTS, r"\(seed 0, now 1\)"),
        (SETTINGS | {"needle": "n"}, FACTS, r'\(needle none, now "n"\)'),
        (SETTINGS, FACTS | {"mem_layers": [1]}, r"\(mem layers \[0, 1\], now \[1\]\)"),
    ],
)
def test_results_of_other_settings_are_not_mixed(tmp_path, cell, settings: dict, facts: dict, sentence: str) -> None:
    file = tmp_path / "passkey.json"
    report = PasskeyResultsFile(file, SETTINGS)
    report.run("memory", FACTS).append(cell(400, 0.5, True, True))
    report.write()
    before = file.read_bytes()
    with pytest.raises(LlamoryError, match=sentence):
        PasskeyResultsFile(file, settings).run("memory", facts)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"evaluation": "passkey"}', '{"evaluation": "passkey", "settings": {}, "runs": 3}'],
)
def test_another_file_is_refused_and_kept(tmp_path, content: str) -> None:
    file = tmp_path / "passkey.json"
    file.write_text(content)
    with pytest.raises(LlamoryError, match="holds no passkey results"):
        PasskeyResultsFile(file, SETTINGS)
    assert file.read_text() == content


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, cell, monkeypatch) -> None:
    file = tmp_path / "passkey.json"
    report = PasskeyResultsFile(file, SETTINGS)
    report.run("memory", FACTS)
    result = report.results["memory"]
    result.add(cell(400, 0.5, True, True))
    report.write()
    before = file.read_bytes()
    result.add(cell(500, 0.5, True, True))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamory.common.io.json.dumps", full)
    with pytest.raises(OSError, match="No space"):
        report.write()
    assert file.read_bytes() == before


# ---- results with a curve --------------------------------------------------------------------------------------------

SCORES = [Score(0, "0", 2.0, 0.1), Score(0, "1", 3.0, 0.1)]


def record(path, **settings) -> PerplexityResultsFile:
    return PerplexityResultsFile(path, {"tokens": 6} | settings)


def test_scores_are_read_back(tmp_path) -> None:
    path = tmp_path / "perplexity.json"
    first = record(path)
    first.run("one", {"mem_layers": (1, 2)}).extend(SCORES)
    first.write()
    document = json.loads(path.read_text())
    assert document == first.document()
    assert document["runs"]["one"]["curve"][0]["loss"] == 2.5
    assert document["runs"]["one"]["scores"][1] == {"memory": 0, "source": "1", "loss": 3.0, "seconds": 0.1}
    again = record(path)
    assert again.run("one", {"mem_layers": [1, 2]}) == SCORES
    assert again.run("two", {}) == []


def test_results_of_another_evaluation_are_refused(tmp_path) -> None:
    path = tmp_path / "perplexity.json"
    first = record(path)
    first.run("one", {"mem_layers": [1]})
    first.write()
    with pytest.raises(LlamoryError, match=r"other settings \(tokens 6, now 7\)"):
        record(path, tokens=7)
    with pytest.raises(LlamoryError, match=r"other settings \(mem layers \[1\], now \[2\]\)"):
        record(path).run("one", {"mem_layers": [2]})
    for content in ("", "[]", '{"evaluation": "passkey", "settings": {}, "runs": {}}', '{"evaluation": "perplexity"}'):
        path.write_text(content)
        with pytest.raises(LlamoryError, match="holds no perplexity results to resume"):
            record(path)


# ---- files of earlier versions ---------------------------------------------------------------------------------------


def test_keys_of_earlier_versions_are_read(tmp_path) -> None:
    path = tmp_path / "passkey.json"
    trial = {"key": "1", "answer": "1", "correct": True, "digits": 1.0, "tokens": 99, "seconds": 0.1}
    run = {"fingerprint": "f", "mem_only_top_k": True, "mem_log_scale": 0.5, "mem_log_start": 8}
    document = {
        "evaluation": "passkey",
        "settings": SETTINGS | {"windows": "apart", "focus": 100.0},
        "runs": {"memory": run | {"cells": [{"length": 100, "depth": 0.5, "trials": [trial]}]}},
    }
    path.write_text(json.dumps(document))
    results = PasskeyResultsFile(path, SETTINGS | {"windows": "independent", "evidence_ratio": 100.0})
    metadata = {
        "fingerprint": "f",
        "mem_top_k_attention": True,
        "logn_attention_scale": 0.5,
        "logn_attention_start": 8,
    }
    (cell,) = results.run("memory", metadata)
    assert (cell.length, cell.accuracy) == (100, 1.0)


@pytest.mark.parametrize(("results_file", "name"), [(LookupResultsFile, "lookup"), (ManyshotResultsFile, "manyshot")])
def test_published_results_load(tmp_path, results_file, name: str) -> None:
    document = json.loads((RESULTS / f"{name}.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(document))
    results = results_file(tmp_path / "results.json")
    assert list(results.scores) == list(document["runs"])
    for model, run in document["runs"].items():
        assert [list(vars(score).values()) for score in results.scores[model]] == [
            list(entry.values()) for entry in run["scores"]
        ]
        assert len(results.curve(model)) == len(run["curve"])

"""Results lie in one JSON file that is whole at any moment, and a stopped run goes on from it."""

import contextlib
import json

import pytest

from llamory.errors import LlamoryError
from llamory.evaluation.passkey import run_passkey
from llamory.evaluation.passkey_results import PasskeyResultsFile

SETTINGS = {"model": "tiny", "trials": 2, "seed": 0}
FACTS = {"context_length": 500, "mem_layers": (0, 1)}


def without_seconds(document: dict) -> dict:
    for run in document["runs"].values():
        for cell in run["cells"]:
            for part in (cell, *cell["trials"]):
                assert part.pop("seconds") >= 0
    return document


def test_the_file_says_what_was_found_where(tmp_path, cell) -> None:
    report = PasskeyResultsFile(tmp_path / "passkey.json", SETTINGS)
    result = report.result("memory", FACTS)
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


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, tokenizer, oracle) -> None:
    def run(name: str, model) -> PasskeyResultsFile:
        report = PasskeyResultsFile(tmp_path / name, SETTINGS)
        result = report.result("memory", FACTS)
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
    report.result("memory", FACTS).add(cell(400, 0.5, True, True))
    report.write()
    before = file.read_bytes()
    with pytest.raises(LlamoryError, match=sentence):
        PasskeyResultsFile(file, settings).result("memory", facts)
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"evaluation": "passkey"}', '{"evaluation": "passkey", "settings": {}, "runs": 3}'],
)
def test_a_file_that_is_none_of_ours_is_refused_and_kept(tmp_path, content: str) -> None:
    file = tmp_path / "passkey.json"
    file.write_text(content)
    with pytest.raises(LlamoryError, match="holds no passkey results"):
        PasskeyResultsFile(file, SETTINGS)
    assert file.read_text() == content


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, cell, monkeypatch) -> None:
    file = tmp_path / "passkey.json"
    report = PasskeyResultsFile(file, SETTINGS)
    result = report.result("memory", FACTS)
    result.add(cell(400, 0.5, True, True))
    report.write()
    before = file.read_bytes()
    result.add(cell(500, 0.5, True, True))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llamory.evaluation.passkey_results.json.dump", full)
    with pytest.raises(OSError, match="No space"):
        report.write()
    assert file.read_bytes() == before

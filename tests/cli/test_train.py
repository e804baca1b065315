"""`llamory train` runs the recipes with their settings; `llamory export` passes its options on."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llamory.errors import LlamoryError
from llamory.models.device import pick_device
from llamory.training.settings import LlaraSettings


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the LLARA recipe."""

    def train(settings: LlaraSettings) -> dict[str, Any]:
        if settings.steps == 0:
            raise LlamoryError(f"steps must be at least 1, not {settings.steps}.")
        return {"output": settings.output, "steps_done": settings.steps, "losses": {"loss": 2.5, "ar_loss": 1.5}}

    monkeypatch.setitem(sys.modules, "llamory.training.llara", SimpleNamespace(train_llara=train))


def test_train_llara_runs_the_recipe_with_its_settings(llamory, recipe: None, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: [a.md]\noutput: runs/1\nsteps: 9\n")
    ran = llamory("train", "llara", "--config", tmp_path / "run.yaml", "--json")
    assert json.loads(ran.out) == {"output": "runs/1", "steps_done": 9, "losses": {"loss": 2.5, "ar_loss": 1.5}}


def test_train_llara_prints_its_result_for_people(llamory, recipe: None) -> None:
    ran = llamory("train", "llara", "--data", "a.md", "--output", "runs/1", "--steps", "5")
    assert ran.out.splitlines() == [
        "output      runs/1",
        "steps done  5",
        "losses      loss 2.5, ar_loss 1.5",
    ]


def test_train_llara_names_wrong_settings(llamory, recipe: None, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("data: [a.md]\noutput: out\nstep: 9\n")
    ran = llamory("train", "llara", "--config", tmp_path / "run.yaml")
    assert ran == (2, "", f"Error: {tmp_path / 'run.yaml'} has an unknown key, step; did you mean steps?\n")
    wrong = llamory("train", "llara", "--data", "a", "--output", "out", "--steps", "0")
    assert wrong.err == "Error: --steps must be at least 1, not 0.\n"


def test_train_help_lists_recipes_and_their_flags(llamory, recipe: None) -> None:
    page = llamory("train", "--help").out
    words = " ".join(page.replace("│", " ").split())
    assert "llara Train a LLaMA to embed texts, without labels (LLARA)." in words
    assert "…" not in page  # nothing is cut off
    words = " ".join(llamory("train", "llara", "--help").out.replace("│", " ").split())
    assert "(repeatable) Required here or in --config." in words


@pytest.mark.slow
def test_train_retriever_trains_on_pairs(llamory, model_folder: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(f'{{"query": "q {i}", "pos": ["p {i}"], "neg": ["n {i}"]}}\n' for i in range(8)))
    flags = ("--batch-size", 4, "--max-passage-length", 120, "--matryoshka", 8, "--matryoshka", 16, "--cpu", "--quiet")
    ran = llamory("train", "retriever", "--model", model_folder, "--data", data, "--output", run, *flags, "--json")
    told = json.loads(ran.out)
    assert (ran.code, ran.err) == (0, "")
    assert (told["output"], told["steps"], told["queries"], told["dimension"]) == (str(run), 2, 8, 32)
    assert (run / "modules.json").exists()
    with data.open("a") as file:
        file.write('{"query": "q"}\n')
    ran = llamory("train", "retriever", "--data", data, "--output", tmp_path / "other")
    assert ran.code == 2
    assert ran.err.startswith(f"Error: {data}:9: the object has no 'pos'")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--mem-layers", "29-5"), "Invalid value for '--mem-layers': The range 29-5 ends before it begins"),
        (("--seed", "9" * 23), "--seed must be less than 4294967296"),
        (("--steps", "0"), "--steps must be at least 1, not 0."),
        (("--batch-size", "x"), "Invalid value for '--batch-size'"),
    ],
)
def test_a_wrong_setting_is_named_as_a_flag(llamory, arguments, sentence: str) -> None:
    ran = llamory("train", "fot", "--data", "a", "--output", "out", *arguments)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith(f"Error: {sentence}")


def test_layers_of_a_file_have_the_form_of_the_flag(tmp_path: Path) -> None:
    from llamory.cli.settings import read_settings
    from llamory.errors import LlamoryError
    from llamory.training.settings import FotSettings

    file = tmp_path / "run.yaml"
    for text, layers in (("3,7-9", [3, 7, 8, 9]), ("6", [6]), ("[6, 12]", [6, 12])):
        file.write_text(f"mem_layers: {text}\n")
        assert read_settings(FotSettings, file, {"data": ["a"], "output": "out"}).mem_layers == layers
    file.write_text("mem_layers: 29-5\n")
    with pytest.raises(LlamoryError, match=r"mem_layers in .*: The range 29-5 ends before it begins"):
        read_settings(FotSettings, file, {"data": ["a"], "output": "out"})


def test_export_hands_on_the_model_and_names_the_folder(llamory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def export(model: str, output: Path, *, device: str, **settings: Any) -> None:
        asked.append((model, output, device, *settings.values()))

    def texts(model: str, paths: list[Path], *, max_length: int) -> list[str]:
        return [f"{path} for {model} in {max_length}" for path in paths]

    module = SimpleNamespace(export_sentence_transformer=export, sample_passages=texts)
    monkeypatch.setitem(sys.modules, "llamory.embedding.pipeline", module)
    ran = llamory("export", "trained", "--output", "out", "--max-length", "256", "--json")
    assert json.loads(ran.out) == {"model": "trained", "output": "out", "max_length": 256}
    assert llamory("export", "trained", "--output", "out", "--query-prompt", "summary", "--device", "cpu").code == 0
    ran = llamory("export", "trained", "--output", "out", "--whiten", "one", "--whiten", "two", "--json")
    assert json.loads(ran.out)["whitened_on"] == 2
    assert asked == [
        ("trained", Path("out"), pick_device(), 256, None, []),
        ("trained", Path("out"), "cpu", 512, "summary", []),
        ("trained", Path("out"), pick_device(), 512, None, ["one for trained in 512", "two for trained in 512"]),
    ]

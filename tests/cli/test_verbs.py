"""The verbs hand on what they are told and print what they get, for people and as JSON."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llamory.documents import SkippedFile
from llamory.errors import LlamoryError
from llamory.library import AddReport, Hit
from llamory.training.settings import LlaraSettings

HITS = [
    Hit(
        "A lamp gives light.\n\nIt needs oil.\nAnd a wick.\nAnd a match.",
        "docs/lamp.md",
        "Lamps",
        12,
        0.8125,
        cosine=0.8125,
    ),
    Hit("Wicks are cotton\x1b[31m.", "docs/wick.md", "", 1, 0.5),
]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands in for the library and records what it is asked."""
    made: list[tuple] = []

    class Library:
        def __init__(self, path: str, **settings: Any) -> None:
            made.append(("library", path, settings))

        def search(self, query: str, top: int, **settings: Any) -> list[Hit]:
            print("searching ...")
            made.append(("search", query, top, settings))
            return [] if query == "nothing" else HITS[:top]

        def add(self, paths: list[Path], **settings: Any) -> AddReport:
            print("reading ...")
            made.append(("add", paths, settings))
            broken = [SkippedFile("b/bad\x1b.txt", "no text")] if "b" in map(str, paths) else []
            nothing = AddReport(failed=broken)
            return nothing if paths == [Path("b")] else AddReport(3, 2, 1, 0, 41, broken)

        def remove(self, paths: list[Path], **settings: Any) -> AddReport:
            made.append(("remove", paths, settings))
            return AddReport(removed=2)

        def info(self) -> dict[str, Any]:
            return {"path": made[-1][1], "documents": 3, "passages": 41}

    monkeypatch.setitem(sys.modules, "llamory.library", SimpleNamespace(Library=Library))
    return made


# ---- search ----------------------------------------------------------------------------------------------------------


def test_search_lists_rank_score_place_title_and_first_lines(llamory, calls: list[tuple]) -> None:
    ran = llamory("search", "light", "--library", "lib")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        " 1. 0.812  docs/lamp.md:12  Lamps",
        "    A lamp gives light.",
        "    It needs oil.",
        "    And a wick.",
        " 2. 0.500  docs/wick.md:1",
        "    Wicks are cotton [31m.",
    ]
    assert calls[1] == ("search", "light", 10, {"source": None, "mode": "fused"})


def test_search_prints_one_json_document_and_nothing_else(llamory, calls: list[tuple]) -> None:
    options = ["--source", "docs/*.md", "--source", "a", "--mode", "bm25"]
    ran = llamory("search", "light", "--library", "lib", "--top", "1", *options, "--json")
    assert json.loads(ran.out) == {
        "query": "light",
        "library": "lib",
        "mode": "bm25",
        "hits": [
            {
                "rank": 1,
                "location": "docs/lamp.md:12",
                "text": HITS[0].text,
                "source": "docs/lamp.md",
                "title": "Lamps",
                "line": 12,
                "score": 0.8125,
                "page": None,
                "cosine": 0.8125,
                "bm25": None,
            }
        ],
    }
    assert "searching" in ran.err
    assert calls == [
        ("library", "lib", {"model": None}),
        ("search", "light", 1, {"source": ["docs/*.md", "a"], "mode": "bm25"}),
    ]


def test_search_that_finds_nothing_is_no_error(llamory, calls: list[tuple]) -> None:
    ran = llamory("search", "nothing", "--library", "lib")
    assert (ran.code, ran.out) == (0, "")
    assert "No passage was found." in ran.err
    assert json.loads(llamory("search", "nothing", "--library", "lib", "--json").out)["hits"] == []


def test_search_needs_at_least_one_place(llamory, calls: list[tuple]) -> None:
    assert llamory("search", "light", "--library", "lib", "--top", "0").code == 2
    assert calls == []


# ---- index -----------------------------------------------------------------------------------------------------------


SUMMARY = "lib: 3 added, 1 updated, 2 unchanged, 0 removed; 41 passages.\n"


def test_index_reports_what_it_did(llamory, calls: list[tuple]) -> None:
    ran = llamory("index", "a.md", "c", "--library", "lib")
    assert ran == (0, SUMMARY, "reading ...\n")
    unset = {"chunk_size": None, "text_field": "text", "strict": False, "wait": True}
    unset |= {"engine": "local", "ray_address": None}
    assert calls == [("library", "lib", {"model": "default", "bf16": False}), ("add", [Path("a.md"), Path("c")], unset)]


def test_index_lists_what_could_not_be_read(llamory, calls: list[tuple]) -> None:
    ran = llamory("index", "a.md", "b", "--library", "lib")
    assert (ran.code, ran.out) == (0, SUMMARY + "1 could not be read:\n  b/bad .txt: no text\n")


def test_index_that_took_nothing_in_is_an_error(llamory, calls: list[tuple]) -> None:
    ran = llamory("index", "b", "--library", "lib", "--json", "--quiet")
    assert ran.code == 2
    assert json.loads(ran.out)["failed"] == [{"path": "b/bad\x1b.txt", "reason": "no text"}]
    assert ran.err == "Error: Nothing could be indexed; mend what is listed, or give other files.\n"


def test_index_hands_on_what_it_is_told(llamory, calls: list[tuple]) -> None:
    told = (
        "--model m --chunk-size 99 --text-field body --max-file-size 0.5 --strict --no-wait --bf16 --json --quiet"
        " --engine ray --ray-address here:6379"
    )
    ran = llamory("index", "a.md", "--library", "s3://shelf/lib", *told.split())
    assert json.loads(ran.out) == {
        "library": "s3://shelf/lib",
        "added": 3,
        "unchanged": 2,
        "updated": 1,
        "removed": 0,
        "passages": 41,
        "failed": [],
        "skipped": [],
    }
    assert ran.err == ""
    settings = {"chunk_size": 99, "text_field": "body", "strict": True, "wait": False, "max_file_size": 0.5}
    settings |= {"engine": "ray", "ray_address": "here:6379"}
    assert calls == [("library", "s3://shelf/lib", {"model": "m", "bf16": True}), ("add", [Path("a.md")], settings)]


def test_index_takes_documents_out(llamory, calls: list[tuple]) -> None:
    ran = llamory("index", "--remove", "a.md", "--library", "lib")
    assert ran.out == "lib: 0 added, 0 updated, 0 unchanged, 2 removed; 0 passages.\n"
    assert calls[1] == ("remove", [Path("a.md")], {"wait": True})


def test_index_needs_something_to_read(llamory, calls: list[tuple]) -> None:
    assert llamory("index", "--library", "lib").code == 2


# ---- export ----------------------------------------------------------------------------------------------------------


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


# ---- train -----------------------------------------------------------------------------------------------------------


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
    assert wrong.err == "Error: steps must be at least 1, not 0.\n"


def test_train_help_lists_recipes_and_their_flags(llamory, recipe: None) -> None:
    lines = [" ".join(line.split()) for line in llamory("train", "--help").out.splitlines()]
    assert "llara Train a LLaMA, without labels, to embed texts (LLARA)." in lines
    assert not [line for line in lines[1:] if line.endswith("...")]  # no recipe is cut off
    assert "[repeatable]  [required]" in " ".join(llamory("train", "llara", "--help").out.split("\n"))


def test_train_retriever_trains_on_pairs(llamory, model_folder: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "pairs.jsonl", tmp_path / "run"
    data.write_text("".join(f'{{"query": "q {i}", "pos": ["p {i}"], "neg": ["n {i}"]}}\n' for i in range(8)))
    flags = ("--batch-size", 4, "--passage-length", 120, "--matryoshka", 8, "--matryoshka", 16, "--cpu", "--quiet")
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


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info_names_versions_threads_and_the_cache(llamory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMORY_CACHE", "/somewhere/else")
    facts = json.loads(llamory("info", "--json").out)
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == torch.get_num_threads()
    assert facts["cache"] == "/somewhere/else"


def test_info_describes_a_model(llamory, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    facts = json.loads(llamory("info", tmp_path / "model", "--json").out)
    assert facts["type"] == "llama"
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["hidden_size"] == 16
    assert facts["llara"] == "no template"


def test_info_describes_a_packaged_adapter(llamory) -> None:
    facts = json.loads(llamory("info", "reader", "--json").out)
    folder = Path(facts["adapter"])
    assert folder.parts[-2:] == ("adapters", "reader")
    assert facts["mem_layers"] == json.loads((folder / "config.json").read_text())["mem_layers"]
    tensors = load_file(folder / "adapter_model.safetensors")
    assert facts["adapter parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert "adapter" not in (base := json.loads(llamory("info", "default", "--json").out))
    assert "'reader' to what reads" in base["note"]


def test_info_describes_a_library(llamory, calls: list[tuple], tmp_path: Path) -> None:
    facts = json.loads(llamory("info", tmp_path, "--json").out)
    assert facts == {"path": str(tmp_path), "documents": 3, "passages": 41}


def test_search_can_be_told_where_the_model_went(llamory, calls: list[tuple]) -> None:
    assert llamory("search", "light", "--library", "lib", "--model", "moved").code == 0
    assert calls[0] == ("library", "lib", {"model": "moved"})


def test_info_about_nothing_is_one_sentence(llamory, tmp_path: Path) -> None:
    ran = llamory("info", tmp_path / "nothing")
    assert ran.code == 2
    assert ran.err.count("\n") == 1

"""`llamory eval perplexity` scores the ends of long documents with growing memories, as a table, JSON and picture."""

import json
import math
import random
from pathlib import Path

import pytest
import torch

SMALL = ("--memory-tokens", "0,64,600", "--scored-tokens", "16")
WORDS = "amber basin cedar delta ember fjord grove haven inlet jetty".split()


@pytest.fixture
def books(tmp_path) -> Path:
    """Two long documents and one that is too short."""
    folder, chance = tmp_path / "books", random.Random(0)
    folder.mkdir()
    for name, words in {"a": 500, "b": 600, "short": 20}.items():
        (folder / f"{name}.txt").write_text(" ".join(chance.choices(WORDS, k=words)))
    return folder


@pytest.fixture
def other_model(model_folder, tmp_path) -> Path:
    """Other weights with the same tokenizer."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "other")
    return tmp_path / "other"


def stock_loss(folder: Path, book: Path) -> float:
    """Of the last 16 tokens, from the 16 before each of which one sees no more than the window."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)(book.read_text())["input_ids"][-17:])
    with torch.no_grad():
        told = LlamaForCausalLM.from_pretrained(folder)(ids[None]).logits[0, :-1].log_softmax(-1)
    return -float(told[torch.arange(16), ids[1:]].mean())


def test_it_prints_a_table_and_writes_numbers_and_picture(llamory, model_folder, books, tmp_path) -> None:
    out = tmp_path / "out"
    ran = llamory("eval", "perplexity", model_folder, "--data", books, *SMALL, "--output", out)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == f"{model_folder.name}: the last 16 tokens of 2 documents"
    assert lines[1].split() == ["memory", "perplexity", "loss", "±", "change", "±"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "64", "600"]
    assert len({len(line) for line in lines[1:5]}) == 1
    assert lines[-1] == f"Written: {out / 'perplexity.json'} and {out / 'perplexity.png'}"
    assert sorted(path.name for path in out.iterdir()) == ["perplexity.json", "perplexity.png"]
    assert (out / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    assert f"{model_folder.name} 6/6: 600 tokens in memory, {books / 'b.txt'}: loss " in ran.err


def test_windows_can_be_read_apart(llamory, model_folder, books, tmp_path):
    arguments = ("eval", "perplexity", model_folder, "--data", books, *SMALL, "--json")
    apart, in_order = (
        json.loads(llamory(*arguments, "--output", tmp_path / name, *flags).out)
        for name, flags in (("apart", ["--independent-windows"]), ("in_order", []))
    )
    assert apart["settings"]["windows"] == "independent" and "windows" not in in_order["settings"]
    losses = [[score["loss"] for score in next(iter(each["runs"].values()))["scores"]] for each in (apart, in_order)]
    assert len(losses[0]) == len(losses[1]) and losses[0] != losses[1]


def test_json_is_one_document_with_a_run_per_model(llamory, model_folder, other_model, books, tmp_path) -> None:
    arguments = ("--data", books, *SMALL, "--output", tmp_path / "out", "--json", "--quiet")
    ran = llamory("eval", "perplexity", "--model", model_folder, "--compare", other_model, *arguments)
    assert (ran.code, ran.err) == (0, "")
    document = json.loads(ran.out)
    assert document == json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert document["evaluation"] == "perplexity"
    assert document["settings"]["documents"] == [str(books / "a.txt"), str(books / "b.txt")]
    assert list(document["runs"]) == [str(model_folder), str(other_model)]
    for name, run in document["runs"].items():
        wanted = [stock_loss(Path(name), books / file) for file in ("a.txt", "b.txt")]
        assert [score["loss"] for score in run["scores"][:2]] == pytest.approx(wanted, abs=1e-4)
        first = run["curve"][0]
        assert (first["memory"], first["documents"]) == (0, 2)
        assert first["loss"] == pytest.approx(sum(wanted) / 2, abs=1e-4)
        assert first["perplexity"] == pytest.approx(math.exp(sum(wanted) / 2), rel=1e-4)


def test_a_stopped_run_goes_on(llamory, model_folder, books, tmp_path, monkeypatch) -> None:
    from llamory.errors import LlamoryError
    from llamory.evaluation import perplexity

    loss, scored = perplexity.tail_loss, []

    def stop_at_the_fourth(*arguments, **more):
        if len(scored) == 3:
            raise LlamoryError("The lamp is out.")
        scored.append(arguments[2])
        return loss(*arguments, **more)

    arguments = ("eval", "perplexity", model_folder, "--data", books, *SMALL, "--output", tmp_path / "out")
    monkeypatch.setattr(perplexity, "tail_loss", stop_at_the_fourth)
    stopped = llamory(*arguments)
    assert (stopped.code, stopped.out) == (2, "")
    document = json.loads((tmp_path / "out" / "perplexity.json").read_text())
    assert [point["memory"] for point in document["runs"][str(model_folder)]["curve"]] == [0]
    monkeypatch.setattr(perplexity, "tail_loss", lambda *given, **more: scored.append(given[2]) or loss(*given, **more))
    assert llamory(*arguments).code == 0
    assert scored == [0, 0, 64, 64, 600, 600]
    other = llamory(*arguments, "--scored-tokens", "8")
    assert (other.code, other.out) == (2, "")
    assert "made with other settings" in other.err


def test_settings_of_memory_reach_the_model(llamory, model_folder, books, tmp_path) -> None:
    told = "--mem-layers 1 --context-length 128 --mem-search pages --mem-top-k 2 --bf16"
    told += " --local-tokens 100 --max-documents 1"
    arguments = ("--data", books, *SMALL, *told.split(), "--output", tmp_path / "out", "--json")
    document = json.loads(llamory("eval", "perplexity", model_folder, *arguments).out)
    run = document["runs"][str(model_folder)]
    assert (run["mem_layers"], run["context_length"], run["mem_search"], run["mem_top_k"]) == ([1], 128, "pages", 2)
    assert run["dtype"] == "bfloat16"
    assert document["settings"]["local"] == 100
    assert document["settings"]["documents"] == [str(books / "a.txt")]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--memory-tokens", "much"],
            "Error: Invalid value for '--memory-tokens': 'much' should be numbers of tokens",
        ),
        (["--memory-tokens", "0,-2k"], "Error: Invalid value for '--memory-tokens': '-2k' should be numbers of tokens"),
        (
            ["--memory-tokens", "64k"],
            "Error: No document has the 65,553 tokens that are needed (of 3, the longest has ",
        ),
        (["--context-length", "8"], "Error: 16 scored tokens after 1 local ones don't fit a window of 8 tokens"),
        (["--data", "nowhere.txt"], "Error: There is no file or folder nowhere.txt"),
        (["--model", "another"], "Error: Two models were named"),
        (["--scored-tokens", "0"], "Error: Invalid value for '--scored-tokens'"),
    ],
)
def test_a_wrong_wish_is_one_sentence_before_a_model_is_loaded(
    llamory, model_folder, books, tmp_path, monkeypatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr("llamory.longllama.loading.load_long_model", None)
    given = ("--data", books, *SMALL, "--output", tmp_path / "out", *arguments)
    ran = llamory("eval", "perplexity", model_folder, *given)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(sentence)
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_documents_must_be_named_and_models_but_once(llamory, model_folder, books) -> None:
    ran = llamory("eval", "perplexity", model_folder)
    assert (ran.code, ran.err) == (2, "Error: Missing option '--data'.\n")
    ran = llamory("eval", "perplexity", model_folder, "--data", books, "--compare", model_folder)
    assert ran.err == f"Error: The model {model_folder} was named twice; compare it with another one.\n"


def test_models_with_other_tokenizers_are_not_compared(llamory, model_folder, other_model, books, tmp_path) -> None:
    file = other_model / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:0]
    file.write_text(json.dumps(content))
    given = ("--data", books, *SMALL, "--output", tmp_path / "out")
    ran = llamory("eval", "perplexity", model_folder, "--compare", other_model, *given)
    assert ran.code == 2
    assert ran.err.startswith(f"Error: The model {other_model} has another tokenizer than {model_folder}")

"""`llamory eval passkey` says what a model with memory, and the plain one, find in long prompts."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llamory.errors import LlamoryError

SMALL = ("--lengths", "500,1k", "--depths", "0,1", "--trials", "1")


class Rememberer:
    """Stands in for a model with memory: it finds every passkey, and records how it was asked."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, name: str, **told: object) -> None:
        from llamory.models.base import load_tokenizer

        self.tokenizer, self.told, self.asked = load_tokenizer(name), told, []
        self.config = SimpleNamespace(
            max_position_embeddings=told["context_length"] or 512,
            last_context_length=256,
            mem_layers=told["mem_layers"] or [1],
            mem_dtype="bfloat16",
            mem_search=told["mem_search"] or "exact",
            mem_top_k=None,
            mem_top_k_attention=bool(told.get("mem_top_k_attention")),
            logn_attention_scale=told.get("logn_attention_scale") or 0.0,
            logn_attention_start=8192,
            memory_size_bias=told.get("memory_size_bias") or 0.0,
            memory_size_bias_start=2048,
        )

    def memory_fingerprint(self) -> str:
        return "one"

    def generate(self, *, input_ids, attention_mask, max_new_tokens, **options):
        text = self.tokenizer.decode(input_ids[0])
        self.asked.append((text, options))
        key = re.search(r"(\d+)\. Remember|room (\d+)", text)
        assert key is not None
        new = self.tokenizer(f" {key.group(1) or key.group(2)}.")["input_ids"][:max_new_tokens]
        return torch.cat([input_ids, torch.tensor([new])], dim=1)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Rememberer]:
    """The models with memory that were loaded."""
    loaded: list[Rememberer] = []

    def load_long_model(name: str = "default", **told: object) -> Rememberer:
        print("loading ...")
        loaded.append(Rememberer(name, **told))
        return loaded[-1]

    monkeypatch.setitem(sys.modules, "llamory.longllama.loading", SimpleNamespace(load_long_model=load_long_model))
    return loaded


def test_it_prints_a_table_and_writes_numbers_and_picture(llamory, models, model_folder, tmp_path) -> None:
    ran = llamory("eval", "passkey", model_folder, *SMALL, "--output", tmp_path / "out")
    assert ran.code == 0
    assert ran.out.splitlines() == [
        "With memory: 100% of the keys found",
        "depth     500  1,024*",
        "   0%    100%    100%",
        " 100%    100%    100%",
        "* longer than the context of 512 tokens",
        "",
        f"Written: {tmp_path / 'out' / 'passkey.json'} and {tmp_path / 'out' / 'passkey.png'}",
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["passkey.json", "passkey.png"]
    assert (tmp_path / "out" / "passkey.png").read_bytes().startswith(b"\x89PNG")
    assert "With memory 4/4: 1,024 tokens, depth 100%: found 100%" in ran.err


def test_json_is_one_document_the_one_that_is_written(llamory, models, model_folder, tmp_path) -> None:
    ran = llamory("eval", "passkey", "--model", model_folder, *SMALL, "--output", tmp_path, "--json", "--quiet")
    assert ran.err == ""
    document = json.loads(ran.out)
    assert document == json.loads((tmp_path / "passkey.json").read_text())
    assert document["evaluation"] == "passkey"
    assert document["settings"] == {
        "model": str(model_folder),
        "needle": "The pass key is {key}. Remember it. {key} is the pass key.",
        "question": "What is the pass key? The pass key is",
        "haystack": "published",
        "trials": 1,
        "seed": 0,
    }
    memory = document["runs"]["memory"]
    places = [(cell["length"], cell["depth"], cell["beyond_context"]) for cell in memory["cells"]]
    assert places == [(500, 0.0, False), (500, 1.0, False), (1024, 0.0, True), (1024, 1.0, True)]
    assert memory["fingerprint"] == "one"
    assert list(document["runs"]) == ["memory"]


def test_bfloat16_is_asked_for_by_a_flag(llamory, models, model_folder, tmp_path) -> None:
    for flags in ((), ("--bf16",)):
        out = tmp_path / f"{len(flags)}"
        assert llamory("eval", "passkey", model_folder, *SMALL, *flags, "--output", out).code == 0
    assert [model.told.get("dtype") for model in models] == [None, "bfloat16"]


def test_the_baseline_answers_the_same_prompts_also_beyond_its_context(
    llamory, models, model_folder, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    texts = []
    generate = LlamaForCausalLM.generate

    def listen(self, *, input_ids, **settings):
        texts.append(models[0].tokenizer.decode(input_ids[0]))
        return generate(self, input_ids=input_ids, **settings)

    monkeypatch.setattr(LlamaForCausalLM, "generate", listen)
    lengths = ("--lengths", "500,2100", "--depths", "0.5", "--trials", "2")
    ran = llamory("eval", "passkey", model_folder, *lengths, "--baseline", "--output", tmp_path, "--json")
    runs = json.loads(ran.out)["runs"]
    assert texts == [text for text, _ in models[0].asked]
    assert runs["baseline"]["context_length"] == 2048
    assert [(cell["accuracy"], cell["beyond_context"]) for cell in runs["baseline"]["cells"]] == [(0, False), (0, True)]
    assert [cell["accuracy"] for cell in runs["memory"]["cells"]] == [1, 1]
    table = llamory("eval", "passkey", model_folder, *lengths, "--output", tmp_path).out
    assert "Plain model, full cache: 0% of the keys found\ndepth     500  2,100*\n  50%      0%      0%\n" in table
    assert "* longer than the context of 2,048 tokens" in table


def test_what_was_run_is_not_run_again(llamory, models, model_folder, tmp_path) -> None:
    arguments = ("eval", "passkey", model_folder, "--trials", "2", "--depths", "0.5", "--output", tmp_path)
    llamory(*arguments, "--lengths", "500")
    ran = llamory(*arguments, "--lengths", "500,600", "--json")
    assert [len(model.asked) for model in models] == [2, 2]
    assert [cell["length"] for cell in json.loads(ran.out)["runs"]["memory"]["cells"]] == [500, 600]
    other = llamory(*arguments, "--lengths", "500", "--seed", "7")
    assert (other.code, other.out) == (2, "")
    assert "made with other settings (seed 0, now 7)" in other.err


def test_the_model_is_told_how_to_remember(llamory, models, model_folder, tmp_path) -> None:
    told = (
        "--mem-layers 0-1 --device cpu --context-length 256 --mem-search pages --mem-top-k 4 --last-context-length 128"
    )
    assert llamory("eval", "passkey", model_folder, *SMALL, *told.split(), "--output", tmp_path).code == 0
    assert models[0].told == {
        "mem_layers": [0, 1],
        "context_length": 256,
        "mem_search": "pages",
        "mem_top_k": 4,
        "device": "cpu",
    }
    assert all(options == {"do_sample": False, "last_context_length": 128} for _, options in models[0].asked)
    memory = json.loads((tmp_path / "passkey.json").read_text())["runs"]["memory"]
    assert (memory["context_length"], memory["last_context_length"], memory["mem_layers"]) == (256, 128, [0, 1])


def test_windows_that_are_read_apart_are_told(llamory, model_folder, tmp_path) -> None:
    lengths = ("--lengths", "1k,2k", "--depths", "0,1", "--trials", "1", "--mem-layers", "1", "--output", tmp_path)
    arguments = ("--independent-documents", "--mem-top-k-attention", "--mem-top-k", "8", "--context-length", "512")
    ran = llamory("eval", "passkey", model_folder, *lengths, *arguments, "--json")
    document = json.loads(ran.out)
    assert document["settings"]["windows"] == "independent"
    (run,) = document["runs"].values()
    assert (run["mem_top_k_attention"], run["mem_top_k"]) == (True, 8)
    assert [(cell["length"], cell["depth"]) for cell in run["cells"]] == [
        (1024, 0),
        (1024, 1),
        (2048, 0),
        (2048, 1),
    ]
    assert all(cell["length"] - 512 < cell["tokens"] <= cell["length"] for cell in run["cells"])
    # What was read together is another evaluation.
    refused = llamory("eval", "passkey", model_folder, *lengths, *arguments[1:])
    assert refused.code == 2


def test_haystack_and_needle_can_be_ones_own(llamory, models, model_folder, tmp_path) -> None:
    text = tmp_path / "walk.md"
    text.write_text("# A walk\n\nHe went home. Then he slept! Nobody asked why.\n")
    own = ("--haystack", text, "--needle", "He hid in room {key} there.", "--question", "Where did he hide? In room")
    ran = llamory("eval", "passkey", model_folder, *SMALL, *own, "--output", tmp_path / "out", "--json")
    assert [cell["accuracy"] for cell in json.loads(ran.out)["runs"]["memory"]["cells"]] == [1, 1, 1, 1]
    prompt, _ = models[0].asked[0]
    assert re.search(r"\nHe hid in room \d+ there\.\n# A walk\n\nHe went home\. Then he slept! Nobody asked", prompt)
    assert prompt.endswith("\nWhere did he hide? In room")
    assert "grass" not in prompt
    text.write_text("Another walk.\n")
    again = llamory("eval", "passkey", model_folder, *SMALL, *own, "--output", tmp_path / "out")
    assert again.code == 2
    assert "other settings (haystack" in again.err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["3"], [0, 0.5, 1]),
        (["1"], [0.5]),
        (["4"], [0, 0.3333, 0.6667, 1]),
        (["0.25"], [0.25]),
        (["0,1"], [0, 1]),
        (["0.0", "0.5,1"], [0, 0.5, 1]),
    ],
)
def test_depths_are_a_number_of_them_or_a_list(llamory, models, model_folder, tmp_path, given, expected) -> None:
    flags = [part for depths in given for part in ("--depths", depths)]
    arguments = ("--lengths", "500", "--trials", "1", "--output", tmp_path, "--json")
    ran = llamory("eval", "passkey", model_folder, *flags, *arguments)
    assert [cell["depth"] for cell in json.loads(ran.out)["runs"]["memory"]["cells"]] == expected


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "20"], "Error: A prompt of 20 tokens is too short"),
        (["--lengths", "many"], "Error: Invalid value for '--lengths': 'many' should be numbers of tokens"),
        (["--lengths", ","], "Error: Invalid value for '--lengths'"),
        (["--depths", "0,1.5"], "Error: Invalid value for '--depths': 1.5 should be"),
        (["--depths", "-0.5"], "Error: Invalid value for '--depths': '-0.5' should be"),
        (["--depths", "nan"], "Error: Invalid value for '--depths'"),
        (["--depths", "0"], "Error: Invalid value for '--depths': 0 is not a number of depths"),
        (["--depths", "deep"], "Error: Invalid value for '--depths'"),
        (["--trials", "0"], "Error: Invalid value for '--trials'"),
        (["--mem-layers", "six"], "Error: Invalid value for '--mem-layers'"),
        (["--needle", "No number here."], "Error: The needle 'No number here.' has no {key}"),
        (["--question", "Is it {key}?"], "Error: The question holds {key}"),
        (["--haystack", "nowhere.txt"], "Error: There is no file or folder nowhere.txt"),
        (["--model", "another"], "Error: Two models were named"),
        (["--independent-documents", "--baseline"], "Error: The plain model has no memory to attach windows to"),
        (
            ["--independent-documents", "--last-context-length", "64"],
            "Error: With --independent-documents only the question isn't in memory",
        ),
        (
            ["--evidence-ratio", "100"],
            "Error: --evidence-ratio needs windows that are read by themselves; add --independent-documents",
        ),
        (
            ["--independent-documents", "--evidence-ratio", "0.5"],
            "Error: evidence_ratio must be at least 1, or 0 to disable it, not 0.5.",
        ),
    ],
)
def test_a_wrong_wish_is_one_sentence_before_a_model_is_loaded(
    llamory, models, model_folder, tmp_path, arguments: list[str], sentence: str
) -> None:
    ran = llamory("eval", "passkey", model_folder, "--output", tmp_path / "out", *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(sentence)
    assert ran.err.count("\n") == 1
    assert models == []
    assert not (tmp_path / "out").exists()


def test_an_empty_haystack_is_refused(llamory, models, model_folder, tmp_path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    ran = llamory("eval", "passkey", model_folder, "--haystack", tmp_path / "empty.txt", "--output", tmp_path / "out")
    assert (ran.code, models) == (2, [])
    assert "is empty" in ran.err


def test_an_output_that_is_a_file_is_refused(llamory, models, model_folder, tmp_path) -> None:
    (tmp_path / "taken").write_text("mine")
    ran = llamory("eval", "passkey", model_folder, *SMALL, "--output", tmp_path / "taken")
    assert (ran.code, models) == (2, [])
    assert ran.err == f"Error: {tmp_path / 'taken'} is a file; give a folder as --output.\n"


def test_a_model_that_is_not_there_is_one_sentence(llamory, models, tmp_path) -> None:
    ran = llamory("eval", "passkey", tmp_path / "gone", *SMALL, "--output", tmp_path / "out")
    assert ran.code == 2
    assert ran.err.startswith(f"Error: There is no model at {tmp_path / 'gone'}")


def test_what_was_found_before_an_error_is_kept(llamory, models, model_folder, tmp_path, monkeypatch) -> None:
    answer = Rememberer.generate

    def answer_once(self, **settings):
        if self.asked:
            raise LlamoryError("The lamp is out.")
        return answer(self, **settings)

    monkeypatch.setattr(Rememberer, "generate", answer_once)
    ran = llamory("eval", "passkey", model_folder, *SMALL, "--output", tmp_path)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.endswith("Error: The lamp is out.\n")
    assert len(json.loads((tmp_path / "passkey.json").read_text())["runs"]["memory"]["cells"]) == 1
    monkeypatch.setattr(Rememberer, "generate", answer)
    assert llamory("eval", "passkey", model_folder, *SMALL, "--output", tmp_path).code == 0
    assert len(models[1].asked) == 3


@pytest.mark.parametrize(
    ("verb", "flag"), [("passkey", "--baseline"), ("perplexity", "--memory"), ("manyshot", "--num-seeds")]
)
def test_help_imports_no_heavy_library(verb, flag) -> None:
    program = f"""
import sys
from llamory.cli import main
try:
    main(["eval", "{verb}", "--help"])
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "transformers", "matplotlib", "numpy"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert flag in done.stdout


def test_eval_without_a_task_is_told_what_there_is(llamory) -> None:
    assert "passkey" in llamory("eval", "--help").out
    assert llamory("eval", "passky").err == "Error: No such command 'passky'. Did you mean 'passkey'?\n"


def test_the_default_folder_is_in_the_current_one(llamory, models, model_folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert llamory("eval", "passkey", model_folder, *SMALL, "--quiet").code == 0
    assert (Path("passkey") / "passkey.json").exists()

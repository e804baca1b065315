"""Python code that comes with a model is never run, whichever command gets the model; one sentence refuses it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamory.embedding.pipeline import check_embedder, export_sentence_transformer, load_embedder, mean_embedder
from llamory.errors import LlamoryError
from llamory.longllama.loading import load_long_model
from llamory.models.base import load_config, load_model, load_tokenizer

CODE = """
import pathlib
pathlib.Path(__file__).parent.joinpath("RAN").touch()
pathlib.Path({ran!r}).touch()
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, LlamaModel as Module
from transformers import PreTrainedTokenizerFast as Tokenizer
"""
LOADERS = [load_config, load_model, load_tokenizer, load_long_model, load_embedder, check_embedder, mean_embedder]

# What reads a LLaMA's configuration and weights alone doesn't need the code of its tokenizer or modules.
LOADABLE = {
    ("tokenizer", load_config),
    ("tokenizer", load_model),
    ("tokenizer", load_long_model),
    ("modules", load_config),
}


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The file that the code of a model makes when it runs."""
    return tmp_path / "RAN"


@pytest.fixture
def architecture(tmp_path: Path, ran: Path) -> Path:
    """A model of an architecture that only its own code knows."""
    return make_model(tmp_path / "architecture", ran, {"model_type": "custom", "hidden_size": 64})


@pytest.fixture
def tokenizer(tmp_path: Path, ran: Path, model_folder: Path) -> Path:
    """A LLaMA whose tokenizer needs code of its own."""
    folder = make_model(tmp_path / "tokenizer", ran, json.loads((Path(model_folder) / "config.json").read_text()))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": ["custom.Tokenizer", None]}})
    )
    os.link(Path(model_folder) / "model.safetensors", folder / "model.safetensors")
    return folder


@pytest.fixture
def modules(tmp_path: Path, ran: Path) -> Path:
    """An embedder with a module of its own."""
    folder = make_model(tmp_path / "modules", ran, {"model_type": "llama"})
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "custom.Module"}]))
    return folder


@pytest.fixture
def adapter(tmp_path: Path, architecture: Path) -> Path:
    """An adapter of a model that needs code of its own."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(architecture), "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def make_model(folder: Path, ran: Path, config: dict) -> Path:
    folder.mkdir()
    names = {"AutoConfig": "Config", "AutoModelForCausalLM": "Model", "AutoModel": "Module"}
    auto_map = {auto_class: f"custom.{name}" for auto_class, name in names.items()}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (folder / "custom.py").write_text(CODE.format(ran=str(ran)))
    return folder


@pytest.mark.parametrize("kind", ["architecture", "adapter", "modules", "tokenizer"])
@pytest.mark.parametrize("load", LOADERS, ids=lambda load: load.__name__)
def test_no_code_of_a_model_is_run(request, monkeypatch, kind, load, ran):
    folder = request.getfixturevalue(kind)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the code"))
    monkeypatch.chdir(folder)  # where a module called custom could be found
    if (kind, load) in LOADABLE:
        load(folder)
    else:
        with pytest.raises(LlamoryError, match=r"^[^\n]*\.$"):
            load(folder)
    assert not ran.exists() and not (folder / "RAN").exists()


@pytest.mark.parametrize(
    ("kind", "load", "part"),
    [
        ("tokenizer", load_tokenizer, "The tokenizer of"),
        ("architecture", load_embedder, "The model of"),
        ("modules", load_embedder, "custom.Module"),
        ("modules", lambda name: export_sentence_transformer(name, Path(name).parent / "out"), "custom.Module"),
    ],
)
def test_one_sentence_refuses_it(request, kind, load, part):
    with pytest.raises(
        LlamoryError, match=r"needs? Python code that comes with the model, which llamory never runs;"
    ) as e:
        load(request.getfixturevalue(kind))
    assert part in str(e.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["index", "docs", "--library", "library", "--model", "MODEL"],
        ["export", "MODEL", "--output", "out"],
        ["read", "docs", "--memory", "out.memory", "--model", "MODEL"],
        ["train", "llara", "--model", "MODEL", "--data", "docs", "--output", "out", "--steps", "1"],
        ["train", "retriever", "--model", "MODEL", "--data", "docs", "--output", "out", "--steps", "1"],
        ["train", "fot", "--model", "MODEL", "--data", "docs", "--output", "out", "--steps", "1"],
        ["train", "instruct", "--model", "MODEL", "--data", "docs", "--output", "out", "--steps", "1"],
        ["eval", "retrieval", "MODEL", "--data", "docs"],
        ["eval", "passkey", "MODEL"],
        ["eval", "perplexity", "MODEL", "--data", "docs"],
        ["info", "MODEL"],
    ],
    ids=lambda arguments: "-".join(arguments[:2]),
)
def test_no_command_runs_it(arguments, architecture, tmp_path, ran):
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# A\n\nThe oak is old.")
    command = [sys.executable, "-m", "llamory", *(str(architecture) if a == "MODEL" else a for a in arguments)]
    done = subprocess.run(command, cwd=tmp_path, input="yes\n" * 9, capture_output=True, text=True)
    assert done.returncode != 0
    assert "[y/N]" not in done.stdout + done.stderr and "Traceback" not in done.stderr
    assert not ran.exists()

"""`llamory info` describes the installation, models and libraries."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM


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
    assert "'reader' where they are read" in base["note"]


def test_info_describes_a_library(llamory, calls: list[tuple], tmp_path: Path) -> None:
    facts = json.loads(llamory("info", tmp_path, "--json").out)
    assert facts == {"path": str(tmp_path), "documents": 3, "passages": 41}


def test_info_about_nothing_is_one_sentence(llamory, tmp_path: Path) -> None:
    ran = llamory("info", tmp_path / "nothing")
    assert ran.code == 2
    assert ran.err.count("\n") == 1

"""An adapter's folder is loaded like a model: its base with the adapter merged into it, whatever loads it."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM
from llamory.longllama.loading import load_long_model
from llamory.models import base as backbone
from llamory.models.adapters import load_shared
from llamory.training.long_models import select_trainable
from llamory.training.settings import InstructSettings
from tiny_models import save_llama

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "base"
    save_llama(folder, ["cat dog river money"], max_position_embeddings=64)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory) -> Path:
    """LoRA matrices of which none is zero."""
    folder = tmp_path_factory.mktemp("models") / "adapter"
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(base, adapter) -> torch.Tensor:
    with torch.no_grad():
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).eval()
        return model(IDS).logits


def test_an_adapter_is_its_base_model_with_the_adapter(base, adapter, expected):
    with torch.no_grad():
        torch.testing.assert_close(backbone.load_model(adapter)(IDS).logits, expected, atol=1e-5, rtol=1e-5)
        plain = backbone.load_model(base)(IDS).logits
    assert (plain - expected).abs().max() > 0.01
    assert (
        backbone.load_tokenizer(adapter)("cat dog")["input_ids"]
        == backbone.load_tokenizer(base)("cat dog")["input_ids"]
    )


def test_an_adapter_of_an_adapter_has_both(base, adapter, expected, tmp_path):
    settings = InstructSettings(data=[], output="", model=str(adapter), lora=True, lora_rank=2, lora_dropout=0.0)
    config = LongLlamaConfig.from_dict(backbone.load_config(adapter).to_dict(), mem_layers=[1])
    below = LongLlamaForCausalLM.from_pretrained(base, config=config)
    below.load_state_dict(backbone.load_model(adapter).state_dict())
    second = select_trainable(below, settings, "all")
    with torch.no_grad():
        for name, parameter in second.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        wanted = second.eval()(IDS).logits
    second.save_pretrained(tmp_path / "second")
    assert (wanted - expected).abs().max() > 0.01
    for load in (backbone.load_model, load_shared):
        with torch.no_grad():
            torch.testing.assert_close(load(tmp_path / "second")(IDS).logits, wanted, atol=1e-5, rtol=1e-5)


def test_it_can_be_trained_on(adapter):
    assert all(parameter.requires_grad for parameter in backbone.load_model(adapter).parameters())


def test_it_reads_with_the_memory_layers_that_its_folder_names(adapter, expected, tmp_path):
    model = load_long_model(adapter, mem_layers=[1], context_length=32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, expected, atol=1e-5, rtol=1e-5)
    own = tmp_path / "own"
    own.mkdir()
    for file in adapter.iterdir():
        (own / file.name).write_bytes(file.read_bytes())
    config = LongLlamaConfig.from_dict(
        backbone.load_config(adapter).to_dict(), mem_layers=[0], max_position_embeddings=16, last_context_length=8
    )
    config.save_pretrained(own)
    read = load_long_model(own).config
    assert (read.mem_layers, read.max_position_embeddings, read.last_context_length) == ([0], 16, 8)
    read = load_long_model(own, mem_layers=[1], context_length=4).config
    assert (read.mem_layers, read.max_position_embeddings, read.last_context_length) == ([1], 4, 4)


def test_an_adapter_of_projections_for_memory_changes_nothing_without_memory(base, tmp_path):
    settings = InstructSettings(data=[], output="", model=str(base), lora=True, lora_rank=2, lora_dropout=0.0)
    changes = {"mem_layers": [1], "max_position_embeddings": 16, "last_context_length": 8, "mem_projections": True}
    model = LongLlamaForCausalLM.from_pretrained(base, **changes)
    config = model.config.to_dict()
    model = select_trainable(model, settings, "memory_projections")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        wanted = model.eval()(torch.arange(40)[None]).logits
    own = tmp_path / "own"
    model.save_pretrained(own)
    LongLlamaConfig.from_dict(config).save_pretrained(own)
    for shared in (False, True):
        read = load_long_model(own, mem_layers=[1], shared=shared)
        with torch.no_grad():
            torch.testing.assert_close(read(torch.arange(40)[None]).logits, wanted, atol=2e-5, rtol=1e-5)
            plain = backbone.load_model(base)(IDS[:, :8]).logits
            assert torch.equal(read(IDS[:, :8]).logits, plain)
    for load in (backbone.load_model, load_shared):
        with torch.no_grad():
            assert torch.equal(load(own)(IDS[:, :8]).logits, plain)
    with pytest.raises(LlamoryError, match=r"own has projections for the memory of layers 1; leave mem_layers out"):
        load_long_model(own, mem_layers=[0])


def test_every_type_makes_the_same_memory(adapter):
    exact, rounded = (
        load_long_model(adapter, mem_layers=[1], context_length=32, dtype=dtype) for dtype in (None, torch.bfloat16)
    )
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    assert rounded.config.dtype == torch.bfloat16
    # In bfloat16 the rotary embedding would be off by whole turns within some hundred tokens.
    assert torch.equal(rounded.model.rotary_emb.inv_freq, exact.model.rotary_emb.inv_freq)
    assert exact.memory_fingerprint() == rounded.memory_fingerprint()


def test_what_is_wrong_with_an_adapter_is_said(adapter, tmp_path):
    folder = tmp_path / "nowhere"
    folder.mkdir()
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(LlamoryError, match="doesn't say which model it is for"):
        backbone.load_model(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(LlamoryError, match=r"The adapter of .* can't be read"):
        backbone.load_model(folder)


def test_the_packaged_reader_is_small_and_fits_the_default_model():
    folder = backbone.adapter_folder("reader")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "default"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert (folder / "adapter_model.safetensors").stat().st_size < 14e6
    layers = json.loads((folder / "config.json").read_text())["mem_layers"]
    assert config["layers_to_transform"] == layers
    assert len(tensors) == len(layers) * 4 * 2 and (folder / "README.md").is_file()
    rank, last = config["r"], f"layers.{layers[-1]}.self_attn."
    narrow = min(rank, 192)  # a matrix with 192 rows has no more than that
    shapes = {name.rpartition(last)[2]: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert config.get("rank_pattern", {}).get("mem_k_proj", rank) == narrow
    assert shapes["mem_q_proj.lora_A.weight"] == (rank, 576) and shapes["mem_k_proj.lora_B.weight"] == (192, narrow)


def test_the_packaged_retriever_is_small_and_brings_its_slots():
    folder = backbone.adapter_folder("retriever")
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    assert config["base_model_name_or_path"] == "default"
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert sum(file.stat().st_size for file in folder.iterdir()) < 14e6
    rows = [tensor for name, tensor in tensors.items() if "lora_" not in name]
    assert [tuple(tensor.shape) for tensor in rows] == [(16, 576)] and (folder / "README.md").is_file()
    assert sorted(json.loads((folder / "added_tokens.json").read_text()).values()) == list(range(49152, 49168))
    own = json.loads((folder / "config.json").read_text())
    assert own["vocab_size"] == 49168 and own["llara"]["query_prompt"] == "summary"


@pytest.mark.parametrize("name", backbone.PACKAGED_ADAPTERS)
def test_packaged_adapters_name_no_place_on_a_machine(name):
    folder = backbone.adapter_folder(name)
    for file in folder.glob("*.json"):
        assert not any(key.startswith("_") for key in json.loads(file.read_text()))

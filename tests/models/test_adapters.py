"""An adapter's folder is loaded like a model, merged or beside the shared weights of its base model."""

import gc
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import LlamaForCausalLM

from llamory.embedding.encoder import embed_passages, embed_queries, fingerprint
from llamory.embedding.pipeline import load_embedder
from llamory.errors import LlamoryError
from llamory.library import Library
from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM
from llamory.longllama.loading import load_long_model
from llamory.models import adapters as sharing
from llamory.models import base as backbone
from llamory.models.adapters import ExtendedEmbedding, load_shared, merged
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


TEXTS = ["River stone and water.", "a boat goes down the river in winter, and up", "x = 1"]
SETTINGS = {"mem_layers": [5, 8, 17, 18, 22, 23], "context_length": 64}


@pytest.fixture(scope="module")
def pair():
    """The packaged retriever and reader on one base model."""
    return load_embedder("default", shared=True, device="cpu"), load_long_model("reader", shared=True, **SETTINGS)


def storages(*models: nn.Module) -> dict[int, int]:
    """The bytes of all tensors, by where they lie."""
    tensors = [tensor for model in models for tensor in model.state_dict().values()]
    return {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}


def test_two_models_take_the_room_of_one_and_their_adapters(pair):
    base = backbone.load_model("default")
    adapters = sum(
        file.stat().st_size * 2  # they are bfloat16 on the disk
        for name in ("retriever", "reader")
        for file in backbone.adapter_folder(name).glob("adapter_model.safetensors")
    )
    one = sum(storages(base).values())
    whole = sum(storages(pair[0][0], pair[1]).values())
    assert whole < one + adapters + 1e6
    # Changing one of them is seen in the other: the very same tensors.
    assert pair[0][0].auto_model.layers[3].mlp.up_proj.weight is pair[1].model.layers[3].mlp.up_proj.weight


def test_a_shared_retriever_finds_as_the_merged_one(pair):
    shared, own = pair[0], load_embedder("default", device="cpu")
    for embed in (embed_queries, embed_passages):
        torch.testing.assert_close(
            torch.tensor(embed(shared, TEXTS)), torch.tensor(embed(own, TEXTS)), atol=2e-5, rtol=0
        )
    found = shared.encode_query(TEXTS, convert_to_tensor=True)
    torch.testing.assert_close(found, own.encode_query(TEXTS, convert_to_tensor=True), atol=2e-5, rtol=0)
    assert fingerprint(shared) == fingerprint(own)


def test_a_shared_reader_reads_as_the_merged_one(pair):
    # Memory in bfloat16 would round what differs by float32's rounding to other numbers here and there.
    shared, own = (
        load_long_model("reader", shared=shared, mem_dtype="float32", **SETTINGS) for shared in (True, False)
    )
    assert shared.model.layers[3].mlp.up_proj.weight is pair[1].model.layers[3].mlp.up_proj.weight
    ids = torch.arange(100, 300)[None]
    with torch.no_grad():
        torch.testing.assert_close(shared(ids).logits, own(ids).logits, atol=2e-3, rtol=1e-4)
    assert shared.memory_fingerprint() == own.memory_fingerprint()
    assert shared.memory_fingerprint() != load_long_model("base", **SETTINGS).memory_fingerprint()
    assert shared.config.mem_layers == own.config.mem_layers


def test_a_library_that_was_added_to_shares_its_base_model_once_it_is_asked(tmp_path):
    (tmp_path / "note.md").write_text("The river is wide.", encoding="utf-8")
    library = Library(tmp_path / "library", model="default", device="cpu", **SETTINGS)
    library.add(tmp_path / "note.md", progress=False)
    before = library.search("a wide river")
    reader = library.qa_source().reader.model
    after = library.search("a wide river")
    assert library._embedder()[0].auto_model.layers[3].mlp.up_proj.weight is reader.model.layers[3].mlp.up_proj.weight
    assert [hit.text for hit in after] == ["The river is wide."]
    assert after[0].score == pytest.approx(before[0].score, abs=1e-5)


def test_weights_that_nobody_has_any_more_are_let_go(model_folder):
    first = load_shared(model_folder)
    assert any(key[0] == str(model_folder) for key in sharing._SHARED_PARAMETERS)
    del first
    gc.collect()
    assert not any(key[0] == str(model_folder) for key in sharing._SHARED_PARAMETERS)


def test_weights_that_were_changed_are_not_given_to_others(model_folder):
    first = load_shared(model_folder)
    with torch.no_grad():
        first.model.norm.weight.mul_(2)
    second = load_shared(model_folder, LongLlamaForCausalLM, mem_layers=[0])
    assert torch.equal(first.model.norm.weight, 2 * second.model.norm.weight)
    assert second.model.layers[0].mlp.up_proj.weight is first.model.layers[0].mlp.up_proj.weight
    assert not any(parameter.requires_grad for parameter in second.parameters())


def test_further_rows_of_an_embedding():
    torch.manual_seed(0)
    base, rows = nn.Embedding(5, 3), torch.randn(2, 3)
    whole = nn.Embedding.from_pretrained(torch.cat([base.weight.detach(), rows]))
    extended = ExtendedEmbedding(base, rows)
    ids = torch.tensor([[0, 6, 4], [5, 5, 1]])
    assert torch.equal(extended(ids), whole(ids))
    assert torch.equal(extended.weight, whole.weight)
    ((name, make),) = merged(
        nn.ModuleDict({"embed": extended}), nn.ModuleDict({"embed": extended}).state_dict().items()
    )
    assert name == "embed.weight" and torch.equal(make(), whole.weight)


def test_biases_count_in_what_a_model_would_be_merged():
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.ModuleDict({"q": nn.Linear(3, 3), "k": nn.Linear(3, 3, bias=False)})
    plain = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=4, target_modules=["q"], init_lora_weights=False), model)
    found = {name: make() for name, make in merged(model, model.named_parameters())}
    assert found.keys() == plain.keys()
    delta = 2 * model["q"].lora_B["default"].weight @ model["q"].lora_A["default"].weight
    torch.testing.assert_close(found["q.weight"], plain["q.weight"] + delta)
    assert torch.equal(found["q.bias"], plain["q.bias"]) and torch.equal(found["k.weight"], plain["k.weight"])
    assert torch.equal(model["q"].base_layer.weight, plain["q.weight"])


def test_a_reader_keeps_the_type_of_its_checkpoint(tmp_path, model_folder):
    backbone.load_model(model_folder).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_long_model(tmp_path, mem_layers=[0], context_length=64, shared=True).dtype == torch.bfloat16


def test_an_adapter_that_changes_the_base_models_embeddings_is_refused(tmp_path, model_folder):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [1, 2]})
    get_peft_model(backbone.load_model(model_folder), config).save_pretrained(tmp_path)
    with pytest.raises(LlamoryError, match="changes embeddings of its base model; load it merged"):
        load_shared(tmp_path)

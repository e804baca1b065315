"""Models of one base share its weights, and compute what they compute when each has its own."""

import gc

import pytest
import torch
from torch import nn

from llamory.embedding.encoder import embed_passages, embed_queries, fingerprint
from llamory.embedding.pipeline import load_embedder
from llamory.errors import LlamoryError
from llamory.library import Library
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.loading import load_long_model
from llamory.models import adapters as sharing
from llamory.models import base as backbone
from llamory.models.adapters import ExtendedEmbedding, load_shared, merged

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

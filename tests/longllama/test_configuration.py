"""Configurations and published folders."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM, LongLlamaModel

# Parameters counted by hand: embeddings and head, then per layer four attention and three feed-forward matrices and
# two norms, and the last norm.
SHAPES = {
    "longllama-3b": (32000, 3200, 8640, 26, [6, 12, 18], 2048, 1e4),
    "longllama-3b-v1.1": (32000, 3200, 8640, 26, [6, 12, 18], 2048, 1e4),
    "longllama-code-7b": (32016, 4096, 11008, 32, [8, 16, 24], 4096, 1e6),
}


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_on_the_meta_device(name):
    vocabulary, hidden, inner, layers, memory, context, theta = SHAPES[name]
    config = LongLlamaConfig.published(name)
    assert (config.mem_layers, config.max_position_embeddings, config.rope_parameters["rope_theta"]) == (
        memory,
        context,
        theta,
    )
    assert config.last_context_length == 1024
    with torch.device("meta"):
        model = LongLlamaForCausalLM(config)
    per_layer = 4 * hidden * hidden + 3 * hidden * inner + 2 * hidden
    assert sum(p.numel() for p in model.parameters()) == 2 * vocabulary * hidden + layers * per_layer + hidden
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    for layer in range(layers):
        names |= {f"model.layers.{layer}.self_attn.{part}_proj.weight" for part in "qkvo"}
        names |= {f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
        names |= {f"model.layers.{layer}.{part}_layernorm.weight" for part in ("input", "post_attention")}
    assert set(model.state_dict()) == names


def test_unknown_published_name():
    with pytest.raises(LlamoryError, match="longllama-3b"):
        LongLlamaConfig.published("longllama-70b")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mem_layers": [2, 40]}, "layer 40, but the model has 32 layers"),
        ({"mem_layers": [-1]}, "layer -1"),
        ({"mem_layers": [3, 3]}, "twice"),
        ({"last_context_length": 4096}, "4096, but it must be between 1 and the context, 2048"),
        ({"mem_dtype": "int4"}, "float32, bfloat16, float16, int8"),
        ({"local_cache_overflow": "drop"}, "slide, flush"),
        ({"mem_search": "hnsw"}, "exact, pages, faiss"),
        ({"mem_attention_grouping": [4]}, "two positive numbers"),
        ({"mem_top_k": 0}, "at least 1"),
        (
            {"logn_attention_scale": -0.1},
            "logn_attention_scale must be at least 0 and finite and logn_attention_start at least 1, not -0.1",
        ),
        (
            {"memory_size_bias": float("inf")},
            "memory_size_bias must be at least 0 and finite and memory_size_bias_start",
        ),
        ({"memory_size_bias_start": 0}, "memory_size_bias_start at least 1, not 0.0 and 0"),
        ({"gradient_checkpoint_every_ith": 0}, "at least 1"),
        ({"mem_layers": [1], "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
    ],
)
def test_impossible_values_get_one_sentence(settings, said):
    with pytest.raises(LlamoryError, match=said) as error:
        LongLlamaConfig(**settings)
    assert "\n" not in str(error.value)


def test_keys_of_earlier_versions_are_read_and_can_be_changed(tmp_path):
    old = {"mem_only_top_k": True, "mem_log_scale": 0.6, "mem_log_start": 4096, "mem_log_bias": 1.0}
    old |= {"mem_log_bias_start": 1024}
    values = {"logn_attention_scale": 0.6, "logn_attention_start": 4096, "memory_size_bias": 1.0}
    values |= {"mem_top_k_attention": True, "memory_size_bias_start": 1024}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "longllama", "mem_layers": [1], **old}))
    for config in (AutoConfig.from_pretrained(tmp_path), LongLlamaConfig(mem_layers=[1], **old)):
        assert {key: getattr(config, key) for key in values} == values
        assert not set(old) & set(config.to_dict())
    changed = AutoConfig.from_pretrained(tmp_path, logn_attention_scale=0.25)
    assert {key: getattr(changed, key) for key in values} == values | {"logn_attention_scale": 0.25}


def test_last_context_follows_a_short_context():
    assert LongLlamaConfig(max_position_embeddings=64).last_context_length == 64
    assert LongLlamaConfig(max_position_embeddings=4096).last_context_length == 1024


@pytest.fixture
def published_folder(make_model, tmp_path):
    """A folder as LongLLaMA's authors published theirs: old keys, remote code, old entries in the weights."""
    model = make_model(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "dtype", "head_dim", "num_key_value_heads", "attention_bias", "mlp_bias",
                "local_cache_overflow", "mem_search", "mem_top_k", "mem_device", "attention_dropout"):  # fmt: skip
        config.pop(key)
    config |= {"rope_theta": 1e6, "rope_scaling": None, "torch_dtype": "float32", "transformers_version": "4.33.2"}
    config["auto_map"] = {
        "AutoConfig": "configuration_longllama.LongLlamaConfig",
        "AutoModelForCausalLM": "modeling_longllama.LongLlamaForCausalLM",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    for layer in range(3):
        weights[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path, model


def test_published_folder_loads_without_its_remote_code(published_folder, ids, tmp_path):
    folder, model = published_folder
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is LongLlamaForCausalLM
    assert not report["missing_keys"] and not report["mismatched_keys"]
    assert loaded.config.rope_parameters["rope_theta"] == 1e6
    with torch.no_grad():
        assert torch.equal(loaded(ids(2, 50)).logits, model(ids(2, 50)).logits)
    assert type(AutoModel.from_pretrained(folder)) is LongLlamaModel
    assert type(AutoConfig.from_pretrained(folder)) is LongLlamaConfig
    loaded.save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize(
    "first",
    [
        "import llamory, transformers",
        "import transformers, llamory",
        "from transformers import AutoModelForCausalLM\nimport llamory",
        "import llamory\nfrom transformers import AutoModelForCausalLM",
        "import llamory, llamory.longllama.causal",
        "import llamory, peft",
    ],
)
def test_the_auto_classes_know_longllama_whatever_is_imported_first(first):
    code = f"""
{first}
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("longllama", vocab_size=8, hidden_size=8, num_attention_heads=1, num_hidden_layers=1)
print(type(AutoModelForCausalLM.from_config(config)).__name__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "LongLlamaForCausalLM"

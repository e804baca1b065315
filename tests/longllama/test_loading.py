"""Loading any LLaMA with memory."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.loading import load_long_model

LLAMAS = {
    "smollm2": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72, "tie_word_embeddings": True},
    "llama-3": {
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_size": 64,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "head_dim": 24},
}


@pytest.mark.parametrize("shape", LLAMAS)
def test_any_llama_folder_gets_memory(shape, ids, tmp_path):
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}
    settings |= {"hidden_size": 32, "num_attention_heads": 4, "pad_token_id": 0, "initializer_range": 0.2}
    stock = LlamaForCausalLM(LlamaConfig(**settings | LLAMAS[shape])).eval()
    stock.save_pretrained(tmp_path)
    model = LongLlamaForCausalLM.from_pretrained(tmp_path, mem_layers=[1, 2], mem_dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(model(ids(1, 60)).logits, stock(ids(1, 60)).logits, atol=2e-5, rtol=1e-4)
        # With memory the local context is a window: what came before is seen at position 0.
        output = model(ids(1, 150))
        assert output.past_key_values.memory_length(1) == 150 - 64
        memory = model.read(ids(150)[:128])
        asked = model(ids(1, 10), past_key_values=model.memory_cache(memory)).logits
        together = model(torch.cat([ids(150)[:128], ids(10)])[None], last_context_length=10).logits[:, -10:]
        torch.testing.assert_close(asked, together, atol=2e-5, rtol=1e-4)


def test_load_long_model_chooses_for_a_plain_llama(model_folder, make_model, tmp_path):
    config = load_long_model(model_folder).config
    assert config.mem_layers == [0, 1]
    assert config.max_position_embeddings == 512
    changed = load_long_model(
        model_folder, mem_layers=[1], context_length=64, mem_dtype="int8", mem_search="pages"
    ).config
    assert (changed.mem_layers, changed.max_position_embeddings, changed.mem_dtype) == ([1], 64, "int8")
    assert changed.last_context_length == 64
    make_model().save_pretrained(tmp_path)
    own = load_long_model(tmp_path).config
    assert (own.mem_layers, own.max_position_embeddings, own.last_context_length) == ([1, 2], 16, 8)
    assert load_long_model(tmp_path, context_length=4).config.last_context_length == 4
    with pytest.raises(LlamoryError, match="context_length is 32"):
        load_long_model(tmp_path, context_length=32)
    with pytest.raises(LlamoryError, match="layer 7"):
        load_long_model(tmp_path, mem_layers=[7])

"""What all tests share: no hub, no notices, a few documents and a tiny model."""

import os
import random

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

WORDS = "river stone bridge winter garden letter window market silver morning harbour candle forest summer".split()


@pytest.fixture(scope="session")
def documents(tmp_path_factory):
    """Forty short documents of a few sentences."""
    folder, chance = tmp_path_factory.mktemp("documents"), random.Random(0)
    for i in range(40):
        sentences = [" ".join(chance.sample(WORDS, 6)).capitalize() + "." for _ in range(4)]
        (folder / f"{i:02}.txt").write_text(" ".join(sentences))
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, documents):
    """A random two-layer LLaMA without a template and its byte-level tokenizer, saved as transformers does."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([p.read_text() for p in documents.iterdir()], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=None,
    )
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder

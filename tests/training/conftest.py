"""A tiny LLaMA folder with a byte-level tokenizer, and a few documents to learn from."""

import random

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llamory.training.settings import LlaraSettings

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
    """A random two-layer LLaMA without a template, saved as transformers does."""
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


@pytest.fixture
def settings(model_folder, documents, tmp_path):
    """Settings of a run that takes a second."""

    def make(**changes):
        values = {
            "model": str(model_folder),
            "data": [str(documents)],
            "output": str(tmp_path / "run"),
            "batch_size": 8,
            "steps": 6,
            "learning_rate": 3e-3,
            "max_length": 150,
            "passage_length": 24,
            "log_every": 1,
            "save_every": 3,
            "cpu": True,
            "quiet": True,
            "export": False,
        }
        return LlaraSettings(**(values | changes))

    return make

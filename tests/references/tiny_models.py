"""Tiny random models that several rooms' tests use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from llamory.longllama import LongLlamaConfig, LongLlamaForCausalLM

CONTEXT, LAST = 16, 8


def make_long_llama(**changes: Any) -> LongLlamaForCausalLM:
    """3 layers, 4 heads over 2 key/value heads, context 16, last context 8, memory of two layers in float32.

    Projections for memory, where there are any, are unlike the layer's own.
    """
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "last_context_length": LAST,
        "mem_layers": [1, 2],
        "mem_dtype": "float32",
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LongLlamaForCausalLM(LongLlamaConfig(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mem_" in name:
                parameter.normal_(std=settings["initializer_range"])
    return model


def save_llama(folder: Path, texts: Iterable[str], **changes: Any) -> None:
    """Save a random two-layer LLaMA without a template and its byte-level tokenizer, as transformers does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    torch.manual_seed(1)
    settings: dict[str, Any] = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": None,
    }
    LlamaForCausalLM(LlamaConfig(**settings | changes)).save_pretrained(folder)
    fast.save_pretrained(folder)


def save_llara(folder: Path, prepare: Callable[[Any], None] = lambda model: None, **changes: Any) -> Path:
    """Save a random LLaMA with LLARA's template and a tokenizer of bytes; `prepare` may change its weights."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from llamory.llara.template import LlaraTemplate

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(["passage " * 9], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    template = LlaraTemplate.from_tokenizer(fast)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(fast), **changes))
    template.prepare_model(model)
    prepare(model)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder

"""A small tokenizer, and a model that finds a passkey only in the last tokens of the prompt."""

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, PUBLISHED_NEEDLE, TASK


class Oracle:
    """Answers as a perfect model would that sees the last `sees` tokens of a prompt only; else it says 0."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self, tokenizer, sees: int, says: str = " {}. Remember it.", pattern: str = r"(\d+)\D+Remember"
    ) -> None:
        self.tokenizer, self.sees, self.says, self.pattern = tokenizer, sees, says, pattern
        self.prompts: list[list[int]] = []
        self.options: list[dict] = []

    def generate(self, *, input_ids, attention_mask, **options):
        assert attention_mask.shape == input_ids.shape and bool(attention_mask.all())
        self.prompts.append(input_ids[0].tolist())
        self.options.append(options)
        seen = self.tokenizer.decode(input_ids[0, -self.sees :], skip_special_tokens=True)
        found = re.search(self.pattern, seen)
        answer = self.tokenizer(self.says.format(found.group(1) if found else "0"), add_special_tokens=False)
        new = torch.tensor([answer["input_ids"][: options["max_new_tokens"]]])
        return torch.cat([input_ids, new], dim=1)


@pytest.fixture(scope="session")
def tokenizer():
    """Pairs of letters, and a token before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator([TASK, *PUBLISHED_HAYSTACK.sentences, PUBLISHED_NEEDLE.replace("{key}", "")], trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.fixture
def oracle(tokenizer) -> Callable[..., Oracle]:
    """Makes a model that finds what is in the last tokens of a prompt."""
    return lambda sees, **settings: Oracle(tokenizer, sees, **settings)


@pytest.fixture
def cell() -> Callable[..., SimpleNamespace]:
    """Makes a cell with a share of right answers."""
    from llamory.evaluation.passkey import Cell, Trial

    def make(length: int, depth: float, *right: bool) -> Cell:
        return Cell(length, depth, tuple(Trial("12", "12" if r else "9", r, float(r), length - 1, 0.5) for r in right))

    return make

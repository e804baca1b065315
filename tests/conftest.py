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
    from tiny_models import save_llama

    folder = tmp_path_factory.mktemp("model")
    save_llama(folder, [path.read_text() for path in documents.iterdir()])
    return folder

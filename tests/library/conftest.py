"""An embedding model whose vectors can be checked by hand: the mean of one unit vector per known word."""

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tiny_models import save_llama

KNOWN_WORDS = ["cat", "dog", "river", "money"]


def keyword_model(words: list[str]) -> SentenceTransformer:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(words, 1)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.vstack([np.zeros(len(words)), np.eye(len(words))]).astype(np.float32)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


@pytest.fixture
def embedder() -> SentenceTransformer:
    return keyword_model(KNOWN_WORDS)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "keywords"
    keyword_model(KNOWN_WORDS).save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "reversed"
    keyword_model([*KNOWN_WORDS[::-1], "tree"]).save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def reader_folder(tmp_path_factory) -> Path:
    """A tiny LLaMA with strong weights, so that what it reads makes a difference; memory in both layers."""
    folder = tmp_path_factory.mktemp("models") / "reader"
    save_llama(folder, ["cat dog river money the a sat with met ran home"], initializer_range=0.3)
    return folder


@pytest.fixture
def embedded(monkeypatch) -> list[str]:
    """Collects every passage that is embedded."""
    texts: list[str] = []
    encode_document = SentenceTransformer.encode_document

    def spy(self, inputs, **kwargs):
        texts.extend(inputs)
        return encode_document(self, inputs, **kwargs)

    monkeypatch.setattr(SentenceTransformer, "encode_document", spy)
    return texts


@pytest.fixture
def docs(tmp_path) -> Path:
    """Three files: one about cats, one about dogs, one about both."""
    folder = tmp_path / "docs"
    (folder / "pets").mkdir(parents=True)
    (folder / "cats.txt").write_text("the cat sat with a cat\n")
    (folder / "pets" / "both.txt").write_text("a cat met a dog\n")
    (folder / "pets" / "dogs.md").write_text("# About dogs\n\nthe dog ran home\n")
    return folder

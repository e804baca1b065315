"""Encoding without padding gives Sentence Transformers' vectors, for every text and every module that may follow."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense

from llamory.embedding import encoder as encoding
from llamory.embedding.encoder import FlatEncoder
from llamory.embedding.pipeline import load_embedder
from tiny_models import save_llara

MAX_LENGTH = 160
TEXTS = [
    "the river",
    "",
    "a much longer text about rivers and mountains " * 20,  # is cut
    "the river",
    "x",
    "def f(x):\n    return x\n" * 3,
    "naïve 日本語 🦙",
    "two words", "two lines", "two rooms",  # of equal length, so one attention call serves them
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    def scatter(model):
        for name, weight in model.named_parameters():
            if "bias" in name or "norm" in name:
                torch.nn.init.normal_(weight, mean=1.0)

    return save_llara(
        tmp_path_factory.mktemp("models") / "llara",
        scatter,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.4,  # so that attention matters
    )


@pytest.fixture
def embedder(checkpoint) -> SentenceTransformer:
    return load_embedder(checkpoint, device="cpu")


def flat(embedder: SentenceTransformer) -> FlatEncoder:
    encoder = FlatEncoder.from_embedder(embedder)
    assert encoder is not None
    return encoder


@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_its_vectors_are_those_of_sentence_transformers(embedder, monkeypatch, budget):
    monkeypatch.setattr(encoding, "CPU_BATCH_TOKENS", budget)
    monkeypatch.setattr(encoding, "TOKENIZER_BATCH_SIZE", 4)
    np.testing.assert_allclose(flat(embedder).encode(TEXTS), embedder.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(flat(embedder).encode(TEXTS, "query"), embedder.encode_query(TEXTS), atol=1e-5)


def test_the_vectors_compared_depend_on_text_and_task(embedder):
    documents, queries = embedder.encode_document(TEXTS[:4]), embedder.encode_query(TEXTS[:4])
    assert np.abs(documents[0] - documents[1]).max() > 0.05
    assert np.abs(documents - queries).max() > 0.05


def test_every_text_is_told_once(embedder, monkeypatch):
    monkeypatch.setattr(encoding, "CPU_BATCH_TOKENS", 150)
    told: list[int] = []
    flat(embedder).encode(TEXTS, advance=told.append)
    assert sum(told) == len(TEXTS) and len(told) > 3


def test_where_the_fast_kernel_is_missing_the_vectors_are_the_same(embedder, monkeypatch):
    monkeypatch.setattr("llamory.embedding.cpu_kernels._KERNEL", None)
    np.testing.assert_allclose(flat(embedder).encode(TEXTS), embedder.encode_document(TEXTS), atol=1e-5)


def test_modules_after_the_slots_and_shorter_vectors_are_kept(embedder):
    torch.manual_seed(1)
    longer = SentenceTransformer(modules=[*embedder, Dense(24, 12)], device="cpu", truncate_dim=7)
    vectors = flat(longer).encode(TEXTS)
    assert vectors.shape == (len(TEXTS), 7) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, longer.encode_document(TEXTS), atol=1e-5)


def test_an_adapter_of_the_model_counts(embedder):
    from peft import LoraConfig

    before = flat(embedder).encode(TEXTS)
    embedder.add_adapter(
        LoraConfig(r=2, target_modules=["q_proj", "down_proj", "gate_proj", "up_proj"], init_lora_weights=False)
    )
    expected = embedder.encode_document(TEXTS)
    np.testing.assert_allclose(flat(embedder).encode(TEXTS), expected, atol=1e-5)
    assert np.abs(before - expected).max() > 0.01


def test_half_precision_is_close(embedder):
    exact = embedder.encode_document(TEXTS)
    with torch.autocast("cpu", torch.bfloat16):
        np.testing.assert_allclose(flat(embedder).encode(TEXTS), exact, atol=0.05)
    vectors = flat(embedder.bfloat16()).encode(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, exact, atol=0.05)


def test_embedders_that_it_doesnt_know_are_left_alone(embedder, checkpoint):
    assert FlatEncoder.from_embedder(SentenceTransformer(modules=list(embedder)[:1])) is None
    prompted = load_embedder(checkpoint, device="cpu")
    prompted.prompts = {"document": "passage: "}
    assert FlatEncoder.from_embedder(prompted) is None
    eager = load_embedder(checkpoint, device="cpu")
    eager[0].auto_model.set_attn_implementation("eager")
    assert FlatEncoder.from_embedder(eager) is None
    weighted = load_embedder(checkpoint, device="cpu")
    weighted[1].emb_layer.weight.data[5] = 0.5
    assert FlatEncoder.from_embedder(weighted) is None
    assert FlatEncoder.from_embedder(embedder) is not None


def test_a_text_with_a_slot_token_is_refused(embedder):
    with pytest.raises(Exception, match="only the prompts may"):
        flat(embedder).encode(["see <s1>"])

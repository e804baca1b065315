"""Negatives that a retriever finds similar."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from llamory.embedding.encoder import escape_slot_tokens
from llamory.embedding.pipeline import export_sentence_transformer, load_embedder
from llamory.llara import LlaraTemplate
from llamory.training.fot.contexts import ContextSampler, ContextSamplingConfig, embedder

WORDS = ["river", "money", "cat", "dog"]


def first_token_vectors(rows):
    """Vectors with whole numbers, so that their products are exact and often tie."""
    return torch.stack([torch.stack([row[0] % 3, row[0] % 2, row[1] % 3]) for row in rows]).float()


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10**6), negatives=st.integers(1, 6))
def test_similar_negatives_are_the_first_of_a_plain_sort(seed, negatives):
    """The rows of the last place may see all others."""
    ids = torch.randint(0, 9, (8, 2), generator=torch.Generator().manual_seed(seed))
    sampling_config = ContextSamplingConfig(
        crossbatch_schedule=[(0, 0), (0, 0), (0, 0), (1, negatives)], negatives="similar"
    )
    contexts = ContextSampler(sampling_config, 8, 2, embed=first_token_vectors).choose(seed, 1, ids)
    vectors = first_token_vectors(list(ids))
    for row, own in ((6, []), (7, [6])):
        ranked = torch.sort(vectors[:6] @ vectors[row], descending=True, stable=True).indices
        assert contexts[row] == own + ranked[:negatives].tolist()


@pytest.fixture(scope="module")
def word_tokenizer():
    ids = {word: at for at, word in enumerate(["[UNK]", "<s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>")


@pytest.fixture(scope="module")
def word_model():
    """The mean of one unit vector per known word; its ids aren't those of the tokenizer that wrote the rows."""
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(WORDS, 1)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.vstack([np.zeros(len(WORDS)), 3 * np.eye(len(WORDS))]).astype(np.float32)
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")


def test_any_sentence_transformers_model_finds_similar_rows(word_tokenizer, word_model, tmp_path):
    folder = tmp_path / "model"
    word_model.save(str(folder), create_model_card=False)
    texts = ["river river", "money money", "river cat", "money dog"]
    ids = torch.tensor(word_tokenizer(["<s> " + text for text in texts])["input_ids"])
    half = 0.5**0.5
    expected = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [half, 0, half, 0], [0, half, 0, half]])
    for model in (word_model, SentenceTransformer(str(folder), device="cpu")):
        embed = embedder(model, word_tokenizer, batch_size=3)
        vectors = embed(list(ids))
        torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)
        assert not vectors.requires_grad
        sampling_config = ContextSamplingConfig(
            crossbatch_schedule=[(0, 0), (0, 0), (0, 1), (0, 1)], negatives="similar"
        )
        assert ContextSampler(sampling_config, 4, embed=embed).choose(0, input_ids=ids)[2:] == [[0], [1]]
    assert not any(weight.requires_grad for weight in word_model.parameters())


def test_texts_that_the_model_would_not_take_are_changed(word_tokenizer, word_model):
    embed = embedder(word_model, word_tokenizer, clean=lambda texts: [text.replace("cat", "dog") for text in texts])
    vectors = embed([torch.tensor(word_tokenizer("cat")["input_ids"])])
    assert vectors.tolist() == [[0, 0, 0, 1]]


def test_a_folder_that_llara_exported_reads_rows_as_documents(model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("River stone.", "Silver morning, harbour.", "<s1>")]
    with_slots = AutoTokenizer.from_pretrained(model_folder)
    model = LlamaForCausalLM.from_pretrained(model_folder)
    LlaraTemplate.from_tokenizer(with_slots).prepare_model(model)
    model.save_pretrained(tmp_path / "checkpoint")
    with_slots.save_pretrained(tmp_path / "checkpoint")
    retriever = load_embedder(tmp_path / "checkpoint", device="cpu")
    exported = export_sentence_transformer(tmp_path / "checkpoint", tmp_path / "exported")
    embed = embedder(
        SentenceTransformer(str(exported)), tokenizer, clean=lambda texts: escape_slot_tokens(retriever, texts)
    )
    wanted = [retriever.encode_document(text) for text in ("River stone.", "Silver morning, harbour.", "< s1>")]
    torch.testing.assert_close(embed(rows).cpu(), torch.tensor(np.stack(wanted)), atol=1e-5, rtol=0)

"""A library works with LLARA models: texts about slot tokens are indexed, passages fit, weights tell models apart."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from keyword_models import keyword_model
from llamory.embedding import encoder
from llamory.embedding.encoder import embed_passages, embed_query, fingerprint, resolve_chunk_size
from llamory.embedding.pipeline import export_sentence_transformer, load_embedder
from llamory.errors import LlamoryError
from llamory.library import Library
from llamory.llara.template import LlaraTemplate
from tiny_models import save_llara


@pytest.fixture(scope="module")
def embedder() -> SentenceTransformer:
    return keyword_model(["cat", "dog", "river", "money"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small random LLARA model that reads bytes."""
    return save_llara(
        tmp_path_factory.mktemp("models") / "llara",
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )


def test_a_llara_checkpoint_can_be_a_librarys_model(tmp_path, checkpoint):
    texts = ["the river", "a mountain far away", "the summary stands in <s1> to <s8>"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    library = Library(tmp_path / "library", checkpoint, device="cpu")
    library.add(tmp_path, progress=False)
    found = {hit.text: hit.score for hit in library.search("what is in <s1>?", mode="dense")}
    model = load_embedder(checkpoint, device="cpu")
    passages = model.encode_document([*texts[:2], "the summary stands in < s1> to < s8>"])
    expected = passages @ model.encode_query("what is in < s1>?")
    np.testing.assert_allclose([found[text] for text in texts], expected, atol=1e-5)


def test_passages_leave_room_for_the_prompt(checkpoint):
    model = load_embedder(checkpoint, device="cpu", max_length=200)
    prompt = len(LlaraTemplate.from_config(model[0].config).sequence([], predict=False))
    assert resolve_chunk_size(model, 20) == 20
    assert resolve_chunk_size(model, None) == 200 - prompt
    with pytest.raises(LlamoryError, match=f"at most {200 - prompt}"):
        resolve_chunk_size(model, 200 - prompt + 1)


def test_a_model_without_a_limit_gets_the_usual_passages(embedder):
    assert resolve_chunk_size(embedder, None) == 256


def test_an_export_is_the_same_model_as_its_checkpoint(tmp_path, checkpoint):
    folder = export_sentence_transformer(checkpoint, tmp_path / "exported")
    assert fingerprint(load_embedder(folder, device="cpu")) == fingerprint(load_embedder(checkpoint, device="cpu"))


def test_one_changed_weight_or_prompt_makes_another_model(checkpoint):
    model = load_embedder(checkpoint, device="cpu")
    before = fingerprint(model)
    weight = model[0].model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    after = fingerprint(model)
    assert after != before
    model.tokenizer.chat_template += " "
    assert fingerprint(model) != after


def test_half_precision_models_have_fingerprints_too(embedder):
    assert fingerprint(embedder) != fingerprint(SentenceTransformer(modules=list(embedder)).half())


def test_passages_and_queries_get_the_models_own_vectors(checkpoint):
    model, texts = load_embedder(checkpoint, device="cpu"), ["the river", "", "a mountain far away " * 9, "the river"]
    told: list[int] = []
    vectors = embed_passages(model, texts, told.append)
    assert vectors.dtype == np.float32 and sum(told) == len(texts)
    np.testing.assert_allclose(vectors, model.encode_document(texts), atol=1e-5)
    np.testing.assert_allclose(embed_query(model, "the sea"), model.encode_query("the sea"), atol=1e-5)


def test_passages_of_other_models_come_back_in_order(embedder):
    texts = ["cat", "a long text about a dog", "river", *["money"] * 40]
    np.testing.assert_array_equal(embed_passages(embedder, texts), embedder.encode_document(texts))


def test_the_fingerprint_reads_the_weights_once(checkpoint, monkeypatch):
    model, reads = load_embedder(checkpoint, device="cpu"), []
    merged = encoder.merged
    monkeypatch.setattr(encoder, "merged", lambda *arguments: reads.append(1) or merged(*arguments))
    first = fingerprint(model)
    assert fingerprint(model) == first and len(reads) == 1
    with torch.no_grad():
        model[0].model.layers[0].mlp.up_proj.weight.mul_(2)
    assert fingerprint(model) != first and len(reads) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_passages_and_queries_are_computed_in_the_same_dtype(checkpoint, dtype):
    model = load_embedder(checkpoint, device="cpu", query_prompt="summary")
    exact, query = embed_query(model, "the river"), embed_query(model, "the river", dtype=dtype)
    assert query.dtype == np.float32 and not np.array_equal(query, exact)
    np.testing.assert_allclose(query, embed_passages(model, ["the river"], dtype=dtype)[0], rtol=0, atol=1e-6)


def test_a_library_in_bfloat16_searches_in_bfloat16(tmp_path, checkpoint):
    (tmp_path / "a.txt").write_text("the river")
    library = Library(tmp_path / "library", checkpoint, device="cpu", bf16=True)
    library.add(tmp_path / "a.txt", progress=False)
    model = load_embedder(checkpoint, device="cpu")
    wanted = embed_passages(model, ["the river"], dtype="bfloat16")[0] @ embed_query(model, "sea", dtype="bfloat16")
    exact = embed_passages(model, ["the river"], dtype="bfloat16")[0] @ embed_query(model, "sea")
    score = library.search("sea", mode="dense")[0].score
    assert abs(score - wanted) < abs(score - exact)

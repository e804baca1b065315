"""Encoding without padding gives Sentence Transformers' vectors; a library works with LLARA models and any others."""

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense

from keyword_models import keyword_model
from llamory.embedding import encoder
from llamory.embedding.encoder import FlatEncoder, embed_passages, embed_query, fingerprint, resolve_chunk_size
from llamory.embedding.pipeline import export_sentence_transformer, load_embedder
from llamory.errors import LlamoryError
from llamory.library import Library
from llamory.llara.template import LlaraTemplate
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
    monkeypatch.setattr(encoder, "CPU_BATCH_TOKENS", budget)
    monkeypatch.setattr(encoder, "TOKENIZER_BATCH_SIZE", 4)
    np.testing.assert_allclose(flat(embedder).encode(TEXTS), embedder.encode_document(TEXTS), atol=1e-5)
    np.testing.assert_allclose(flat(embedder).encode(TEXTS, "query"), embedder.encode_query(TEXTS), atol=1e-5)


def test_the_vectors_compared_depend_on_text_and_task(embedder):
    documents, queries = embedder.encode_document(TEXTS[:4]), embedder.encode_query(TEXTS[:4])
    assert np.abs(documents[0] - documents[1]).max() > 0.05
    assert np.abs(documents - queries).max() > 0.05


def test_every_text_is_told_once(embedder, monkeypatch):
    monkeypatch.setattr(encoder, "CPU_BATCH_TOKENS", 150)
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


@pytest.fixture(scope="module")
def keyword_embedder() -> SentenceTransformer:
    return keyword_model(["cat", "dog", "river", "money"])


@pytest.fixture(scope="module")
def byte_model(tmp_path_factory):
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


def test_a_llara_checkpoint_can_be_a_librarys_model(tmp_path, byte_model):
    texts = ["the river", "a mountain far away", "the summary stands in <s1> to <s8>"]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    library = Library(tmp_path / "library", byte_model, device="cpu")
    library.add(tmp_path, progress=False)
    found = {hit.text: hit.score for hit in library.search("what is in <s1>?", mode="dense")}
    model = load_embedder(byte_model, device="cpu")
    passages = model.encode_document([*texts[:2], "the summary stands in < s1> to < s8>"])
    expected = passages @ model.encode_query("what is in < s1>?")
    np.testing.assert_allclose([found[text] for text in texts], expected, atol=1e-5)


def test_passages_leave_room_for_the_prompt(byte_model):
    model = load_embedder(byte_model, device="cpu", max_length=200)
    prompt = len(LlaraTemplate.from_config(model[0].config).sequence([], predict=False))
    assert resolve_chunk_size(model, 20) == 20
    assert resolve_chunk_size(model, None) == 200 - prompt
    with pytest.raises(LlamoryError, match=f"at most {200 - prompt}"):
        resolve_chunk_size(model, 200 - prompt + 1)


def test_a_model_without_a_limit_gets_the_usual_passages(keyword_embedder):
    assert resolve_chunk_size(keyword_embedder, None) == 256


def test_an_export_is_the_same_model_as_its_checkpoint(tmp_path, byte_model):
    folder = export_sentence_transformer(byte_model, tmp_path / "exported")
    assert fingerprint(load_embedder(folder, device="cpu")) == fingerprint(load_embedder(byte_model, device="cpu"))


def test_one_changed_weight_or_prompt_makes_another_model(byte_model):
    model = load_embedder(byte_model, device="cpu")
    before = fingerprint(model)
    weight = model[0].model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))
    after = fingerprint(model)
    assert after != before
    model.tokenizer.chat_template += " "
    assert fingerprint(model) != after


def test_half_precision_models_have_fingerprints_too(keyword_embedder):
    assert fingerprint(keyword_embedder) != fingerprint(SentenceTransformer(modules=list(keyword_embedder)).half())


def test_passages_and_queries_get_the_models_own_vectors(byte_model):
    model, texts = load_embedder(byte_model, device="cpu"), ["the river", "", "a mountain far away " * 9, "the river"]
    told: list[int] = []
    vectors = embed_passages(model, texts, told.append)
    assert vectors.dtype == np.float32 and sum(told) == len(texts)
    np.testing.assert_allclose(vectors, model.encode_document(texts), atol=1e-5)
    np.testing.assert_allclose(embed_query(model, "the sea"), model.encode_query("the sea"), atol=1e-5)


def test_passages_of_other_models_come_back_in_order(keyword_embedder):
    texts = ["cat", "a long text about a dog", "river", *["money"] * 40]
    np.testing.assert_array_equal(embed_passages(keyword_embedder, texts), keyword_embedder.encode_document(texts))


def test_the_fingerprint_reads_the_weights_once(byte_model, monkeypatch):
    model, reads = load_embedder(byte_model, device="cpu"), []
    merged = encoder.merged
    monkeypatch.setattr(encoder, "merged", lambda *arguments: reads.append(1) or merged(*arguments))
    first = fingerprint(model)
    assert fingerprint(model) == first and len(reads) == 1
    with torch.no_grad():
        model[0].model.layers[0].mlp.up_proj.weight.mul_(2)
    assert fingerprint(model) != first and len(reads) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_passages_and_queries_are_computed_in_the_same_dtype(byte_model, dtype):
    model = load_embedder(byte_model, device="cpu", query_prompt="summary")
    exact, query = embed_query(model, "the river"), embed_query(model, "the river", dtype=dtype)
    assert query.dtype == np.float32 and not np.array_equal(query, exact)
    np.testing.assert_allclose(query, embed_passages(model, ["the river"], dtype=dtype)[0], rtol=0, atol=1e-6)


def test_a_library_in_bfloat16_searches_in_bfloat16(tmp_path, byte_model):
    (tmp_path / "a.txt").write_text("the river")
    library = Library(tmp_path / "library", byte_model, device="cpu", bf16=True)
    library.add(tmp_path / "a.txt", progress=False)
    model = load_embedder(byte_model, device="cpu")
    wanted = embed_passages(model, ["the river"], dtype="bfloat16")[0] @ embed_query(model, "sea", dtype="bfloat16")
    exact = embed_passages(model, ["the river"], dtype="bfloat16")[0] @ embed_query(model, "sea")
    score = library.search("sea", mode="dense")[0].score
    assert abs(score - wanted) < abs(score - exact)

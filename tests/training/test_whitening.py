"""Whitening is fitted without labels, goes with the model, and is what the formula says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

from llamory.cli import main
from llamory.embedding.encoder import embed_passages, embed_queries
from llamory.embedding.pipeline import (
    add_whitening,
    export_sentence_transformer,
    fit_whitening_on_texts,
    load_embedder,
    query_prompt,
    sample_passages,
    set_query_prompt,
)
from llamory.embedding.whitening import WHITENING_FILE, Whitening, fit_whitening, pseudo_queries
from llamory.errors import LlamoryError
from llamory.training.llara import train_llara
from llamory.training.retriever import train_retriever

TEXTS = ["River stone and water.", "a boat goes down the river in winter", "x = 1"]
EXPORT = "sentence-transformers"


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def trained(settings) -> Path:
    return Path(train_llara(settings(whiten=24, export=True, max_seq_length=150))["output"])


def test_the_matrix_is_a_power_of_the_shrunk_covariance():
    chance = np.random.default_rng(0)
    parts = [chance.normal(size=(size, 5)) @ chance.normal(size=(5, 5)) + 3 for size in (40, 30, 30)]
    whitening = fit_whitening(
        torch.tensor(parts[0]), {"prediction": torch.tensor(parts[1]), "summary": torch.tensor(parts[2])}
    )
    covariance = sum(np.cov(part, rowvar=False, bias=True) for part in parts) / 3
    shrunk = covariance + 0.1 * np.trace(covariance) / 5 * np.eye(5)
    # All of whitening would be the power -1/2; three quarters of it are -3/8.
    found = np.linalg.matrix_power(whitening.matrix.double().numpy(), 8)
    wanted = np.linalg.inv(np.linalg.matrix_power(shrunk, 3))
    np.testing.assert_allclose(found / np.trace(found), wanted / np.trace(wanted), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whitening.centres["document"], parts[0].mean(0), rtol=1e-5)
    np.testing.assert_allclose(whitening.centres["summary_query"], parts[2].mean(0), rtol=1e-5)


def test_shortened_texts_start_alike_and_are_as_short_as_queries():
    texts = [" ".join(f"w{i}.{j}" for j in range(40)) for i in range(100)]
    short = pseudo_queries(texts)
    assert all(text.startswith(each) and 4 <= len(each.split()) <= 14 for text, each in zip(texts, short, strict=True))
    assert {len(each.split()) for each in short} == set(range(4, 15))
    assert pseudo_queries(["one two"]) == ["one two"]


def test_a_trained_model_is_whitened_wherever_it_is_loaded(trained):
    tensors = {name: tensor.double().numpy() for name, tensor in load_file(trained / WHITENING_FILE).items()}
    plain = load_embedder(trained, device="cpu")
    del plain[-1], plain[-1]
    assert [type(module).__name__ for module in plain] == ["Transformer", "WordWeights", "Pooling", "Normalize"]

    def wanted(vectors, centre):
        return unit((vectors.astype(np.float64) - tensors[centre]) @ tensors["matrix"])

    modules = json.loads((trained / EXPORT / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    for model in (load_embedder(trained, device="cpu"), SentenceTransformer(str(trained / EXPORT), device="cpu")):
        for prompt in ("prediction", "summary", "prediction"):
            set_query_prompt(model, prompt)
            set_query_prompt(plain, prompt)
            queries = wanted(plain.encode_query(TEXTS), f"{prompt}_query_centre")
            for found in (model.encode_query(TEXTS), embed_queries(model, TEXTS)):
                np.testing.assert_allclose(found, queries, atol=1e-5)
        documents = wanted(plain.encode_document(TEXTS), "document_centre")
        for found in (model.encode_document(TEXTS), model.encode(TEXTS), embed_passages(model, TEXTS)):
            np.testing.assert_allclose(found, documents, atol=1e-5)


def test_whitening_is_put_on_the_device_of_the_embedder(trained):
    model = load_embedder(trained, device="cpu", whitened=False).to("meta")
    add_whitening(model, Whitening.load(trained, model[0].config.hidden_size))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_vectors_of_what_it_was_fitted_on_are_centred_and_more_even(trained, documents, tmp_path):
    texts = sample_passages(trained, [documents])
    assert sorted(texts) == sorted(path.read_text() for path in documents.iterdir())
    model = load_embedder(export_sentence_transformer(trained, tmp_path / "out", whitening_texts=texts), device="cpu")
    whole = model.encode_document(texts)
    del model[-1], model[-1]
    plain = model.encode_document(texts)
    assert np.linalg.norm(whole.mean(0)) < 0.3 < np.linalg.norm(plain.mean(0))

    def effective_dimension(vectors):
        values = np.linalg.eigvalsh(np.cov(vectors, rowvar=False))
        return values.sum() ** 2 / (values**2).sum()

    assert effective_dimension(whole) > 1.5 * effective_dimension(plain)


def test_a_whitened_export_keeps_the_prompt_it_is_given(trained, documents, tmp_path):
    words = [
        "export",
        str(trained),
        "--output",
        str(tmp_path / "out"),
        "--query-prompt",
        "prediction",
        "--max-length",
        "90",
    ]
    with pytest.raises(SystemExit) as end:
        main([*words, "--whiten", str(documents), "--quiet", "--json"])
    assert end.value.code == 0
    found, other = SentenceTransformer(str(tmp_path / "out"), device="cpu"), load_embedder(trained, device="cpu")
    assert query_prompt(found) == "prediction"
    (route,) = {route for (task, _), route in found[-2].route_mappings.items() if task == "query"}
    assert route == "prediction_query"
    assert len(found) == len(other)  # whitened anew, not twice
    assert not np.allclose(found.encode_document(TEXTS), other.encode_document(TEXTS), atol=1e-3)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("cache", [False, True], ids=["no cache", "cache"])
def test_fine_tuning_goes_through_whitening_and_leaves_it_as_it_is(
    trained, retriever_settings, tmp_path, monkeypatch, lora, cache
):
    from sentence_transformers.base.modules.dense import Dense

    seen = []
    forward = Dense.forward

    def spy(self, features):
        result = forward(self, features)
        if self.training:
            seen.append((self, len(result["sentence_embedding"])))
        return result

    monkeypatch.setattr(Dense, "forward", spy)
    output = tmp_path / "tuned"
    train_retriever(retriever_settings(model=str(trained), output=str(output), steps=1, lora=lora, cache=cache))
    counts: dict[Dense, int] = {}
    for module, rows in seen:
        counts[module] = counts.get(module, 0) + rows
    passes = 2 if cache else 1
    assert sorted(counts.values()) == [8 * passes, 16 * passes]  # queries, and two documents each
    biases = {rows: module.linear.bias.detach() for module, rows in counts.items()}
    before = load_file(trained / WHITENING_FILE)
    for rows, centre in ((8, "summary_query_centre"), (16, "document_centre")):
        torch.testing.assert_close(biases[rows * passes], -before["matrix"] @ before[centre], atol=1e-5, rtol=1e-4)
    tuned = load_embedder(output, device="cpu")
    for name, weight in load_embedder(trained, device="cpu")[-2].state_dict().items():
        assert torch.equal(tuned[-2].state_dict()[name], weight)


def test_what_does_not_fit_is_refused(trained, settings, tmp_path):
    with pytest.raises(LlamoryError, match="whiten must be 0 or at least 16 passages, not 3"):
        train_llara(settings(output=str(tmp_path / "other"), whiten=3))
    (tmp_path / "few.txt").write_text("A river runs south.")
    with pytest.raises(LlamoryError, match="needs at least 16 passages and there are 1; add data"):
        train_llara(settings(output=str(tmp_path / "other"), data=[str(tmp_path / "few.txt")], whiten=20))
    with pytest.raises(LlamoryError, match="needs at least 16 texts, not 2"):
        fit_whitening_on_texts(trained, ["one", "two"], device="cpu")
    tensors = load_file(trained / WHITENING_FILE)
    for broken in ({"matrix": torch.eye(3)}, {"document_centre": tensors["document_centre"] * float("nan")}):
        save_file(tensors | broken, trained / WHITENING_FILE)
        with pytest.raises(LlamoryError, match=f"made for another model.*its {next(iter(broken))} doesn't fit"):
            load_embedder(trained, device="cpu")
    (trained / WHITENING_FILE).write_bytes(b"broken")
    with pytest.raises(LlamoryError, match="can't be read"):
        load_embedder(trained, device="cpu")

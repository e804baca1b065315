"""`llamory eval retrieval` scores retrievers on BEIR folders, side by side with BM25."""

import json
import math
from pathlib import Path

import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoTokenizer, LlamaModel

from keyword_models import keyword_model
from llamory.models.device import pick_device

DOCUMENTS = {
    "cats": "the cat sat",
    "dogs": "dog and dog and cat",
    "banks": "money by the river",
    "empty": "",
    "hm": "hm",
}
QUERIES = {"q1": ("dog", "dogs"), "q2": ("cat dog", "dogs"), "q3": ("hm", "hm"), "q4": ("money", "banks")}


@pytest.fixture
def data(tmp_path) -> Path:
    """Four queries, each with one relevant document among five."""
    folder = tmp_path / "pets"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": key, "title": "", "text": text} for key, text in DOCUMENTS.items()]
    queries = [{"_id": key, "text": text} for key, (text, _) in QUERIES.items()]
    for name, entries in (("corpus", corpus), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    rows = "".join(f"{key}\t{relevant}\t1\n" for key, (_, relevant) in QUERIES.items())
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """One model that knows all words but "hm", and one that knows "cat" only."""
    folder = tmp_path_factory.mktemp("models")
    for name, words in {"knowing": ["cat", "dog", "river", "money"], "feline": ["cat"]}.items():
        keyword_model(words).save(str(folder / name), create_model_card=False)
    return {name: folder / name for name in ("knowing", "feline")}


def test_models_and_bm25_stand_side_by_side(llamory, data, models, tmp_path) -> None:
    lines = tmp_path / "queries.jsonl"
    arguments = ["eval", "retrieval", data, "--model", models["knowing"], "--model", models["feline"]]
    ran = llamory(*arguments, "--json", "--per-query", lines)
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["evaluation"] == "retrieval"
    settings = document["settings"]
    assert (settings["data"], settings["split"], settings["queries"], settings["documents"]) == ("pets", "test", 4, 5)
    assert list(document["runs"]) == ["BM25", str(models["knowing"]), str(models["feline"])]
    bm25, knowing, feline = document["runs"].values()
    assert (bm25["nDCG@10"], bm25["MRR@10"], bm25["Recall@100"]) == (1, 1, 1)
    # "hm" is no word to this model: all its cosines are 0, and the greatest id wins, which is that of "hm" itself.
    assert knowing["MRR@10"] == 1
    # "cat" finds both texts with a cat, equally; for all else every cosine is 0: hm, dogs, cats, banks.
    assert feline["MRR@10"] == pytest.approx((1 / 2 + 1 + 1 + 1 / 4) / 4)
    assert feline["nDCG@10"] == pytest.approx((1 / math.log2(3) + 1 + 1 + 1 / math.log2(5)) / 4, abs=1e-6)
    low, high = feline["intervals"]["MRR@10"]
    assert 0.25 <= low < feline["MRR@10"] < high <= 1
    gaps = {(Path(gap["model"]).name, Path(gap["minus"]).name): gap["MRR@10"] for gap in document["differences"]}
    assert gaps == pytest.approx(
        {("BM25", "knowing"): 0, ("BM25", "feline"): 1 - 2.75 / 4, ("knowing", "feline"): 1 - 2.75 / 4}
    )
    entries = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(entries) == 12
    assert entries[0] == {
        "model": "BM25", "query": "q1", "nDCG@10": 1, "MRR@10": 1, "Recall@100": 1, "found": ["dogs"],
    }  # fmt: skip
    assert entries[8]["found"] == ["hm", "dogs", "cats", "banks"]


def test_the_table_names_metrics_and_intervals(llamory, data, models) -> None:
    ran = llamory("eval", "retrieval", data, "--model", models["feline"])
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0] == "pets (test): 4 queries, 5 documents"
    assert ran.out.splitlines()[2].split() == ["nDCG@10", "MRR@10", "Recall@100"]
    rows = [line.split() for line in ran.out.splitlines()]
    assert ["BM25", "1.000", "1.000", "1.000"] in rows
    assert ["(1.000", "to", "1.000)"] * 3 in rows
    assert any(row[:1] == ["feline"] and row[2] == "0.688" for row in rows)
    assert "nDCG@10 of BM25 minus feline: +0.235 (+" in ran.out
    assert "BM25: nDCG@10 1.000" in ran.err
    alone = llamory("eval", "retrieval", data, "--quiet")
    assert (alone.code, alone.err) == (0, "")
    assert "minus" not in alone.out


def test_what_was_scored_is_not_scored_again(llamory, data, models, tmp_path, monkeypatch) -> None:
    arguments = ["eval", "retrieval", data, "--model", models["knowing"], "--output", tmp_path / "out", "--json"]
    first = json.loads(llamory(*arguments).out)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["queries.jsonl", "retrieval.json"]
    assert json.loads((tmp_path / "out" / "retrieval.json").read_text()) == first
    embedded: list[str] = []
    encode = SentenceTransformer.encode_document

    def spy(self, inputs, **settings):
        embedded.extend(inputs)
        return encode(self, inputs, **settings)

    monkeypatch.setattr(SentenceTransformer, "encode_document", spy)
    again = llamory(*arguments, "--model", models["feline"], "--per-query", tmp_path / "lines")
    document = json.loads(again.out)
    assert {name: document["runs"][name] for name in first["runs"]} == first["runs"]  # their seconds, too
    assert len(document["runs"]) == 3
    assert len(embedded) == 4  # documents, for the new model alone
    assert (tmp_path / "lines").read_text() == (tmp_path / "out" / "queries.jsonl").read_text()
    other = llamory(*arguments, "--num-queries", "3")
    assert (other.code, other.out) == (2, "")
    assert "made with other settings (" in other.err
    # A kill between the two files leaves lines of a model that the JSON file doesn't have: it is scored again.
    (tmp_path / "out" / "retrieval.json").write_text(json.dumps(first))
    assert list(json.loads(llamory(*arguments).out)["runs"]) == list(first["runs"])


def test_a_plain_llama_stands_beside_them_by_its_mean(llamory, data, model_folder, tmp_path) -> None:
    lines = tmp_path / "queries.jsonl"
    ran = llamory("eval", "retrieval", data, "--mean-pooling", model_folder, "--json", "--per-query", lines, "--quiet")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert list(document["runs"]) == ["BM25", f"mean of {model_folder}"]
    model, tokenizer = LlamaModel.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)

    def vector(text: str) -> torch.Tensor:
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state.mean(1)[0]
        return mean / mean.norm()

    documents = {key: vector(text) for key, text in DOCUMENTS.items() if text}
    found = [entry["found"] for entry in map(json.loads, lines.read_text().splitlines()) if entry["model"] != "BM25"]
    for (query, _), ranked in zip(QUERIES.values(), found, strict=True):
        scores = {key: float(vector(query) @ each) for key, each in documents.items()}
        assert [scores[key] for key in ranked] == pytest.approx(sorted(scores.values(), reverse=True), abs=1e-5)


def test_a_smaller_sample_is_drawn(llamory, data) -> None:
    ran = llamory("eval", "retrieval", data, "--num-queries", "2", "--num-documents", "3", "--json", "--quiet")
    settings = json.loads(ran.out)["settings"]
    assert (settings["queries"], settings["documents"]) == (2, 3)


def test_models_are_loaded_on_the_device(llamory, data, models, model_folder, monkeypatch) -> None:
    loaded: list[object] = []
    load = SentenceTransformer.__init__

    def spy(self, *arguments, **settings) -> None:
        loaded.append(settings["device"])
        load(self, *arguments, **settings)

    monkeypatch.setattr(SentenceTransformer, "__init__", spy)
    arguments = ("eval", "retrieval", data, "--model", models["knowing"], "--mean-pooling", model_folder, "--quiet")
    assert llamory(*arguments, "--device", "cpu").code == 0
    assert llamory(*arguments).code == 0
    assert loaded == ["cpu", "cpu", pick_device(), pick_device()]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere/set"], "There is no folder nowhere/set; give a BEIR folder, or the name of an mteb task."),
        (["{data}", "--model", "./nowhere"], "There is no folder ./nowhere; give the folder of a checkpoint."),
        (["{data}", "--model", "{plain}"], "{plain} is a plain LLaMA without a LLARA template in its config"),
        (["{data}", "--no-bm25"], "There is nothing to score: give a --model, or leave out --no-bm25."),
        (["{data}", "--model", "a", "--model", "a"], "The model a was named twice"),
        (["{data}", "--split", "dev"], "{data}: there is no split 'dev'; there is test."),
        (["{data}", "--num-queries", "9"], "pets has 4 queries in the split test, not 9."),
        (["{data}", "--per-query", "nowhere/lines"], "There is no folder nowhere for the per-query file."),
        (["{data}/corpus.jsonl"], "{data}/corpus.jsonl is a file; give a BEIR folder"),
    ],
)
def test_a_wrong_wish_is_one_sentence(llamory, data, model_folder, arguments: list[str], sentence: str) -> None:
    def fill(text: str) -> str:
        return text.replace("{data}", str(data)).replace("{plain}", str(model_folder))

    ran = llamory("eval", "retrieval", *map(fill, arguments))
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("Error: " + fill(sentence))

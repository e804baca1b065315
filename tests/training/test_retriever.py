"""Training a retriever: what reaches the model, what it learns, and what the folder is that it leaves."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM, LlamaModel

from llamory.cli.settings import read_settings
from llamory.embedding.pipeline import load_embedder
from llamory.errors import LlamoryError
from llamory.library import Library
from llamory.llara import LlaraTemplate
from llamory.llara.modeling import NewLlamaModel
from llamory.training.retriever import _arguments, _set_columns, train_retriever
from llamory.training.settings import RetrieverSettings
from toy_pairs import WORDS, write_pairs
from training_runs import losses, weights

LENGTH = 200


@pytest.fixture
def settings(retriever_settings):
    return retriever_settings


@torch.no_grad()
def slot_mean(folder, text, *, query):
    """A text's embedding from its ids, by way of transformers alone."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    template = LlaraTemplate.from_config(model.config)
    ids = template.encode(tokenizer, text, summarize=not query, predict=query)
    return torch.nn.functional.normalize(model(torch.tensor([ids])).last_hidden_state[0, -8:].mean(0), dim=0).numpy()


def mean_rank(embedder, pairs):
    """The rank of a query's own answer among all answers, 0 being the best."""
    lines = [json.loads(line) for line in pairs.read_text().splitlines()]
    queries = embedder.encode_query([line["query"] for line in lines])
    answers = embedder.encode_document([line["pos"][0] for line in lines])
    scores = queries @ answers.T
    return (scores > scores.diagonal()[:, None]).sum(1).mean()


@pytest.fixture
def read(monkeypatch):
    """Collects the rows of token ids, without padding, that reach the model in training."""
    rows: list[tuple[int, ...]] = []
    forward = NewLlamaModel.forward

    @functools.wraps(forward)
    def spy(self, input_ids=None, attention_mask=None, **kwargs):
        if self.training and "layout" not in kwargs:  # with it, the model goes on with what it was called with
            kept = zip(input_ids, attention_mask, strict=True)
            rows.extend(tuple(ids[mask.bool()].tolist()) for ids, mask in kept)
        return forward(self, input_ids=input_ids, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(NewLlamaModel, "forward", spy)
    return rows


# ---- what reaches the model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_queries_and_documents_are_read_with_their_own_prompts(settings, read, tmp_path, llara_folder, cache):
    data = tmp_path / "long.jsonl"
    long = " ".join(WORDS * 12)
    entries = [{"query": f"{i} <s1> {long}", "pos": [f"pos {i} {long}"], "neg": [f"neg {i}"]} for i in range(4)]
    data.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    train_retriever(settings(data=[str(data)], batch_size=4, steps=1, max_query_length=110, cache=cache))
    tokenizer = AutoTokenizer.from_pretrained(llara_folder)
    template = LlaraTemplate.from_tokenizer(tokenizer)

    def ids(text, length, **prompt):
        return tuple(template.encode(tokenizer, text, max_length=length, **prompt))

    wanted = {ids(each["query"].replace("<s1>", "< s1>"), 110, summarize=False) for each in entries}
    wanted |= {ids(text, LENGTH, predict=False) for each in entries for text in (*each["pos"], *each["neg"])}
    assert {len(row) for row in wanted} >= {110, LENGTH}  # texts are cut, prompts are not
    assert set(read) == wanted
    assert len(read) == 12 * (2 if cache else 1)


@pytest.mark.parametrize(
    ("prompts", "default"),
    [({"query": "find: ", "document": "text: "}, None), ({"passage": "text: "}, None), ({"other": "any: "}, "other")],
)
def test_prompts_of_a_model_are_those_that_encoding_uses(settings, llara_folder, monkeypatch, prompts, default):
    modules = list(load_embedder(llara_folder, device="cpu"))
    model = SentenceTransformer(modules=modules, prompts=prompts, default_prompt_name=default)
    used = []
    preprocess = model.preprocess

    def spy(inputs, prompt=None, **kwargs):
        used.append((kwargs["task"], prompt or None))
        return preprocess(inputs, **kwargs)

    monkeypatch.setattr(model, "preprocess", spy)
    model.encode_query(["river"])
    model.encode_document(["river"])
    arguments = _arguments(settings())
    _set_columns(arguments, model, 2)
    told = [
        (arguments.router_mapping[name], arguments.prompts.get(name)) for name in ("anchor", "positive", "negative_1")
    ]
    assert told == [*used, used[1]]


# ---- what it learns, and what it leaves ------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_training_learns_and_leaves_a_stock_folder(settings, tmp_path, llara_folder, pairs, lora):
    held_out = write_pairs(tmp_path / "held_out.jsonl", 24, seed=1)
    changes = {"lora": lora, "lora_rank": 8, "lora_dropout": 0.0}
    result = train_retriever(
        settings(steps=24, save_every=12, batch_size=16, temperature=0.05, eval_data=[str(held_out)], **changes)
    )
    output = Path(result["output"])
    history, evaluated = losses(output), losses(output, "eval_loss")
    assert sum(history[-5:]) < 0.8 * sum(history[:5])
    assert result["losses"] == {"loss": history[-1], "eval_loss": evaluated[-1]}

    modules = json.loads((output / "modules.json").read_text())
    assert all(module["type"].startswith("sentence_transformers.") for module in modules)
    stock = SentenceTransformer(str(output), device="cpu")
    assert mean_rank(stock, pairs) < 0.6 * mean_rank(load_embedder(llara_folder, device="cpu"), pairs)
    texts = ["river stone 3", "a garden in winter"]
    for encode, query in ((stock.encode_query, True), (stock.encode_document, False)):
        wanted = [slot_mean(output, text, query=query) for text in texts]
        np.testing.assert_allclose(encode(texts), wanted, atol=1e-5)
    assert stock.max_seq_length == LENGTH

    before, after = weights(llara_folder), weights(output)
    slots = load_file(output / "1_WordWeights" / "model.safetensors")["emb_layer.weight"].flatten()
    assert sorted(slots.tolist()) == [0.0] * (len(slots) - 16) + [1.0] * 16  # these are no weights to train
    unchanged = [key for key in after if torch.equal(after[key], before[f"model.{key}"])]
    assert bool(unchanged) is lora  # norms, with LoRA
    known = len(after["embed_tokens.weight"]) - 16
    rows = [
        torch.equal(*pair)
        for pair in zip(after["embed_tokens.weight"], before["model.embed_tokens.weight"], strict=True)
    ]
    if lora:
        assert rows == [True] * known + [False] * 16
    assert not list(output.glob("*.bin")) and not (output / "start").exists()

    library = Library(tmp_path / "library", model=output)
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "one.txt").write_text("The river runs south.")
    library.add(documents)
    (found,) = library.search("where does the river run", top=1)
    expected = slot_mean(output, "where does the river run", query=True) @ slot_mean(
        output, "The river runs south.", query=False
    )
    assert found.cosine == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no cache"])
def test_leaving_out_padding_changes_no_loss(settings, tmp_path, cache):
    runs = {"flat": None, "padded": "eager"}
    for name, kernel in runs.items():
        train_retriever(settings(output=str(tmp_path / name), cache=cache, attn_implementation=kernel, steps=6))
    assert losses(tmp_path / "flat") == pytest.approx(losses(tmp_path / "padded"), abs=1e-3)


def test_a_plain_llama_gets_slots_and_a_trained_folder_trains_on(settings, model_folder, tmp_path):
    first = train_retriever(settings(model=str(model_folder), slots=4, matryoshka=[8, 16], steps=2))
    assert LlaraTemplate.from_config(AutoModel.from_pretrained(first["output"]).config).slots == 4
    assert set(Path(first["output"]).iterdir()).isdisjoint({tmp_path / "run" / "start"})
    again = train_retriever(settings(model=first["output"], output=str(tmp_path / "again"), lora=True, steps=2))
    before, after = (SentenceTransformer(each["output"], device="cpu") for each in (first, again))
    assert before.tokenizer.chat_template == after.tokenizer.chat_template
    assert not np.allclose(before.encode_query(["river"]), after.encode_query(["river"]), atol=1e-4)


def test_scores_are_learned_where_every_query_has_them(settings, tmp_path, caplog):
    scored = str(write_pairs(tmp_path / "scored.jsonl", 16, scored=True))
    assert train_retriever(settings(data=[scored], steps=1))["teacher"] == "kl"
    assert (
        train_retriever(settings(data=[scored], output=str(tmp_path / "off"), distill="off", steps=1))["teacher"]
        == "off"
    )
    assert losses(tmp_path / "run")[0] > losses(tmp_path / "off")[0]
    some = str(write_pairs(tmp_path / "some.jsonl", 16))
    caplog.set_level("WARNING")
    assert train_retriever(settings(data=[scored, some], output=str(tmp_path / "mixed"), steps=1))["teacher"] == "off"
    assert "16 queries have none" in caplog.text


def test_negatives_are_mined_once_and_are_no_answers(settings, tmp_path, monkeypatch):
    data = tmp_path / "pairs.jsonl"
    groups = [("river", ["a river", "the river"]), ("stone", ["a stone"]), ("bridge", ["a bridge", "the bridge"])]
    data.write_text("".join(json.dumps({"query": q, "pos": p}) + "\n" for q, p in groups * 2))
    made = settings(data=[str(data)], batch_size=2, mine=2, mine_margin=-1.0, group_size=3)
    result = train_retriever(made)
    mined = [json.loads(line) for line in (tmp_path / "run" / "mined.jsonl").read_text().splitlines()]
    assert len(mined) == 3 and result["mined"] == 12
    embedder = load_embedder(made.model, device="cpu", max_length=LENGTH)
    texts = [text for _, answers in groups for text in answers]
    for entry in mined:
        assert entry["pos"] == sorted(dict(groups)[entry["query"]])
        others = [text for text in texts if text not in entry["pos"]]
        scores = embedder.encode_document(others) @ embedder.encode_query([entry["query"]])[0]
        assert entry["neg"] == [others[i] for i in np.argsort(-scores)[:2]]
    monkeypatch.setattr("llamory.training.pairs._mine", None)  # a run that goes on mines no more
    made.resume = True
    assert train_retriever(made)["mined"] == 12


def test_bfloat16_and_checkpointing_compute_alike_in_both_passes_of_the_cache(settings, monkeypatch):
    kinds = set()
    forward = LlamaModel.forward

    @functools.wraps(forward)
    def spy(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        kinds.add(self.layers[0].mlp.up_proj(output.last_hidden_state).dtype)
        return output

    monkeypatch.setattr(LlamaModel, "forward", spy)
    train_retriever(settings(bf16=True, gradient_checkpointing=True, steps=1, mine=1, mine_margin=-1.0))
    assert kinds == {torch.bfloat16}


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_settings_and_data_that_cannot_be_are_refused(settings, tmp_path):
    lone = tmp_path / "lone.jsonl"
    lone.write_text('{"query": "a", "pos": ["b"]}\n')
    scored = write_pairs(tmp_path / "scored.jsonl", 4, scored=True)
    with scored.open("a") as file:
        file.write('{"query": "a", "pos": ["b"], "neg": ["c"]}\n')
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    for changes, sentence in [
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"group_size": 0}, "group_size must be at least 1"),
        ({"mine": 3, "mine_skip": 5, "mine_depth": 6}, "mine_depth must be at least mine_skip . mine, 8, not 6"),
        ({"fsdp": True}, "fsdp"),
        ({"scheduler": "sideways"}, "sideways"),
        ({"matryoshka": [64]}, "from 1 to the model's 32, not 64"),
        ({"max_query_length": 20}, "leaves no room for a query"),
        ({"lora": True, "lora_targets": ["no_such_layer"]}, "no_such_layer"),
        ({"data": [str(lone)]}, "No batch can be made of 1 queries"),
        ({"data": [str(scored)], "distill": "margin_mse"}, r"scored\.jsonl:5: distill needs"),
        ({"data": [str(scored)], "distill": "kl", "mine": 1}, "Mined negatives have no teacher scores"),
        ({"distill": "kl", "group_size": 1}, "group_size to at least 2"),
        ({"data": [str(tmp_path / "nowhere")]}, "nowhere"),
        ({"model": str(tmp_path / "nowhere")}, "nowhere"),
        ({"output": str(tmp_path / "used")}, "isn't empty"),
    ]:
        with pytest.raises(LlamoryError, match=sentence):
            train_retriever(settings(**({"output": str(tmp_path / str(len(str(changes))))} | changes)))


def test_a_loss_that_is_not_finite_stops_the_run(settings, llara_folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(llara_folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(llara_folder).save_pretrained(tmp_path / "broken")
    with pytest.raises(LlamoryError, match="loss of step 1 isn't finite"):
        train_retriever(settings(model=str(tmp_path / "broken")))


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["paper/retriever", "examples/retriever_cpu", "retriever/retriever"])
def test_settings_of_recipes_are_valid(recipe, tmp_path):
    file = Path(__file__).parents[2] / "recipes" / f"{recipe}.yaml"
    read = read_settings(RetrieverSettings, file, {"data": ["x"], "output": str(tmp_path), "cpu": True})
    read.bf16 = False  # not every machine has it
    _arguments(read)
    if recipe == "paper/retriever":  # the command in the README of research/LLARA, and its finetune/arguments.py
        published = (3e-4, 1.0, 16, 0.01, 64, 160, 0.1, True, True, 64, 16.0, 0.1)
        names = "learning_rate epochs group_size temperature max_query_length max_passage_length warmup share_negatives"
        names += " lora lora_rank lora_alpha lora_dropout"
        assert tuple(getattr(read, name) for name in names.split()) == published

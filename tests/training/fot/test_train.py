"""FoT training: what it learns, saves, resumes, and shares among processes."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from keyword_models import keyword_model
from llamory.cli.settings import read_settings
from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.loading import load_long_model
from llamory.training import long_models
from llamory.training.corpus import DocumentStream, Source
from llamory.training.fot.batches import FotBatches
from llamory.training.fot.contexts import ContextSampler, ContextSamplingConfig
from llamory.training.fot.train import train_fot
from llamory.training.settings import FotSettings
from training_runs import TORCHRUN, finish, kill_behind, losses, start, weights

RECIPES = Path(__file__).parents[3] / "recipes"
JOIN = RECIPES / "join_adapters.py"
ROW, BATCH, PACKING, SEED = 16, 8, 2, 42


@pytest.fixture
def settings(model_folder, documents, tmp_path):
    """Settings of a run that takes a second: rows of 16 tokens, 4 documents of 2 rows at a time."""

    def make(**changes):
        values = {
            "model": str(model_folder),
            "data": [str(documents)],
            "output": str(tmp_path / "run"),
            "mem_layers": [1],
            "row_length": ROW,
            "batch_size": BATCH,
            "dataset_packing": PACKING,
            "min_length": 1,
            "crossbatch_schedule": ["0+0", "1+1"],
            "shuffle_buffer": 4,
            "steps": 4,
            "learning_rate": 3e-3,
            "log_every": 1,
            "save_every": 2,
            "seed": SEED,
            "cpu": True,
            "quiet": True,
        }
        return FotSettings(**(values | changes))

    return make


def load(folder):
    return LongLlamaForCausalLM.from_pretrained(
        folder, mem_layers=[1], max_position_embeddings=ROW, dtype=torch.float32
    )


def batches(model_folder, documents, **changes):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    values = {"seed": SEED, "min_length": 1, "shuffle_buffer": 4}
    stream = DocumentStream([Source([str(documents)])], tokenizer, **(values | changes))
    return FotBatches(
        stream,
        row_length=ROW,
        batch_size=BATCH,
        dataset_packing=PACKING,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )


@torch.no_grad()
def token_losses(model, batch, contexts, **more):
    """(batch, length) each token's loss, by way of all logits."""
    hidden = model(batch["input_ids"], contexts=contexts, **more).hidden_states[0]
    logits = hidden @ model.lm_head.weight.T
    return cross_entropy(logits.flatten(0, 1), batch["shift_labels"].flatten(), reduction="none").view(BATCH, ROW)


@pytest.mark.slow
def test_training_learns_and_saves_a_long_llama(settings):
    result = train_fot(settings(steps=30, save_every=30))
    output = Path(result["output"])
    history = losses(output)
    assert sum(history[-5:]) < sum(history[:5]) - 1
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "longllama"
    assert (config["mem_layers"], config["max_position_embeddings"]) == ([1], ROW)
    assert isinstance(AutoModelForCausalLM.from_pretrained(output), LongLlamaForCausalLM)
    assert len(AutoTokenizer.from_pretrained(output)) == config["vocab_size"]


def test_the_loss_is_the_mean_over_all_tokens_of_all_passes(settings, model_folder, documents):
    train_fot(settings(accumulation=2))
    model = load(model_folder).eval()
    context_sampler = ContextSampler(ContextSamplingConfig(crossbatch_schedule=[(0, 0), (1, 1)]), BATCH, PACKING, SEED)
    wanted = []
    for stream in range(2):
        batch = next(batches(model_folder, documents, shard=stream, shards=2))
        contexts = context_sampler.select(0, stream, batch["input_ids"], batch["documents"])
        assert any(contexts) and not all(contexts)
        wanted.append(token_losses(model, batch, contexts))
    assert losses(settings().output)[0] == pytest.approx(float(torch.cat(wanted).mean()), rel=1e-5)


def test_a_range_and_a_mixture_of_sources_give_the_first_loss_that_they_should(settings, model_folder, documents):
    first, second = str(documents / "00.txt"), str(documents / "01.txt")
    train_fot(
        settings(
            crossbatch_schedule=[],
            cross_batch_range=3,
            crossbatch_stepping=True,
            data=[first, second],
            proportions=[0.75, 0.25],
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    sources = [Source([first], 0.75), Source([second], 0.25)]
    stream = DocumentStream(sources, tokenizer, seed=SEED, min_length=1, shuffle_buffer=4)
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    batch = next(FotBatches(stream, row_length=ROW, batch_size=BATCH, dataset_packing=PACKING, **tokens))
    context_sampler = ContextSampler(
        ContextSamplingConfig(cross_batch_range=3, crossbatch_stepping=True), BATCH, PACKING, SEED
    )
    contexts = context_sampler.select(0, 0, batch["input_ids"], batch["documents"])
    wanted = token_losses(load(model_folder).eval(), batch, contexts).mean()
    assert losses(settings().output)[0] == pytest.approx(float(wanted), rel=1e-5)


def test_negatives_that_count_as_fifty_give_the_first_loss_that_they_should(settings, model_folder, documents):
    train_fot(settings(crossbatch_schedule=["1+4"], negative_weight=[50, 50]))
    model, batch = load(model_folder).eval(), next(batches(model_folder, documents))
    context_sampler = ContextSampler(ContextSamplingConfig(crossbatch_schedule=[(1, 4)]), BATCH, PACKING, SEED)
    contexts = context_sampler.select(0, 0, batch["input_ids"], batch["documents"])
    weights = [[1 if other // PACKING == row // PACKING else 50 for other in seen] for row, seen in enumerate(contexts)]
    wanted = token_losses(model, batch, contexts, context_weights=weights).mean()
    assert losses(settings().output)[0] == pytest.approx(float(wanted), rel=1e-5)
    assert abs(float(wanted - token_losses(model, batch, contexts).mean())) > 1e-4


KILLED = {
    # The number of contexts grows after step 10 and only if what the steps before said is in the checkpoint.
    "full": {"schedule": "curriculum", "sizes": [1, 3], "advance_at_accuracy": 1e-6},
    "LoRA": {"lora": True, "lora_dropout": 0.1, "schedule": "sampled", "sizes": [0, 2]},
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", KILLED.values(), ids=KILLED)
def test_a_killed_run_resumes_to_the_same_bits(settings, tmp_path, documents, changes):
    changes = changes | {"steps": 14, "eval_data": [str(documents)], "eval_every": 3, "eval_batches": 1}
    train_fot(settings(**changes, output=str(tmp_path / "whole")))
    broken = settings(**changes, output=str(tmp_path / "broken"))
    kill_behind("fot", broken, 4)
    broken.resume = True
    train_fot(broken)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    for key in ("loss", "eval_loss", "contexts"):
        assert losses(tmp_path / "whole", key) == losses(tmp_path / "broken", key)
    assert len(set(losses(tmp_path / "whole", "contexts"))) == 2
    curves = [json.loads((tmp_path / run / "curve.json").read_text()) for run in ("whole", "broken")]
    assert curves[0] == curves[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fsdp", "changes"),
    [(False, {}), (True, {}), (True, {"trainable": "memory_projections", "negative_weight": [1, 9]})],
    ids=["DDP", "FSDP", "FSDP-projections"],
)
def test_two_processes_lose_as_one_does_in_two_passes(settings, tmp_path, documents, fsdp, changes):
    evaluated = {"eval_data": [str(documents)], "eval_every": 2, "eval_batches": 3} | changes
    train_fot(settings(output=str(tmp_path / "one"), accumulation=2, **evaluated))
    shared = settings(output=str(tmp_path / "two"), fsdp=fsdp, **evaluated)
    finish(start("fot", shared, *TORCHRUN))
    for key in ("loss", "eval_loss", "eval_loss_without_memory"):
        assert losses(tmp_path / "one", key) == pytest.approx(losses(tmp_path / "two", key), rel=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=1e-3) for key in one)
    # The streams of both processes are in the checkpoint, so that one process can go on with them.
    resumed = settings(output=str(tmp_path / "two"), accumulation=2, resume=True, steps=5, **evaluated)
    assert train_fot(resumed)["steps"] == 5


def test_a_finished_run_can_be_resumed_to_the_same_end(settings):
    first = train_fot(settings())
    before = weights(first["output"])
    again = train_fot(settings(resume=True))
    assert again == first
    assert all(torch.equal(before[key], value) for key, value in weights(again["output"]).items())


def test_a_checkpoint_with_other_settings_is_refused(settings, tmp_path, model_folder):
    train_fot(settings())
    for changes, name in [
        ({"crossbatch_schedule": ["1:0"]}, r"crossbatch_schedule: \['0\+0', '1\+1'\], not \['1:0'\]"),
        ({"learning_rate": 1.0}, "learning_rate"),
        ({"accumulation": 2}, "streams"),
    ]:
        with pytest.raises(LlamoryError, match=f"trained with another {name}"):
            train_fot(settings(resume=True, **changes))
    other = tmp_path / "other.txt"
    other.write_text("Something else altogether. " * 20)
    with pytest.raises(LlamoryError, match="other files"):
        train_fot(settings(resume=True, data=[str(other)]))


def test_held_out_loss_is_that_of_rows_with_memory_and_of_the_same_rows_without(
    settings, tmp_path, model_folder, documents
):
    model = load(model_folder).eval()
    with torch.no_grad():  # so large that it matters what is in memory
        for projection in model.model.layers[1].self_attn.children():
            projection.weight *= 10
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    evaluated = {"eval_data": [str(documents)], "eval_every": 2, "eval_batches": 2}
    result = train_fot(settings(model=str(tmp_path / "model"), **evaluated))
    feed = batches(model_folder, documents, shuffle_buffer=0)
    seen = [[row - 1] if row % 2 else [] for row in range(BATCH)]
    held_out = [next(feed), next(feed)]
    wanted = [
        float(torch.cat([token_losses(model, batch, contexts)[1::2] for batch in held_out]).mean())
        for contexts in (seen, [[]] * BATCH)
    ]
    curve = json.loads((Path(result["output"]) / "curve.json").read_text())
    assert [point["step"] for point in curve["curve"]] == [0, 2, 4]
    assert curve["tokens"] == 2 * BATCH // 2 * ROW
    first = curve["curve"][0]
    assert [first["loss_with_memory"], first["loss_without_memory"]] == pytest.approx(wanted, rel=1e-5)
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-5)
    assert result["losses"]["eval_loss"] == curve["curve"][-1]["loss_with_memory"]


def changed(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


def test_only_the_attention_of_memory_layers_may_be_trained(settings, model_folder):
    result = train_fot(settings(trainable="memory_layers", gradient_checkpointing=True))
    names = {f"model.layers.1.self_attn.{part}_proj.weight" for part in "qkvo"}
    assert changed(weights(model_folder), weights(result["output"])) == names


@pytest.mark.parametrize("lora", [{}, {"lora": True, "lora_rank": 2, "lora_dropout": 0.0}], ids=["all", "lora"])
def test_what_is_read_without_memory_stays_where_only_projections_for_it_are_trained(settings, model_folder, lora):
    result = train_fot(settings(**lora, trainable="memory_projections", gradient_checkpointing=True))
    before, after = weights(model_folder), weights(result["output"])
    assert {key for key in before if not torch.equal(before[key], after.pop(key))} == set()
    assert after.keys() == {f"model.layers.1.self_attn.mem_{part}_proj.weight" for part in "qkvo"}
    same = {key for key in after if torch.equal(after[key], before[key.replace("mem_", "")])}
    assert same == set()
    more = train_fot(settings(model=result["output"], output=f"{result['output']}_2", trainable="memory_layers"))
    assert weights(more["output"]).keys() == weights(result["output"]).keys()
    with pytest.raises(LlamoryError, match="has projections for the memory of layers 1; leave mem_layers out"):
        train_fot(settings(model=result["output"], output=f"{result['output']}_3", mem_layers=[0]))
    with pytest.raises(LlamoryError, match="has projections for the memory of layers 1"):
        load_long_model(result["output"], mem_layers=[0])


def test_a_joined_adapter_may_change_the_projections_for_memory_instead(settings, model_folder, tmp_path, monkeypatch):
    lora = {"lora": True, "lora_rank": 2, "lora_dropout": 0.0, "lora_targets": ["q_proj", "o_proj"]}
    run = train_fot(settings(**lora, trainable="memory_layers"))["output"]
    read = {}
    for name, flags in (("same", []), ("apart", ["--for-memory"])):
        monkeypatch.setattr(sys, "argv", [str(JOIN), str(tmp_path / name), run, "--base", str(model_folder), *flags])
        runpy.run_path(str(JOIN), run_name="__main__")
        read[name] = load_long_model(tmp_path / name).model.layers[1].self_attn
    before = weights(model_folder)
    for part in "qkvo":
        own, same = (getattr(each, f"{part}_proj").weight for each in (read["apart"], read["same"]))
        assert torch.equal(own, before[f"model.layers.1.self_attn.{part}_proj.weight"])
        assert torch.equal(getattr(read["apart"], f"mem_{part}_proj").weight, same)
        assert torch.equal(own, same) == (part in "kv")


def test_adapters_are_merged_and_kept_beside(settings, model_folder):
    lora = {"lora": True, "lora_rank": 2, "lora_targets": ["q_proj", "up_proj"]}
    result = train_fot(settings(**lora, trainable="memory_layers", gradient_checkpointing=True))
    names = {"model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert changed(weights(model_folder), weights(result["output"])) == names
    assert (Path(result["output"]) / "adapter" / "adapter_model.safetensors").exists()


def test_bfloat16_with_checkpointing_loses_nearly_as_float32(settings, tmp_path):
    train_fot(settings(output=str(tmp_path / "exact")))
    train_fot(settings(output=str(tmp_path / "short"), bf16=True, gradient_checkpointing=True))
    assert losses(tmp_path / "exact") == pytest.approx(losses(tmp_path / "short"), rel=0.02)


def test_similar_negatives_are_those_that_share_most_words(settings, model_folder, tmp_path, monkeypatch):
    words = "river stone bridge winter garden letter window market silver morning harbour candle forest summer".split()
    keyword_model(words).save(str(tmp_path / "finder"))
    seen, real = [], ContextSampler.select

    def select(self, step, stream, input_ids, documents):
        contexts = real(self, step, stream, input_ids, documents)
        seen.append((input_ids, documents, self.order(step, stream), contexts))
        return contexts

    monkeypatch.setattr(ContextSampler, "select", select)
    train_fot(settings(negatives="similar", retriever=str(tmp_path / "finder"), crossbatch_schedule=["0+0", "0+1"]))
    tokenizer, checked = AutoTokenizer.from_pretrained(model_folder), 0
    for input_ids, documents, order, contexts in seen:
        texts = [text.lower() for text in tokenizer.batch_decode(input_ids, skip_special_tokens=True)]
        counts = torch.tensor([[sum(w == word for w in re.findall(r"\w+", text)) for word in words] for text in texts])
        likeness = torch.nn.functional.normalize(counts.double())
        likeness = likeness @ likeness.T
        for row in range(BATCH // 2, BATCH):  # the half of the batch that has a negative
            others = [o for o in range(BATCH) if documents[o] != documents[row] and order[o] < order[row]]
            others = [other for other in others if other // PACKING != row // PACKING]
            assert len(contexts[row]) == min(1, len(others))
            if others:
                best = max(float(likeness[row, other]) for other in others)
                assert float(likeness[row, contexts[row][0]]) == pytest.approx(best, rel=1e-5)
                checked += len({round(float(likeness[row, other]), 6) for other in others}) > 1
    assert len(seen) == 4 and checked > 4  # rows that had a choice


@pytest.mark.parametrize("count", [2, 4, 26, 32])
def test_default_memory_layers_are_those_of_the_published_models(count):
    assert long_models._default_mem_layers(count) == {2: [1], 4: [1, 2, 3], 26: [6, 12, 18], 32: [8, 16, 24]}[count]


@pytest.mark.parametrize(
    "recipe",
    sorted([*RECIPES.glob("*/fot_*.yaml"), *(RECIPES / "reader" / "stages" / f"{n}.yaml" for n in ("08", "10"))]),
    ids=lambda path: path.stem,
)
def test_settings_of_recipes_are_valid(recipe, tmp_path):
    given = {"data": ["nowhere"], "output": str(tmp_path / "run"), "model": "/no/model", "cpu": True, "fsdp": False}
    with pytest.raises(LlamoryError, match="There is no model"):
        train_fot(read_settings(FotSettings, recipe, given))


def test_settings_that_cannot_be_are_refused(settings, tmp_path, documents):
    for changes, sentence in [
        ({"steps": None}, "set steps"),
        ({"eval_every": 0}, "eval_every must be at least 1"),
        ({"row_length": 1}, "row_length must be at least 2"),
        ({"row_length": 4096}, "longer than the context"),
        ({"min_length": None, "row_length": 256}, "at most .* tokens, fewer than min_length 256"),
        ({"dataset_packing": 3}, "can't be divided"),
        ({"mem_layers": [2]}, "names layer 2, but the model has 2 layers"),
        ({"crossbatch_schedule": ["0:7"]}, "can't see 7 rows"),
        ({"crossbatch_schedule": [], "cross_batch_range": 8}, "can't see 8 others"),
        ({"cross_batch_range": 2}, "either a crossbatch_schedule"),
        ({"crossbatch_schedule": ["some"]}, r"POSITIVES\+NEGATIVES"),
        ({"crossbatch_schedule": []}, "earlier chunks"),
        ({"negative_weight": [2]}, "must be two numbers above 0"),
        ({"data": [str(documents)] * 2, "proportions": [0.5, 0.6]}, "add up to 1"),
        ({"proportions": [0.5, 0.5]}, "1 sources of documents but 2 proportions"),
        ({"schedule": "curriculum"}, "needs sizes"),
        ({"negatives": "similar"}, "give a Sentence Transformers model"),
        ({"negatives": "similar", "retriever": str(tmp_path / "nowhere")}, "nowhere"),
        ({"eval_data": [str(documents)], "dataset_packing": 1}, "dataset_packing to 2"),
        ({"schedule": "curriculum", "sizes": [1], "fsdp": True}, "use DDP"),
        ({"scheduler": "sideways"}, "sideways"),
        ({"lora": True, "lora_targets": ["no_such_layer"]}, "no_such_layer"),
        ({"attn_implementation": "sideways"}, "sideways"),
        ({"data": [str(tmp_path / "nowhere")]}, "nowhere"),
    ]:
        with pytest.raises(LlamoryError, match=sentence):
            train_fot(settings(**changes))

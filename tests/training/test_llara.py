"""LLARA pretraining: what it learns, saves, resumes, and shares among processes."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, LlamaForCausalLM

from llamory.errors import LlamoryError
from llamory.llara import LlaraTemplate, PreLlamaModel
from llamory.training.llara import train_llara
from training_runs import TORCHRUN, finish, kill_behind, losses, start, weights


def test_training_learns_and_what_it_saves_loads_everywhere(settings, tmp_path):
    result = train_llara(settings(steps=30, save_every=30, eval_fraction=0.1))
    output = Path(result["output"])
    for key in ("loss", "ar_loss", "bow_summarize_loss", "bow_predict_loss"):
        history = losses(output, key)
        assert sum(history[-5:]) < sum(history[:5])
    assert losses(output, "eval_loss")
    tokenizer, model = AutoTokenizer.from_pretrained(output), PreLlamaModel.from_pretrained(output)
    assert model.template == LlaraTemplate.from_tokenizer(tokenizer, query_prompt="summary")
    ids = torch.tensor([model.template.encode(tokenizer, "River stone.", predict=False)])
    wanted = model.model(ids).last_hidden_state
    torch.testing.assert_close(AutoModel.from_pretrained(output)(ids).last_hidden_state, wanted)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(output).model(ids).last_hidden_state, wanted)
    assert not list(output.glob("*.bin"))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_a_killed_run_resumes_to_the_same_bits(settings, tmp_path, lora):
    changes = {"steps": 12, "save_every": 2, "lora_dropout": 0.1, "lora": lora}
    train_llara(settings(**changes, output=str(tmp_path / "whole")))
    broken = settings(**changes, output=str(tmp_path / "broken"))
    kill_behind("llara", broken, 4)
    broken.resume = True
    train_llara(broken)
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "broken")


def test_accumulated_passes_are_one_step(settings, tmp_path):
    train_llara(settings(output=str(tmp_path / "one")))
    train_llara(settings(output=str(tmp_path / "two"), batch_size=2, accumulation=4))
    for key in ("loss", "ar_loss", "bow_summarize_loss", "bow_predict_loss"):
        assert losses(tmp_path / "one", key) == pytest.approx(losses(tmp_path / "two", key), abs=1e-4)


@pytest.mark.parametrize("fsdp", [False, True], ids=["DDP", "FSDP"])
def test_two_processes_lose_as_one_does(settings, tmp_path, fsdp):
    train_llara(settings(output=str(tmp_path / "one")))
    shared = settings(output=str(tmp_path / "two"), batch_size=4, fsdp=fsdp)
    finish(start("llara", shared, *TORCHRUN))
    for key in ("loss", "ar_loss", "bow_summarize_loss", "bow_predict_loss"):
        assert losses(tmp_path / "one", key) == pytest.approx(losses(tmp_path / "two", key), abs=1e-4)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=1e-3) for key in one)


def test_lora_trains_adapters_and_slots_and_nothing_else(settings, tmp_path, model_folder):
    result = train_llara(settings(lora=True, lora_rank=2, lora_targets=["q_proj"], gradient_checkpointing=True))
    before, after = weights(model_folder), weights(result["output"])
    known = before["model.embed_tokens.weight"].shape[0]
    for key, value in after.items():
        if key.endswith("q_proj.weight"):
            assert not torch.equal(value, before[key])
        elif key == "model.embed_tokens.weight":
            assert torch.equal(value[:known], before[key])
        else:
            assert torch.equal(value, before[key])
    model = PreLlamaModel.from_pretrained(result["output"])
    tokenizer = AutoTokenizer.from_pretrained(result["output"])
    fresh = PreLlamaModel.from_pretrained(model_folder)
    model.template.prepare_model(fresh)
    slots = list(model.template.summarize_slot_ids + model.template.predict_slot_ids)
    moved = (model.get_input_embeddings().weight - fresh.get_input_embeddings().weight)[slots].abs().amax(1)
    assert (moved > 0).all()
    assert len(tokenizer) == known + 16
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()


@pytest.mark.parametrize("learned", [["ar"], ["summarize"], ["ar", "predict"], ["summarize", "predict"]])
def test_only_the_losses_that_are_named_are_learned(settings, tmp_path, learned):
    whole = train_llara(settings(output=str(tmp_path / "whole"), steps=1))["losses"]
    part = train_llara(settings(output=str(tmp_path / "part"), steps=1, losses=learned))["losses"]
    names = {"ar": "ar_loss", "summarize": "bow_summarize_loss", "predict": "bow_predict_loss"}
    kept = {names[name]: whole[names[name]] for name in learned}
    bags = [value for key, value in kept.items() if key != "ar_loss"]
    expected = kept.get("ar_loss", 0) + (sum(bags) / len(bags) if bags else 0)
    assert part == pytest.approx(kept | {"loss": expected}, abs=1e-4)


def test_learned_weights_are_trained_and_the_rest_still_loads_in_stock_llama(settings):
    result = train_llara(settings(bow_weighting="learned"))
    trained = weights(result["output"])
    assert not torch.allclose(trained["bow_log_variance"], torch.tensor(10.0).log(), atol=1e-6)
    assert PreLlamaModel.from_pretrained(result["output"]).template.bow_weighting == "learned"
    LlamaForCausalLM.from_pretrained(result["output"])


def test_a_finished_run_can_be_resumed_to_the_same_end(settings):
    first = train_llara(settings(export=True))
    before = weights(first["output"])
    again = train_llara(settings(export=True, resume=True))
    after = weights(again["output"])
    assert again["steps"] == first["steps"]
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (Path(again["embedder"]) / "modules.json").exists()


def test_streamed_data_trains_alike_in_order(settings, tmp_path):
    result = train_llara(settings(streaming=True, steps=4))
    assert result["steps"] == 4


def test_a_loss_that_is_not_finite_stops_with_step_and_examples(settings, tmp_path, model_folder):
    model = LlamaForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "broken")
    with pytest.raises(LlamoryError, match=r"step 1 isn't finite .* in examples \d+, .*\.txt:1"):
        train_llara(settings(model=str(tmp_path / "broken")))


def test_settings_that_cannot_be_are_refused(settings, tmp_path):
    for changes, sentence in [
        ({"steps": 0}, "steps must be at least 1"),
        ({"learning_rate": 0}, "learning_rate must be greater than 0"),
        ({"eval_fraction": 1.0}, "eval_fraction"),
        ({"streaming": True, "steps": None}, "set steps"),
        ({"losses": []}, "losses must name at least one of ar, summarize, predict"),
        ({"losses": ["ar", "sideways"]}, "'sideways'"),
        ({"max_length": 20}, "leaves no room"),
        ({"scheduler": "sideways"}, "sideways"),
        ({"report_to": ["nobody"]}, "nobody"),
        ({"lora": True, "lora_targets": ["no_such_layer"]}, "no_such_layer"),
        ({"attn_implementation": "sideways"}, "sideways"),
        ({"data": [str(tmp_path / "nowhere")]}, "nowhere"),
    ]:
        with pytest.raises(LlamoryError, match=sentence):
            train_llara(settings(**changes))

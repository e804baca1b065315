"""Adapters of runs that went on from one another, joined into one small folder, embed as the last run does."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llamory.embedding.pipeline import export_sentence_transformer, load_embedder, query_prompt
from llamory.errors import LlamoryError
from llamory.models import base as backbone
from llamory.training.llara import train_llara
from llamory.training.retriever import train_retriever

JOIN = Path(__file__).parents[2] / "recipes" / "join_adapters.py"
TEXTS = ["River stone and water.", "A boat goes down the river.", "x = 1"]


@pytest.fixture
def adapter(settings, retriever_settings, model_folder, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """The joined folder of a LLARA run and a retriever's run behind it, and that run's folder."""
    lora = {"lora": True, "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0}
    first = train_llara(settings(output=str(tmp_path / "first"), query_prompt="summary", whiten=24, **lora))
    more = {"model": first["output"], "output": str(tmp_path / "second"), "query_prompt": None}
    second = train_retriever(retriever_settings(**more, **(lora | {"lora_rank": 2, "lora_targets": ["q_proj"]})))
    folder = tmp_path / "adapter"
    words = [str(JOIN), str(folder), first["output"], second["output"], "--base", str(model_folder)]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(JOIN), run_name="__main__")
    return folder, Path(second["output"])


def test_a_joined_adapter_embeds_as_the_last_run_does(adapter, tmp_path, model_folder):
    folder, run = adapter
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert not any(name.endswith(("embed_tokens.weight", "lm_head.weight")) for name in tensors)
    found, wanted = load_embedder(folder, device="cpu"), load_embedder(run, device="cpu")
    assert len(found) == len(wanted) == 6  # whitened
    assert query_prompt(found) == query_prompt(wanted) == "summary"
    plain = load_embedder(tmp_path / "first", device="cpu")
    for encode in ("encode_query", "encode_document"):
        one, two, before = (getattr(model, encode)(TEXTS, convert_to_tensor=True) for model in (found, wanted, plain))
        assert (one - two).abs().max() < 0.02 < (before - two).abs().max()  # bfloat16 has three digits
    assert backbone.load_tokenizer(folder)("<s1>")["input_ids"] == found.tokenizer("<s1>")["input_ids"]
    exported = load_embedder(export_sentence_transformer(folder, tmp_path / "exported"), device="cpu")
    torch.testing.assert_close(
        exported.encode_query(TEXTS, convert_to_tensor=True), found.encode_query(TEXTS, convert_to_tensor=True)
    )


def test_a_checkpoint_gives_what_its_run_ended_with(settings, model_folder, tmp_path, monkeypatch):
    run = Path(train_llara(settings(lora=True, lora_rank=4, steps=6, save_every=3, query_prompt="summary"))["output"])
    for name, source in (("ended", run), ("checkpoint", run / "checkpoint-6")):
        words = [str(JOIN), str(tmp_path / name), str(source), "--base", str(model_folder), "--query-prompt", "summary"]
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(JOIN), run_name="__main__")
    files = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("ended", "checkpoint")}
    assert files["ended"] == files["checkpoint"]
    one, two = (load_embedder(tmp_path / name, device="cpu").encode_query(TEXTS) for name in files)
    assert (one == two).all()


def test_factors_say_how_much_of_each_run_counts(adapter, tmp_path, monkeypatch, capsys):
    folder, run = adapter
    runs = [str(tmp_path / "first"), str(run)]
    words = [
        str(JOIN),
        str(tmp_path / "less"),
        *runs,
        "--base",
        json_of(folder, "adapter_config")["base_model_name_or_path"],
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--factor", "0.5", "--factor", "0"])
    runpy.run_path(str(JOIN), run_name="__main__")
    whole, less = (load_file(each / "adapter_model.safetensors") for each in (folder, tmp_path / "less"))
    layer = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    change, part = ((each[layer.format("B")] @ each[layer.format("A")]).float() for each in (whole, less))
    first = (whole[layer.format("B")][:, :4] @ whole[layer.format("A")][:4]).float()
    assert change.abs().max() > first.abs().max() * 0.1
    torch.testing.assert_close(part, first / 2, atol=0, rtol=0.01)
    monkeypatch.setattr(sys, "argv", [*words, "--factor", "0.5"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(JOIN), run_name="__main__")
    assert "1 factors for 2 runs" in capsys.readouterr().err


def test_ranks_above_a_projections_sides_are_put_together(
    settings, retriever_settings, model_folder, tmp_path, monkeypatch
):
    lora = {"lora": True, "lora_alpha": 40, "lora_dropout": 0.0, "lora_targets": ["q_proj", "k_proj"]}
    first = train_llara(settings(output=str(tmp_path / "first"), lora_rank=4, query_prompt="summary", **lora))["output"]
    more = {"model": first, "output": str(tmp_path / "second"), "query_prompt": None, "lora_rank": 14}
    second = train_retriever(retriever_settings(**more, **lora))["output"]
    folder = tmp_path / "adapter"
    monkeypatch.setattr(sys, "argv", [str(JOIN), str(folder), first, second, "--base", str(model_folder)])
    runpy.run_path(str(JOIN), run_name="__main__")
    config = json_of(folder, "adapter_config")
    assert config["r"] == 18 and config["rank_pattern"] == config["alpha_pattern"] == {"k_proj": 16}  # of 32 x 16
    joined = load_file(folder / "adapter_model.safetensors")
    runs = [(Path(run) / "adapter", 40 / rank) for run, rank in ((first, 4), (second, 14))]
    for layer in ("layers.0.self_attn.q_proj", "layers.1.self_attn.k_proj"):
        wanted = torch.zeros(())
        for run, scale in runs:
            found = load_file(run / "adapter_model.safetensors")
            a, b = (next(found[name] for name in found if f"{layer}.lora_{side}" in name) for side in "AB")
            wanted = wanted + scale * b @ a
        a, b = (joined[f"base_model.model.model.{layer}.lora_{side}.weight"].float() for side in "AB")
        torch.testing.assert_close(b @ a, wanted, atol=0.01 * float(wanted.abs().max()), rtol=0)
    one, two = (load_embedder(model, device="cpu").encode_document(TEXTS) for model in (folder, second))
    assert abs(one - two).max() < 0.02


def json_of(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_training_goes_on_from_a_joined_adapter(adapter, settings, retriever_settings, tmp_path):
    folder, run = adapter
    trained = train_retriever(
        retriever_settings(model=str(folder), output=str(tmp_path / "more"), steps=1, learning_rate=1e-12)
    )
    one, two = (load_embedder(model, device="cpu").encode_document(TEXTS) for model in (trained["output"], run))
    assert abs(one - two).max() < 0.02
    again = train_llara(settings(model=str(folder), output=str(tmp_path / "again"), steps=1, learning_rate=1e-12))
    unwhitened = load_embedder(run, device="cpu")
    del unwhitened[-1], unwhitened[-1]  # it was fitted for another model than what LLARA leaves
    one, two = (m.encode_document(TEXTS) for m in (load_embedder(again["output"], device="cpu"), unwhitened))
    assert abs(one - two).max() < 0.02


def test_tokens_that_get_other_ids_are_refused(adapter):
    folder, _ = adapter
    tokens = json.loads((folder / "added_tokens.json").read_text())
    (folder / "added_tokens.json").write_text(json.dumps({name: number + 1 for name, number in tokens.items()}))
    with pytest.raises(LlamoryError, match="another id than the adapter was trained with"):
        backbone.load_tokenizer(folder)

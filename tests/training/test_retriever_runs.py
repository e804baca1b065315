"""A retriever's runs: killed and resumed."""

import shutil

import torch

from llamory.training.retriever import train_retriever
from training_runs import kill_behind, losses, weights


def same(one, other):
    """Whether two runs came to the same weights by the same losses."""
    first, second = weights(one), weights(other)
    return losses(one) == losses(other) and all(torch.equal(first[key], second[key]) for key in first)


def test_a_killed_run_resumes_to_the_same_bits(retriever_settings, model_folder, tmp_path):
    changes = {"model": str(model_folder), "steps": 18, "save_every": 3}
    train_retriever(retriever_settings(**changes, output=str(tmp_path / "whole")))
    broken = retriever_settings(**changes, output=str(tmp_path / "broken"))
    kill_behind("retriever", broken, 9)  # an epoch has eight steps
    broken.resume = True
    train_retriever(broken)
    assert same(tmp_path / "whole", tmp_path / "broken")


def test_adapters_go_on_from_a_checkpoint_to_the_same_bits(retriever_settings, tmp_path):
    changes = {"steps": 14, "save_every": 9, "lora": True, "lora_dropout": 0.1}
    train_retriever(retriever_settings(**changes, output=str(tmp_path / "whole")))
    shutil.copytree(tmp_path / "whole" / "checkpoint-9", tmp_path / "broken" / "checkpoint-9")
    train_retriever(retriever_settings(**changes, output=str(tmp_path / "broken"), resume=True))
    assert same(tmp_path / "whole", tmp_path / "broken")


def test_a_finished_run_can_be_resumed_to_the_same_end(retriever_settings):
    first = train_retriever(retriever_settings(steps=5))
    before = weights(first["output"])
    again = train_retriever(retriever_settings(steps=5, resume=True))
    assert again["steps"] == 5
    assert all(torch.equal(before[key], value) for key, value in weights(again["output"]).items())

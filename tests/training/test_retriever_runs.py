"""A retriever's runs: killed, resumed, and shared among processes."""

import json
import shutil

import pytest
import torch

from llamory.training.retriever import train_retriever
from toy_pairs import write_pairs
from training_runs import TORCHRUN, finish, kill_behind, losses, start, weights


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


def test_two_processes_share_their_negatives_and_learn_as_one(retriever_settings, tmp_path):
    data = str(write_pairs(tmp_path / "pairs.jsonl", 32))
    train_retriever(retriever_settings(data=[data], output=str(tmp_path / "one"), steps=6))
    shared = retriever_settings(data=[data], output=str(tmp_path / "two"), steps=6, batch_size=4)
    finish(start("retriever", shared, *TORCHRUN))
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), abs=1e-3)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=1e-3) for key in one)
    told = json.loads((tmp_path / "two" / "llamory.json").read_text())
    assert (told["steps"], told["queries"]) == (6, 32)

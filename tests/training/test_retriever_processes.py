"""A retriever trained by several processes."""

import json

import pytest
import torch

from llamory.training.retriever import train_retriever
from toy_pairs import write_pairs
from training_runs import TORCHRUN, finish, losses, start, weights


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

"""`llamory eval lookup`."""

import json

import pytest

from llamory.evaluation.lookup import LookupTask, save_task
from tiny_models import make_long_llama

TASK = LookupTask(vocabulary=20, key_length=2, value_length=2, half=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("lookup")
    model = make_long_llama(vocab_size=20, max_position_embeddings=20, last_context_length=20, mem_layers=[1])
    model.save_pretrained(path / "other")
    save_task(model.config, TASK)
    model.save_pretrained(path / "model")
    return path


def test_it_writes_table_json_and_picture_and_goes_on(folder, llamory):
    output = folder / "results"
    arguments = ["eval", "lookup", folder / "model", "--num-documents", 2, "--output", output, "--quiet"]
    first = llamory(*arguments, "--memory-tokens", "80", "--json")
    assert first.code == 0, first.err
    (run,) = json.loads(first.out)["runs"].values()
    assert (run["mem_search"], run["mem_top_k"], run["mem_top_k_attention"]) == ("faiss", 32, True)
    assert [score["tokens"] for score in run["scores"]] == [80]
    again = llamory(*arguments, "--memory-tokens", "80,160")
    assert again.code == 0, again.err
    assert "160" in again.out and (output / "lookup.png").read_bytes()[1:4] == b"PNG"
    (both,) = json.loads((output / "lookup.json").read_text())["runs"].values()
    assert both["scores"][0] == run["scores"][0]  # not measured again
    assert [score["tokens"] for score in both["scores"]] == [80, 160]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "llamory train lookup"),
        (["other"], "llamory train lookup"),
        (["model", "--memory-tokens", "2"], "holds fewer than"),
        (["model", "--mem-search", "pages"], "Invalid value for '--mem-search'"),
        (["model", "--compare", "model"], "named twice"),
    ],
)
def test_it_says_what_is_wrong(folder, llamory, arguments, told):
    arguments = [folder / part if (folder / part).exists() else part for part in arguments]
    ran = llamory("eval", "lookup", *arguments, "--output", folder / "wrong")
    assert (ran.code, ran.out) == (2, "")
    assert told in " ".join(ran.err.split())

"""`llamory eval manyshot` says how well a model classifies with demonstrations in memory."""

import json
from pathlib import Path

import pytest

SMALL = ("--lengths", "0,100,600", "--num-seeds", "2", "--num-questions", "4")


def write_lines(path: Path, count: int, first: int = 0) -> Path:
    lines = (
        {"text": f"amber {number} basin", "label": ("cedar", "delta fjord")[number % 2]} for number in range(count)
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in list(lines)[first:]))
    return path


@pytest.fixture
def data(tmp_path) -> Path:
    """Sixty labelled texts."""
    return write_lines(tmp_path / "data.jsonl", 60)


def test_it_prints_a_table_and_writes_numbers_and_picture(llamory, model_folder, data, tmp_path) -> None:
    out = tmp_path / "out"
    ran = llamory("eval", "manyshot", model_folder, "--train", data, *SMALL, "--output", out)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == f"{model_folder.name}: 2 labels, 2 seeds"
    assert lines[1].split() == ["tokens", "demonstrations", "correct", "±"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "100", "600"]
    assert lines[-1] == f"Written: {out / 'manyshot.json'} and {out / 'manyshot.png'}"
    assert sorted(path.name for path in out.iterdir()) == ["manyshot.json", "manyshot.png"]
    assert (out / "manyshot.png").read_bytes().startswith(b"\x89PNG")
    assert f"{model_folder.name} 6/6: 600 tokens, " in ran.err


def test_json_is_one_document_and_what_was_run_is_not_run_again(llamory, model_folder, data, tmp_path) -> None:
    test = write_lines(tmp_path / "test.jsonl", 70, first=60)
    arguments = ("eval", "manyshot", model_folder, "--train", data, "--test", test, "--output", tmp_path / "out")
    arguments += ("--json", "--mem-layers", "1", "--context-length", "64", "--score-type", "sum", "--bf16")
    first = llamory(*arguments, "--lengths", "100", "--num-seeds", "1", "--num-questions", "20")
    assert first.code == 0, first.err
    document = json.loads(first.out)
    assert document == json.loads((tmp_path / "out" / "manyshot.json").read_text())
    assert (document["evaluation"], document["settings"]["labels"]) == ("manyshot", ["cedar", "delta fjord"])
    assert document["settings"]["score_type"] == "sum"
    assert document["settings"]["template"] == "{text}\n{label}\n\n"
    run = document["runs"][str(model_folder)]
    assert (run["mem_layers"], run["context_length"], run["dtype"]) == ([1], 64, "bfloat16")
    (score,) = run["scores"]
    assert len(score["answers"]) == 10  # all of the test file
    assert score["labels"].count("cedar") == 5
    right = sum(answer == label for answer, label in zip(score["answers"], score["labels"], strict=True))
    assert score["accuracy"] == run["curve"][0]["accuracy"] == right / 10
    again = llamory(*arguments, "--lengths", "100,200", "--num-seeds", "2", "--num-questions", "20")
    scores = json.loads(again.out)["runs"][str(model_folder)]["scores"]
    assert scores[0] == score  # its seconds, too
    assert [(each["length"], each["seed"]) for each in scores] == [(100, 0), (100, 1), (200, 0), (200, 1)]
    other = llamory(*arguments, "--lengths", "100", "--num-questions", "3")
    assert (other.code, other.out) == (2, "")
    assert "made with other settings (questions 20, now 3)" in other.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--lengths", "2"], "Error: A length of 2 tokens is too small for one demonstration"),
        (["--lengths", "64k"], "Error: All 56 demonstrations have "),
        (["--lengths", "-5"], "Error: Invalid value for '--lengths': '-5' should be numbers of tokens"),
        (["--num-questions", "60"], "Error: The 60 examples are too few to ask 60 of them"),
        (["--label-field", "kind"], "Error: {data}:1: the object has no 'kind' (it has 'text', 'label')"),
        (["--template", "{text}"], "Error: The template '{text}' doesn't have {text} once and after it {label} once."),
        (["--test", "nowhere.jsonl"], "Error: There is no file nowhere.jsonl"),
    ],
)
def test_a_wrong_wish_is_one_sentence_before_a_model_is_loaded(
    llamory, model_folder, data, tmp_path, monkeypatch, arguments: list[str], sentence: str
) -> None:
    monkeypatch.setattr("llamory.longllama.loading.load_long_model", None)
    given = ("--train", data, *SMALL, "--output", tmp_path / "out", *arguments)
    ran = llamory("eval", "manyshot", model_folder, *given)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(sentence.replace("{data}", str(data)))
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_one_label_and_no_file_are_refused(llamory, model_folder, tmp_path) -> None:
    assert llamory("eval", "manyshot", model_folder).err.startswith("Error: Missing option '--train'")
    same = tmp_path / "same.jsonl"
    same.write_text('{"text": "a", "label": "x"}\n' * 5)
    ran = llamory("eval", "manyshot", model_folder, "--train", same)
    assert (ran.code, ran.err.count("\n")) == (2, 1)
    assert ran.err.startswith("Error: The examples have only the label 'x'")

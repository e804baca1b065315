"""From a LLaMA and a folder of documents to an answer, by the command line alone."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from llamory.cli import main
from llamory.training.run import latest_complete
from processes import heed_interrupts


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        raise SystemExit(main([str(argument) for argument in arguments]))
    out, err = capsys.readouterr()
    return stop.value.code or 0, out, err


def test_train_index_search_and_index_again(capsys, tmp_path, model_folder, documents):
    texts = tmp_path / "texts"
    shutil.copytree(documents, texts)
    (texts / "guide.md").write_text("# Ferry times\n\nThe ferry leaves the harbour at seven in the morning.\n")
    model, library = tmp_path / "model", tmp_path / "library"
    code, out, err = run(
        capsys, "train", "llara", "--model", model_folder, "--data", texts, "--output", model, "--steps", 4,
        "--batch-size", 8, "--max-length", 200, "--chunk-size", 24, "--learning-rate", 1e-3, "--log-every", 1,
        "--max-seq-length", 160, "--cpu", "--json",
    )  # fmt: skip
    assert code == 0, err
    trained = json.loads(out)
    assert trained["steps"] == 4
    assert "step 4/4" in err

    arguments = ("index", texts, "--library", library, "--model", trained["embedder"], "--chunk-size", 24, "--json")
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    first = json.loads(out)
    assert first["added"] == 41
    (texts / "00.txt").write_text("An entirely new text about rivers.")
    code, out, err = run(capsys, *arguments)
    again = json.loads(out)
    assert (again["updated"], again["added"], again["unchanged"]) == (1, 0, 40)

    code, out, err = run(capsys, "search", "when does the ferry leave", "--library", library, "--top", 3, "--json")
    assert code == 0, err
    hits = json.loads(out)
    hits = hits["hits"] if isinstance(hits, dict) else hits
    assert len(hits) == 3
    assert hits[0]["score"] >= hits[1]["score"] >= hits[2]["score"]
    assert {"text", "source", "title", "line", "score"} <= set(hits[0])

    code, out, err = run(capsys, "export", model, "--output", tmp_path / "embedder", "--max-length", 160)
    assert code == 0, err
    assert (tmp_path / "embedder" / "modules.json").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data", "nowhere", "--output", "out"], "nowhere"),
        (["--data", "empty.txt", "--output", "out"], "empty"),
        (["--data", "nothing", "--output", "out"], "nothing"),
        (["--data", "texts", "--output", "full"], "isn't empty"),
        (["--data", "texts", "--output", "out", "--model", "bert"], "not a LLaMA-like one"),
        (["--data", "texts", "--output", "out", "--model", "nowhere"], "nowhere"),
        (["--output", "out"], "--data must be given"),
        (["--data", "texts", "--output", "out", "--steps", "many"], "--steps"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(capsys, tmp_path, monkeypatch, model_folder, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    for name in ("nothing", "texts", "full", "bert"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "texts" / "a.txt").write_text("A river runs south. It meets the sea.")
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(model_folder)]
    code, out, err = run(capsys, "train", "llara", *arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    assert sentence in err.splitlines()[-1]
    assert (tmp_path / "full" / "mine").exists()


def test_ctrl_c_leaves_with_130_and_keeps_whole_checkpoints(tmp_path, model_folder, documents):
    output = tmp_path / "out"
    command = [
        sys.executable, "-m", "llamory", "train", "llara", "--model", model_folder, "--data", documents,
        "--output", output, "--steps", 100000, "--save-every", 5,
        "--batch-size", 4, "--max-length", 200, "--chunk-size", 24, "--cpu",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [str(c) for c in command], stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=heed_interrupts
    )
    while not (output / "checkpoint-10" / "manifest.json").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert latest_complete(output) is not None


def test_a_full_disk_is_told_and_the_checkpoint_before_stays(capsys, tmp_path, model_folder, documents, monkeypatch):
    """torch.save doesn't pass the system's error on; it fails with one of its own."""
    save, calls = torch.save, []

    def disk_full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail_late(obj, file, *args, **kwargs):
        calls.append(file)
        if "checkpoint-4" in str(file):
            monkeypatch.setattr(os, "fsync", disk_full)
            raise RuntimeError("a message that torch may change")
        save(obj, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", fail_late)
    code, _, err = run(
        capsys, "train", "llara", "--model", model_folder, "--data", documents,
        "--output", tmp_path / "out", "--steps", 6, "--save-every", 2,
        "--batch-size", 4, "--max-length", 200, "--chunk-size", 24, "--cpu",
    )  # fmt: skip
    assert code == 2
    assert "The disk is full" in err.splitlines()[-1]
    assert latest_complete(tmp_path / "out").name == "checkpoint-2"


def test_another_template_than_the_tokenizers_is_told(capsys, tmp_path, model_folder, documents):
    broken = tmp_path / "broken"
    shutil.copytree(model_folder, broken)
    config = json.loads((broken / "config.json").read_text())
    config["llara"] = {
        "prefix_ids": [1],
        "summarize_prompt_ids": [2],
        "summarize_slot_ids": [3],
        "predict_prompt_ids": [4],
        "predict_slot_ids": [5],
        "ignored_ids": [],
    }
    (broken / "config.json").write_text(json.dumps(config))
    code, _, err = run(
        capsys, "train", "llara", "--model", broken, "--data", documents, "--output", tmp_path / "out", "--slots", 1
    )
    assert code == 2
    assert "doesn't fit its tokenizer" in err


def test_every_flag_is_explained(capsys):
    from dataclasses import fields

    from llamory.training.settings import LlaraSettings

    code, out, _ = run(capsys, "train", "llara", "--help")
    assert code == 0
    shown = " ".join(out.split())
    for field in fields(LlaraSettings):
        assert f"--{field.name.replace('_', '-')}" in shown
        assert field.metadata["help"].split()[0] in shown

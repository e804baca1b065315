"""A checkpoint is whole or it is not there."""

import errno
import os

import pytest

from llamory.errors import LlamoryError
from llamory.training import run
from llamory.training.run import is_complete, is_disk_full, latest_complete, prepare_output, write_manifest
from llamory.training.settings import RunSettings


def make(folder, whole=True):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    (folder / "state.json").write_text("{}")
    if whole:
        write_manifest(folder)
    return folder


def test_only_a_checkpoint_with_all_its_files_is_whole(tmp_path):
    assert is_complete(make(tmp_path / "a"))
    assert not is_complete(make(tmp_path / "b", whole=False))
    short = make(tmp_path / "c")
    (short / "model.safetensors").write_bytes(b"0" * 99)
    assert not is_complete(short)
    missing = make(tmp_path / "d")
    (missing / "state.json").unlink()
    assert not is_complete(missing)
    torn = make(tmp_path / "e")
    (torn / "manifest.json").write_text('{"model.safe')
    assert not is_complete(torn)


def test_the_newest_whole_checkpoint_is_resumed_and_cut_off_ones_go(tmp_path):
    make(tmp_path / "checkpoint-9"), make(tmp_path / "checkpoint-10")
    make(tmp_path / "checkpoint-11", whole=False)
    assert prepare_output(tmp_path, resume=True) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-11").exists()
    assert latest_complete(tmp_path) == tmp_path / "checkpoint-10"


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    make(tmp_path / "checkpoint-5", whole=False)
    assert prepare_output(tmp_path, resume=True) is None


def test_an_output_folder_in_use_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(LlamoryError, match=r"isn't empty; give a new folder\.$"):
        prepare_output(tmp_path, resume=False)
    make(tmp_path / "checkpoint-5")
    with pytest.raises(LlamoryError, match="--resume"):
        prepare_output(tmp_path, resume=False)
    with pytest.raises(LlamoryError, match="is a file"):
        prepare_output(tmp_path / "notes.txt", resume=False)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_recognised_by_the_error_number(tmp_path, monkeypatch, number):
    with pytest.raises(RuntimeError) as raised:
        raise RuntimeError("some words") from OSError(number, "other words")
    assert is_disk_full(raised.value, tmp_path)
    assert not is_disk_full(OSError(errno.EACCES, "not allowed"), tmp_path)
    unexplained = RuntimeError("[enforce fail at inline_container.cc:672]")
    assert not is_disk_full(unexplained, tmp_path)

    def fail(file):
        raise OSError(number, "other words")

    monkeypatch.setattr(os, "fsync", fail)
    assert is_disk_full(unexplained, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda", "mps", "xpu", "cpu"])
def test_training_uses_the_device_that_reading_uses(tmp_path, monkeypatch, device):
    monkeypatch.setattr(run, "pick_device", lambda: device)
    chosen = []
    monkeypatch.setattr(run.TrainingArguments, "__init__", lambda self, **kwargs: chosen.append(kwargs["use_cpu"]))
    run.training_arguments(RunSettings(output=str(tmp_path)), "Layer", has_eval_data=False)
    run.training_arguments(RunSettings(output=str(tmp_path), cpu=True), "Layer", has_eval_data=False)
    assert chosen == [device == "cpu", True]


def test_several_gpus_are_one_device_for_a_process(tmp_path, monkeypatch):
    settings = RunSettings(output=str(tmp_path), cpu=True)
    arguments = run.training_arguments(
        settings, "Layer", has_eval_data=False, arguments_class=run.SingleDeviceArguments
    )
    monkeypatch.setattr(run.TrainingArguments, "n_gpu", 4)
    assert arguments.n_gpu == 1 and arguments.train_batch_size == settings.batch_size

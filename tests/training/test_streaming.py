"""Resuming a run on streams of batches."""

import json

import pytest

from llamory.errors import LlamoryError
from llamory.training.run import write_manifest
from llamory.training.settings import LookupSettings
from llamory.training.streaming import setup_run


def save_checkpoint(output, settings):
    folder = output / "checkpoint-5"
    folder.mkdir(parents=True)
    position = {"recipe": settings, "streams": {}, "curriculum": {"at": 0, "mean": 0.0, "steps": 5}}
    (folder / "position-0.json").write_text(json.dumps(position))
    write_manifest(folder)
    return folder


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        (
            {"kind of run": "LookupSettings", "grow_at": 0.98, "key_length": 4},
            "{} was written by an earlier version with a setting grow_at, and can't be resumed; give another output "
            "folder (its model can be loaded as before).",
        ),
        (
            {"kind of run": "LookupSettings", "key_length": 5},
            "{} was trained with another key_length: 5, not 4; resume with the same settings, or give another output "
            "folder.",
        ),
        ({"kind of run": "FotSettings"}, "{} is a checkpoint of another training command; give another output folder."),
    ],
    ids=["earlier version", "other value", "other command"],
)
def test_a_checkpoint_with_other_settings_is_refused_with_one_sentence(tmp_path, saved, sentence):
    folder = save_checkpoint(tmp_path, saved)
    with pytest.raises(LlamoryError) as raised:
        setup_run(LookupSettings(output=str(tmp_path), resume=True, cpu=True), has_eval_data=False)
    assert str(raised.value) == sentence.format(folder)


def test_a_setting_that_the_checkpoint_lacks_had_its_default(tmp_path):
    save_checkpoint(tmp_path, {"kind of run": "LookupSettings", "key_length": 4})
    run_context = setup_run(LookupSettings(output=str(tmp_path), resume=True, cpu=True), has_eval_data=False)
    assert run_context.position["curriculum"]["steps"] == 5

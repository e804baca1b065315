"""Settings of training: types, bounds, and the sentence for a wrong value."""

import dataclasses
import subprocess
import sys

import pytest

from llamory.errors import LlamoryError
from llamory.training import settings
from llamory.training.settings import FotSettings, InstructSettings, LlaraSettings, LookupSettings, RetrieverSettings

ALL = [LlaraSettings, RetrieverSettings, FotSettings, InstructSettings, LookupSettings]
NEEDED = {LookupSettings: {"output": "out"}}


def make(kind, **changes):
    return kind(**(NEEDED.get(kind, {"data": ["docs"], "output": "out"}) | changes))


@pytest.mark.parametrize("kind", ALL)
def test_every_setting_has_a_help_text_and_a_valid_default(kind):
    made = make(kind)
    assert all(each.metadata["help"] for each in dataclasses.fields(kind))
    assert dataclasses.replace(made) == made
    assert kind(**dataclasses.asdict(made)) == made


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("batch_size", 0, "batch_size must be at least 1, not 0."),
        ("learning_rate", 0.0, "learning_rate must be greater than 0.0, not 0.0."),
        ("seed", -1, "seed must be at least 0, not -1."),
        ("adam_beta2", 1.0, "adam_beta2 must be less than 1.0, not 1.0."),
    ],
)
def test_a_value_out_of_bounds_is_one_sentence(kind, name, value, sentence):
    with pytest.raises(LlamoryError) as raised:
        make(kind, **{name: value})
    assert str(raised.value) == sentence


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"bow_weighting": "odd"}, "bow_weighting must be 'fixed' or 'learned', not 'odd'."),
        ({"losses": ["ar", "odd"]}, "losses must name at least one of ar, summarize, predict, not ['ar', 'odd']."),
        ({"streaming": True}, "Streamed data has no known length; set steps."),
        ({"batch_size": "many"}, "batch_size is invalid: Input should be a valid integer"),
        ({"no_such_setting": 1}, "no_such_setting is invalid: "),
    ],
)
def test_other_wrong_values_are_named(changes, sentence):
    with pytest.raises(LlamoryError) as raised:
        make(LlaraSettings, **changes)
    assert str(raised.value).startswith(sentence)


def test_a_missing_setting_is_named():
    with pytest.raises(LlamoryError, match=r"output must be given\."):
        LlaraSettings(data=["docs"])


def test_settings_import_no_torch():
    code = f"import sys, {settings.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

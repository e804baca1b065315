"""Settings of a training run that takes a second."""

import pytest

from llamory.training.settings import LlaraSettings


@pytest.fixture
def settings(model_folder, documents, tmp_path):
    """Settings of a run that takes a second."""

    def make(**changes):
        values = {
            "model": str(model_folder),
            "data": [str(documents)],
            "output": str(tmp_path / "run"),
            "batch_size": 8,
            "steps": 6,
            "learning_rate": 3e-3,
            "max_length": 150,
            "passage_length": 24,
            "log_every": 1,
            "save_every": 3,
            "cpu": True,
            "quiet": True,
            "export": False,
        }
        return LlaraSettings(**(values | changes))

    return make

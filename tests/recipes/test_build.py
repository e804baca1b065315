"""A dry run of each build.sh goes through all of its steps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "adapter"), [("retriever", "RETRIEVER"), ("reader", "READER")])
def test_a_dry_run_makes_an_adapter(recipe, adapter, tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["bash", str(RECIPES / recipe / "build.sh"), "--dry-run", str(tmp_path / "work")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert (tmp_path / "work" / adapter / "adapter_model.safetensors").stat().st_size > 0


def test_a_completed_step_is_skipped(tmp_path):
    script = tmp_path / "build.sh"
    script.write_text(f'source "{RECIPES}/common.sh"\nstep one sh -c "echo ran >> ran.txt"\nfinish\n')
    for _ in range(2):
        subprocess.run(["bash", script, tmp_path / "work"], check=True, capture_output=True)
    assert (tmp_path / "work" / "ran.txt").read_text() == "ran\n"

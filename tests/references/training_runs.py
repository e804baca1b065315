"""Training runs that tests look into, start as processes, and kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m")


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights that a run saved."""
    return load_file(Path(folder) / "model.safetensors")


def losses(folder: str | Path, key: str = "loss") -> list[float]:
    """What was logged under a name, by the newest checkpoint."""
    last = max(Path(folder).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if key in entry]


def start(verb: str, settings: Any, *prefix: str) -> subprocess.Popen[str]:
    """Run `llamory train VERB` in a process of its own, with the settings as a file beside the output folder."""
    output = Path(settings.output)
    file = output.parent / f"{output.name}.yaml"
    file.write_text(yaml.safe_dump(vars(settings)))
    command = [*(prefix or (sys.executable, "-m")), "llamory", "train", verb, "--config", str(file)]
    # As many threads as here: sums in another order have other last bits.
    threads = str(torch.get_num_threads())
    environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for its end, which must be a good one."""
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


def kill_behind(verb: str, settings: Any, step: int) -> None:
    """Start a run and kill it as soon as the checkpoint of a step is whole."""
    process = start(verb, settings)
    while not (Path(settings.output) / f"checkpoint-{step}" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (Path(settings.output) / "model.safetensors").exists()

"""Checkpoints that are whole or not there: a manifest is written last, and only folders that match it are resumed."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from llamory.errors import LlamoryError

MANIFEST = "manifest.json"


class WriteManifest(TrainerCallback):
    """Write the manifest of a checkpoint once all processes have written their part."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """List the finished checkpoint's files and their sizes."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Record every file of a folder with its size; written beside and renamed."""
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    sizes.pop(MANIFEST, None)
    partial = folder / f"{MANIFEST}.partial"
    with partial.open("w") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(folder / MANIFEST)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its manifest and every file in it at its full size."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def checkpoints(output: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first."""
    found = [p for p in output.glob("checkpoint-*") if p.is_dir() and p.name.split("-")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def latest_complete(output: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next((folder for folder in reversed(checkpoints(output)) if is_complete(folder)), None)


def prepare_output(output: Path, resume: bool) -> Path | None:
    """Make the output folder ready; gives the checkpoint to resume from, if any.

    Checkpoints that were cut off are removed when a run resumes: they would be counted as kept ones.

    Raises:
        LlamoryError: the folder holds something and the run isn't a resumed one, or the path is a file.
    """
    if output.exists() and not output.is_dir():
        raise LlamoryError(f"{output} is a file; give a folder that doesn't exist yet as output.")
    if output.is_dir() and any(output.iterdir()) and not resume:
        hint = " or --resume to go on with the run in it" if checkpoints(output) else ""
        raise LlamoryError(f"The output folder {output} isn't empty; give a new folder{hint}.")
    output.mkdir(parents=True, exist_ok=True)
    for folder in checkpoints(output):
        if not is_complete(folder):
            shutil.rmtree(folder)
    return latest_complete(output)

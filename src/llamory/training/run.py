"""What all training runs share: arguments of the Trainer, adapters, checkpoints, progress, and saving the result."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from llamory.common.io import write_json
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.models.device import pick_device
from llamory.training.settings import AdaptSettings, RunSettings

SETTINGS_FILE = "llamory.json"
MANIFEST = "manifest.json"
# The files that make a folder a model are moved last.
_MOVE_ORDER = {"config.json": 1, "modules.json": 2}
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PROBE_BYTES = 1 << 20
_DISPLAYED_METRICS = (
    "loss ar_loss bow_summarize_loss bow_predict_loss teacher_loss accuracy lines contexts eval_loss "
    "eval_loss_without_memory"
).split()
Arguments = TypeVar("Arguments", bound=TrainingArguments)


@contextmanager
def user_errors(problem: str) -> Iterator[None]:
    """Raise a library's error about a setting as one sentence that begins with `problem`."""
    try:
        yield
    except LlamoryError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        raise LlamoryError(f"{problem}: {' '.join(str(error).split()).rstrip('.')}.") from error


class SingleDeviceArguments(TrainingArguments):
    """One process trains on one device: rows that attend to one another can't be split over several."""

    @property
    def n_gpu(self) -> int:
        """At most 1, so that the Trainer doesn't use DataParallel."""
        return min(1, super().n_gpu)


def training_arguments(
    settings: RunSettings,
    layer: str,
    arguments_class: type[Arguments] = TrainingArguments,  # type: ignore[assignment]
    *,
    has_eval_data: bool,
    **kwargs: Any,
) -> Arguments:
    """The Trainer's arguments, with `kwargs` beside those of the settings; raises LlamoryError if it rejects one.

    `layer` is the class name of the layers that FSDP shards.
    """
    fsdp = {"transformer_layer_cls_to_wrap": [layer], "state_dict_type": "FULL_STATE_DICT"}
    with user_errors("These settings can't be used"):
        return arguments_class(
            output_dir=settings.output,
            max_steps=settings.steps or -1,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulation,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=settings.warmup,
            weight_decay=settings.weight_decay,
            adam_beta2=settings.adam_beta2,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            bf16=settings.bf16,
            **_checkpointing(settings),
            logging_steps=settings.log_every,
            logging_nan_inf_filter=False,
            save_steps=settings.save_every,
            save_total_limit=max(2, settings.keep_checkpoints),
            eval_strategy="steps" if has_eval_data else "no",
            eval_steps=settings.eval_every or settings.save_every,
            prediction_loss_only=True,
            report_to=settings.report_to or "none",
            remove_unused_columns=False,
            disable_tqdm=True,
            use_cpu=settings.cpu or pick_device() == "cpu",
            fsdp="full_shard auto_wrap" if settings.fsdp else None,
            fsdp_config=fsdp if settings.fsdp else None,
            ddp_find_unused_parameters=False,
            **kwargs,
        )


def _checkpointing(settings: RunSettings) -> dict[str, Any]:
    if not settings.gradient_checkpointing:
        return {}
    # transformers renamed these arguments in 5.2x and removes the older names in version 6.
    name = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}


def lora_config(settings: AdaptSettings, **kwargs: Any) -> Any:
    """The adapters' configuration; `kwargs` are further arguments of `LoraConfig`."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        modules_to_save=None,
        **{"target_modules": settings.lora_targets} | kwargs,
    )


def with_lora(model: Any, settings: AdaptSettings, **kwargs: Any) -> Any:
    """Add adapters to the model; raises LlamoryError if they don't fit it. `kwargs` are `LoraConfig`'s."""
    from peft import get_peft_model

    with user_errors("These LoRA settings don't fit the model"):
        adapted = get_peft_model(model, lora_config(settings, **kwargs))
    if settings.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


class TrainingProgress(TrainerCallback):
    """A progress bar of the steps, and a line for each log entry."""

    def __init__(self, title: str, *, shown: bool) -> None:
        self.title, self.shown = title, shown
        self.bar = ProgressBar(title, 0, unit="steps", shown=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Start the bar at the current step."""
        shown = self.shown and state.is_world_process_zero
        self.bar = ProgressBar(self.title, state.max_steps, unit="steps", completed=state.global_step, shown=shown)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Advance the bar."""
        self.bar.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Print the losses."""
        if metrics := "  ".join(f"{key} {_number(logs[key])}" for key in _DISPLAYED_METRICS if key in (logs or {})):
            self.bar.print(f"step {state.global_step}/{state.max_steps}  {metrics}")


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3f}"


def run(make_trainer: Callable[..., Trainer], settings: RunSettings, checkpoint: Path | None, title: str) -> Trainer:
    """Make a Trainer and train to the end; raises LlamoryError if it rejects a setting or the disk is full."""
    progress = TrainingProgress(title, shown=not settings.quiet)
    with user_errors("These settings can't be used"):
        trainer = make_trainer(callbacks=[WriteManifest(), progress])
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if not isinstance(error, LlamoryError) and is_disk_full(error, Path(settings.output)):
            reason = f"The disk is full: a checkpoint couldn't be written to {settings.output}"
            raise LlamoryError(f"{reason}; free some space and continue with --resume.") from error
        raise
    finally:
        progress.bar.stop()
    return trainer


def is_disk_full(error: BaseException, folder: Path) -> bool:
    """Whether an error was raised because nothing more can be written to a folder."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno in _DISK_FULL
        cause = cause.__cause__ or cause.__context__
    # torch and safetensors raise errors without the system's error number: try to write.
    probe = folder / f".probe-{os.getpid()}"
    try:
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as failure:
        return failure.errno in _DISK_FULL
    finally:
        probe.unlink(missing_ok=True)
    return False


def run_result(trainer: Trainer, *metrics: str, **details: Any) -> dict[str, Any]:
    """What a run returns: its folder, its steps, `details`, and the last logged values of the metrics."""
    losses = {key: entry[key] for entry in trainer.state.log_history for key in metrics if key in entry}
    losses = {key: losses[key] for key in metrics if key in losses}
    return {"output": trainer.args.output_dir, "steps": trainer.state.global_step} | details | {"losses": losses}


def check_finite(loss: Any, step: int) -> None:
    """Raise LlamoryError if a loss is infinite or NaN."""
    if not loss.isfinite():
        raise LlamoryError(f"The loss of step {step} isn't finite ({loss.item():.4g}); lower the learning rate.")


def stop_if_finished(trainer: Any) -> bool:
    """Whether all steps are done; without this check, a finished run that is resumed takes one more step."""
    if trainer.state.global_step < trainer.state.max_steps:
        return False
    trainer.control.should_training_stop = True
    return True


class WriteManifest(TrainerCallback):
    """Write the manifest of a checkpoint once all processes have written their files."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """List the checkpoint's files and their sizes."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if folder.is_dir():
                write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Record the size of every file in a folder."""
    sizes = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    sizes.pop(MANIFEST, None)
    write_json(folder / MANIFEST, sizes)


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has a manifest and all files in it have their recorded sizes."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _checkpoints(output: Path) -> list[Path]:
    """All checkpoint folders of a run, oldest first."""
    folders = [p for p in output.glob("checkpoint-*") if p.is_dir() and p.name.split("-")[1].isdigit()]
    return sorted(folders, key=lambda p: int(p.name.split("-")[1]))


def latest_complete(output: Path) -> Path | None:
    """The newest complete checkpoint."""
    return next((folder for folder in reversed(_checkpoints(output)) if is_complete(folder)), None)


def prepare_run(settings: RunSettings, arguments: TrainingArguments) -> Path | None:
    """Set the seeds and prepare the output folder, first in the main process; gives the checkpoint to resume from."""
    set_seed(settings.seed)
    with arguments.main_process_first(desc="output folder"):
        return prepare_output(Path(settings.output), settings.resume or arguments.process_index > 0)


def prepare_output(output: Path, resume: bool) -> Path | None:
    """Create the output folder, delete incomplete checkpoints and give the checkpoint to resume from, if any.

    Raises LlamoryError if the folder isn't empty and the run doesn't resume, or the path is a file.
    """
    if output.exists() and not output.is_dir():
        raise LlamoryError(f"The output {output} is a file; give a new folder.")
    if output.is_dir() and any(output.iterdir()) and not resume:
        hint = ", or --resume to continue the run in it" if _checkpoints(output) else ""
        raise LlamoryError(f"The output folder {output} isn't empty; give a new folder{hint}.")
    output.mkdir(parents=True, exist_ok=True)
    for folder in _checkpoints(output):
        if not is_complete(folder):
            shutil.rmtree(folder)
    return latest_complete(output)


def save_trained_model(
    trainer: Trainer,
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    result: Mapping[str, Any],
    *,
    save: Callable[[Path], None] | None = None,
) -> None:
    """Save the model in the output folder, weights before config; adapters are merged and also saved in `adapter`.

    The tokenizer, if given, and the run's `result` are saved with it; `save` writes the model instead of the Trainer.
    """
    output, writes = Path(settings.output), trainer.args.should_save
    partial = output / "partial"
    if save is not None:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            save(partial)
    elif isinstance(settings, AdaptSettings) and settings.lora:
        if writes:
            trainer.model.save_pretrained(partial / "adapter")
        merged = trainer.model.merge_and_unload()
        merged.tie_weights()
        if writes:
            merged.save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    if not writes:
        return
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    write_json(partial / SETTINGS_FILE, {"settings": dataclasses.asdict(settings)} | dict(result))
    (partial / "training_args.bin").unlink(missing_ok=True)
    # The config goes last, since a folder without it is not a model.
    for source in sorted(partial.iterdir(), key=lambda p: (_MOVE_ORDER.get(p.name, 0), p.name)):
        target = output / source.name
        if target.is_dir():
            shutil.rmtree(target)
        source.replace(target)
    partial.rmdir()

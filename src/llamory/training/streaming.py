"""Training on infinite, resumable streams of batches, and a curriculum that advances with training accuracy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from llamory.errors import LlamoryError
from llamory.longllama.losses import IGNORE_INDEX, correct_tokens
from llamory.training.distillation import Teacher
from llamory.training.run import (
    SingleDeviceArguments,
    check_finite,
    prepare_run,
    run,
    run_result,
    save_trained_model,
    stop_if_finished,
    training_arguments,
)
from llamory.training.settings import RunSettings

_KIND = "kind of run"
_DECAY = 0.9  # of the running mean of accuracy, per step
_MIN_STEPS = 10  # of each stage of a curriculum
# Settings that may change when a run resumes. The streams check their data themselves.
_CHANGEABLE_SETTINGS = frozenset(
    "data output eval_data eval_batches steps accumulation gradient_checkpointing attn_implementation fsdp cpu "
    "log_every save_every eval_every keep_checkpoints report_to resume quiet".split()
)
Stage = TypeVar("Stage")


class BatchSource(Protocol):
    """The data of one process."""

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """The model's arguments for each forward pass of a step, `shift_labels` included."""

    def state_dict(self) -> dict[str, Any]:
        """Position as JSON values; "streams" has this process's streams by number, other keys are common to all."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a position; "streams" holds the streams of all processes."""


class StreamingTrainer(Trainer):
    """A Trainer on a `BatchSource`; the loss is the mean over all target tokens of a step in all processes."""

    control: Any  # the Trainer's, which has no annotation there

    def __init__(
        self,
        *args: Any,
        batch_source: BatchSource,
        frozen_settings: Mapping[str, Any],
        teacher: Teacher | None = None,
        teacher_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batch_source, self.frozen_settings = batch_source, dict(frozen_settings)
        self.teacher, self.teacher_weight = teacher, teacher_weight
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True
        self._counts: list[torch.Tensor] = []
        self._divergences: list[float] = []  # since the last log entry

    def get_train_dataloader(self) -> Any:
        """A placeholder: `get_batch_samples` reads from the batch source."""
        return _Endless()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:  # noqa: ARG002
        """The step's micro-batches, and the number of target tokens in all processes."""
        if stop_if_finished(self):
            return [], None
        micro_batches = self.batch_source.micro_batches(self.state.global_step)
        count = torch.stack([(batch["shift_labels"] != IGNORE_INDEX).sum() for batch in micro_batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum()
        return micro_batches, count

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's loss plus the weighted divergence from the teacher; raises LlamoryError unless it is finite."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.teacher is not None and model.training:
            loss = loss + self._teacher_divergence(self.teacher, model, inputs)
        check_finite(loss, self.state.global_step + 1)
        return (loss, outputs) if return_outputs else loss

    def _teacher_divergence(self, teacher: Teacher, model: Any, inputs: Any) -> torch.Tensor:
        micro_batches = self.args.gradient_accumulation_steps
        pass_index = self.state.global_step * micro_batches + len(self._divergences) % micro_batches
        with self.accelerator.autocast():
            divergence = teacher.loss(model, inputs, pass_index)
        self._divergences.append(float(divergence.detach()))
        return self.teacher_weight * divergence / micro_batches

    def step_accuracy(self, hidden: torch.Tensor, targets: torch.Tensor) -> float | None:
        """Add a forward pass; the step's accuracy after the last pass of a step, else None.

        `hidden` are last hidden states (rows, columns, width), `targets` token ids (rows, columns), -100 to ignore.
        """
        weight = self.model.get_output_embeddings().weight
        correct = correct_tokens(hidden.to(weight.dtype), weight, targets)
        self._counts.append(torch.stack([correct, (targets != IGNORE_INDEX).sum()]))
        if len(self._counts) < self.args.gradient_accumulation_steps:
            return None
        counts, self._counts = torch.stack(self._counts).sum(0), []
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        correct_count, count = counts.tolist()
        return correct_count / max(1, count)

    def sum_over_batches(self, batches: Sequence[Any], measure: Callable[[Any], torch.Tensor]) -> list[float]:
        """Sums over batches, distributed over the processes, of the (count,) numbers that `measure` gives."""
        total = torch.zeros((), device=self.args.device)
        for first in range(0, len(batches), self.args.world_size):
            index = first + self.args.process_index
            # All processes run the model equally often, since FSDP gathers its weights from all of them.
            total = total + measure(batches[min(index, len(batches) - 1)]) * (index < len(batches))
        if self.args.world_size > 1:
            total = self.accelerator.gather(total[None]).sum(0)
        return [float(number) for number in total]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the divergence from the teacher; the run counts as one epoch, since streams are infinite."""
        if "loss" in logs and self._divergences:
            logs |= {"teacher_loss": sum(self._divergences) / len(self._divergences)}
            self._divergences = []
        self.state.epoch = self.state.global_step / max(1, self.state.max_steps)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        position = {"recipe": self.frozen_settings} | self.batch_source.state_dict()
        (folder / f"position-{self.args.process_index}.json").write_text(json.dumps(position))


class _Endless:
    def __iter__(self) -> Iterator[None]:
        while True:
            yield None


class Curriculum(Generic[Stage]):
    """Stages, each with the running mean of accuracy at which the next one begins."""

    def __init__(self, stages: Sequence[tuple[Stage, float]]) -> None:
        self.stages = list(stages)
        self.stage_index, self.mean, self.steps = 0, 0.0, 0

    @property
    def stage(self) -> Stage:
        """The current stage."""
        return self.stages[self.stage_index][0]

    @property
    def is_last(self) -> bool:
        """Whether the current stage is the last one."""
        return self.stage_index + 1 == len(self.stages)

    def observe(self, accuracy: float) -> None:
        """Add the training accuracy of a step; the running mean restarts in each stage with its first accuracy."""
        if not 0 <= accuracy <= 1:
            raise LlamoryError(f"An accuracy must be from 0 to 1, not {accuracy}.")
        self.mean = _DECAY * self.mean + (1 - _DECAY) * accuracy if self.steps else accuracy
        self.steps += 1
        if self.steps >= _MIN_STEPS and self.mean >= self.stages[self.stage_index][1] and not self.is_last:
            self.stage_index, self.steps = self.stage_index + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """The state as JSON values."""
        return {"at": self.stage_index, "mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state; raises LlamoryError if it is from more stages."""
        if not 0 <= state["at"] < len(self.stages):
            stage = f"stage {state['at'] + 1} of its curriculum"
            raise LlamoryError(f"The checkpoint is at {stage}, but {len(self.stages)} sizes are given; use its sizes.")
        self.stage_index, self.mean, self.steps = state["at"], state["mean"], state["steps"]


@dataclass(frozen=True)
class RunContext:
    """A run before anything is loaded."""

    settings: RunSettings
    arguments: TrainingArguments
    checkpoint: Path | None  # to resume from
    frozen_settings: dict[str, Any]  # must equal the checkpoint's
    position: dict[str, Any] | None  # the checkpoint's, in the data

    def train_and_save(
        self,
        trainer_class: type[StreamingTrainer],
        title: str,
        *,
        model: Any,
        batch_source: BatchSource,
        tokenizer: PreTrainedTokenizerBase | None = None,
        held_out: Sequence[Any] = (),
        logged_metrics: Sequence[str] = ("loss",),
        **trainer_kwargs: Any,
    ) -> dict[str, Any]:
        """Train to the end and save the model; gives the folder, the steps and the last values of `logged_metrics`."""
        if self.position is not None:
            batch_source.load_state_dict(self.position)
        make_trainer = partial(
            trainer_class,
            model=model,
            args=self.arguments,
            eval_dataset=held_out or None,
            processing_class=tokenizer,
            batch_source=batch_source,
            frozen_settings=self.frozen_settings,
            **trainer_kwargs,
        )
        trainer = run(make_trainer, self.settings, self.checkpoint, title)
        result = run_result(trainer, *logged_metrics)
        save_trained_model(trainer, self.settings, tokenizer, result)
        trainer.accelerator.wait_for_everyone()
        return result


def setup_run(settings: RunSettings, *, has_eval_data: bool, ignored_settings: Sequence[str] = ()) -> RunContext:
    """Prepare the output folder and find the checkpoint to resume from, if any; raises LlamoryError.

    `ignored_settings` are further settings that may change when a run resumes.
    """
    kwargs: dict[str, Any] = {"has_eval_data": has_eval_data, "ignore_data_skip": True}
    arguments = training_arguments(settings, "LongLlamaDecoderLayer", SingleDeviceArguments, **kwargs)
    checkpoint = prepare_run(settings, arguments)
    frozen_settings = _frozen_settings(settings, arguments.world_size)
    for name in ignored_settings:
        frozen_settings.pop(name)
    position = _read_position(checkpoint, frozen_settings) if checkpoint else None
    arguments.eval_on_start = has_eval_data and position is None
    return RunContext(settings, arguments, checkpoint, frozen_settings, position)


def _frozen_settings(settings: RunSettings, world_size: int) -> dict[str, Any]:
    """The settings that can't change when a run resumes, and the number of streams that a step reads."""
    values = {key: value for key, value in dataclasses.asdict(settings).items() if key not in _CHANGEABLE_SETTINGS}
    streams = {"streams per step (accumulation × processes)": settings.accumulation * world_size}
    return {_KIND: type(settings).__name__} | values | streams


def _read_position(checkpoint: Path, frozen_settings: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint's position in the data; raises LlamoryError for another command, version or settings."""
    parts = [json.loads(file.read_text()) for file in sorted(checkpoint.glob("position-*.json"))]
    saved = parts[0].pop("recipe") if parts else {}
    if saved.get(_KIND) != frozen_settings[_KIND]:
        raise LlamoryError(f"{checkpoint} is a checkpoint of another training command; give another output folder.")
    if unknown := sorted(saved.keys() - frozen_settings.keys() - {_KIND}):
        raise LlamoryError(
            f"{checkpoint} was written by an earlier version with a setting {unknown[0]}, and can't be resumed; give "
            "another output folder (its model can be loaded as before)."
        )
    for key, value in frozen_settings.items():
        # A setting added by a later version had its default.
        if key in saved and saved[key] != value:
            raise LlamoryError(
                f"{checkpoint} was trained with another {key}: {saved[key]}, not {value}; resume with the same "
                "settings, or give another output folder."
            )
    streams = {number: state for part in parts for number, state in part["streams"].items()}
    return parts[0] | {"streams": streams}

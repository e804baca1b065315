"""Runs on endless streams of batches, whose position is part of each checkpoint: their Trainer, begin and end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedTokenizerBase, PrinterCallback, Trainer, TrainingArguments, set_seed

from llamory.errors import LlamoryError
from llamory.longllama.losses import IGNORE_INDEX, correct_tokens
from llamory.training.checkpoints import WriteManifest, prepare_output
from llamory.training.progress import RichProgress
from llamory.training.run import last_logged, run, save_trained_model, training_arguments, user_errors
from llamory.training.settings import RunSettings
from llamory.training.teachers import Teacher

_KIND = "kind of run"
# What a resumed run may have otherwise than the run that wrote the checkpoint. The streams know their data themselves.
_CHANGEABLE_SETTINGS = frozenset(
    "data output eval_data eval_batches steps accumulation gradient_checkpointing attn_implementation fsdp cpu "
    "log_every save_every eval_every keep_checkpoints report_to resume quiet".split()
)


class BatchSource(Protocol):
    """The data of one process."""

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """The model's arguments for each pass of a step; each has `shift_labels`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position, fit for JSON: under "streams" what each stream of this process says, by its number, as text.

        All else is the same in all processes.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; "streams" has those of all processes."""
        ...


class StreamingTrainer(Trainer):
    """The Trainer with the data of a `BatchSource`; the loss is the mean over all tokens of a step, in all processes."""

    control: Any  # the Trainer's, which has no annotation there

    def __init__(
        self,
        *args: Any,
        batch_source: BatchSource,
        recipe: Mapping[str, Any],
        teacher: Teacher | None = None,
        teacher_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.batch_source, self.recipe = batch_source, dict(recipe)
        self.teacher, self.teacher_weight = teacher, teacher_weight
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True
        self._counts: list[torch.Tensor] = []
        self._divergences: list[float] = []  # since the last were logged

    def get_train_dataloader(self) -> Any:
        """Nothing that could be sharded or looked ahead in: `get_batch_samples` asks the batch_source."""
        return _InfiniteLoader()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:  # noqa: ARG002
        """The step's micro_batches, and how many tokens they predict in all processes."""
        if self.state.global_step >= self.state.max_steps:  # a finished run that is resumed
            self.control.should_training_stop = True
            return [], None
        micro_batches = self.batch_source.micro_batches(self.state.global_step)
        count = torch.stack([(batch["shift_labels"] != IGNORE_INDEX).sum() for batch in micro_batches]).sum().to(device)
        if self.args.world_size > 1:
            count = self.accelerator.gather(count[None]).sum()
        return micro_batches, count

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The model's own loss, and what it has moved away from a teacher.

        Raises:
            LlamoryError: it isn't finite.
        """
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.teacher is not None and model.training:
            loss = loss + self._teacher_divergence(self.teacher, model, inputs)
        if not torch.isfinite(loss):
            raise LlamoryError(
                f"The loss of step {self.state.global_step + 1} isn't finite ({float(loss):.4g}); lower the learning "
                "rate or look at the model's weights."
            )
        return (loss, outputs) if return_outputs else loss

    def _teacher_divergence(self, teacher: Teacher, model: Any, inputs: Any) -> torch.Tensor:
        """The teacher's part of a pass's loss."""
        micro_batches = self.args.gradient_accumulation_steps
        pass_index = self.state.global_step * micro_batches + len(self._divergences) % micro_batches
        with self.accelerator.autocast():
            divergence = teacher.loss(model, inputs, pass_index)
        self._divergences.append(float(divergence.detach()))
        return self.teacher_weight * divergence / micro_batches

    def step_accuracy(self, hidden: torch.Tensor, targets: torch.Tensor) -> float | None:
        """Count a pass's right tokens; after a step's last pass, the accuracy of the step in all processes.

        Args:
            hidden: (batch, columns, hidden_size) last hidden states.
            targets: (batch, columns), -100 where nothing is counted.
        """
        weight = self.model.get_output_embeddings().weight
        right = correct_tokens(hidden.to(weight.dtype), weight, targets)
        self._counts.append(torch.stack([right, (targets != IGNORE_INDEX).sum()]))
        if len(self._counts) < self.args.gradient_accumulation_steps:
            return None
        counts, self._counts = torch.stack(self._counts).sum(0), []
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        right, counted = counts.tolist()
        return right / max(1, counted)

    def sum_over_batches(self, batches: Sequence[Any], measure: Callable[[Any], torch.Tensor]) -> list[float]:
        """The sum of what is measured of each batch, shared out among the processes.

        Args:
            batches: at least one.
            measure: of a batch, numbers (count,) that can be added.
        """
        total = torch.zeros((), device=self.args.device)
        for first in range(0, len(batches), self.args.world_size):
            index = first + self.args.process_index
            # All processes go through the model equally often, as shards of its weights have to come from all.
            total = total + measure(batches[min(index, len(batches) - 1)]) * (index < len(batches))
        if self.args.world_size > 1:
            total = self.accelerator.gather(total[None]).sum(0)
        return [float(number) for number in total]

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with the divergence from a teacher. Streams have no end, so the only epoch is the run."""
        if "loss" in logs and self._divergences:
            logs |= {"teacher_loss": sum(self._divergences) / len(self._divergences)}
            self._divergences = []
        self.state.epoch = self.state.global_step / max(1, self.state.max_steps)
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        position = {"recipe": self.recipe} | self.batch_source.state_dict()
        (folder / f"position-{self.args.process_index}.json").write_text(json.dumps(position))


class _InfiniteLoader:
    """Stands where the Trainer wants batches."""

    def __iter__(self) -> Iterator[None]:
        while True:
            yield None


@dataclass(frozen=True)
class RunContext:
    """What a run knows before it loads anything.

    Attributes:
        settings: of the run.
        arguments: the Trainer's.
        checkpoint: where it goes on from, if it does.
        recipe: what a checkpoint must agree with.
        position: the checkpoint's place in the data.
    """

    settings: RunSettings
    arguments: TrainingArguments
    checkpoint: Path | None
    recipe: dict[str, Any]
    position: dict[str, Any] | None

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
        """Train to the end and save.

        Args:
            trainer_class: the Trainer.
            title: what the progress bar is called.
            model: what is trained.
            batch_source: its data.
            tokenizer: saved with the model.
            held_out: what the Trainer has_eval_data on.
            logged_metrics: logged values whose last ones the result tells.
            trainer_kwargs: further arguments of the Trainer.

        Returns:
            The output folder, steps done, and the last values of what is logged_metrics.
        """
        if self.position is not None:
            batch_source.load_state_dict(self.position)
        progress = RichProgress(title)
        with user_errors("These settings can't be used"):
            trainer = trainer_class(
                model=model,
                args=self.arguments,
                eval_dataset=held_out or None,
                processing_class=tokenizer,
                callbacks=[WriteManifest()] + ([] if self.settings.quiet else [progress]),
                batch_source=batch_source,
                recipe=self.recipe,
                **trainer_kwargs,
            )
        trainer.remove_callback(PrinterCallback)
        run(trainer, self.checkpoint, progress)
        result = {
            "output": self.settings.output,
            "steps": trainer.state.global_step,
            "losses": last_logged(trainer, *logged_metrics),
        }
        save_trained_model(trainer, self.settings, tokenizer, result)
        trainer.accelerator.wait_for_everyone()
        return result


def setup_run(settings: RunSettings, *, has_eval_data: bool, ignored_settings: Sequence[str] = ()) -> RunContext:
    """Look at the output folder, and at the checkpoint that the run goes on from, if any.

    Args:
        settings: of the run.
        has_eval_data: whether there is something to evaluate on.
        ignored_settings: settings that may change when a run goes on.

    Raises:
        LlamoryError: settings, output folder or checkpoint that can't be used.
    """
    arguments = training_arguments(
        settings, "LongLlamaDecoderLayer", has_eval_data=has_eval_data, ignore_data_skip=True
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # one process trains on one device: rows that see one another can't be split up
    with arguments.main_process_first(desc="output folder"):
        checkpoint = prepare_output(Path(settings.output), settings.resume or arguments.process_index > 0)
    recipe = frozen_settings_of(settings, arguments.world_size)
    for name in ignored_settings:
        recipe.pop(name)
    position = read_position(checkpoint, recipe) if checkpoint else None
    arguments.eval_on_start = has_eval_data and position is None
    set_seed(settings.seed)
    return RunContext(settings, arguments, checkpoint, recipe, position)


def frozen_settings_of(settings: RunSettings, world_size: int) -> dict[str, Any]:
    """What must be the same where a run goes on; also how many streams a step reads, in whatever processes."""
    fixed_settings = {
        key: value for key, value in dataclasses.asdict(settings).items() if key not in _CHANGEABLE_SETTINGS
    }
    streams = {"streams per step (accumulation × processes)": settings.accumulation * world_size}
    return {_KIND: type(settings).__name__} | fixed_settings | streams


def read_position(checkpoint: Path, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The position that a checkpoint holds, with the streams of all processes.

    Raises:
        LlamoryError: the checkpoint is of another kind of run, or of another recipe.
    """
    parts = [json.loads(file.read_text()) for file in sorted(checkpoint.glob("position-*.json"))]
    if not parts or parts[0]["recipe"][_KIND] != recipe[_KIND]:
        raise LlamoryError(f"{checkpoint} is a checkpoint of another kind of run; give another output folder.")
    saved_settings = parts[0].pop("recipe")
    for key in recipe:
        # A setting that a later version has added was at its default.
        if key in saved_settings and saved_settings[key] != recipe[key]:
            raise LlamoryError(
                f"{checkpoint} is a checkpoint of another recipe: {key} was {saved_settings[key]}, now it is {recipe[key]}; "
                "give the same settings to go on, or another output folder."
            )
    streams = {number: state for part in parts for number, state in part["streams"].items()}
    return parts[0] | {"streams": streams}

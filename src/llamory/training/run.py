"""What training runs share: the Trainer's arguments, adapters, a run to its end, and how it is saved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from llamory.errors import LlamoryError
from llamory.training.settings import AdaptSettings, RunSettings

SETTINGS_FILE = "llamory.json"
# What makes a folder a model is moved up behind all else.
_MOVE_ORDER = {"config.json": 1, "modules.json": 2}
_AT_LEAST_ONE = ("batch_size", "accumulation", "log_every", "save_every")


@contextlib.contextmanager
def user_errors(problem: str) -> Iterator[None]:
    """Turn what a library says of a setting that it can't use into one sentence."""
    try:
        yield
    except LlamoryError:
        raise
    except (ValueError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise LlamoryError(f"{problem}: {reason.rstrip('.')}.") from error


def check_settings(settings: RunSettings, at_least_one: Sequence[str] = ()) -> None:
    """Check what all runs have in common, and that the settings named in `at_least_one` are.

    Raises:
        LlamoryError: a number is too small.
    """
    for name in (*at_least_one, *_AT_LEAST_ONE):
        if getattr(settings, name) < 1:
            raise LlamoryError(f"{name} must be at least 1, not {getattr(settings, name)}.")
    for name in ("steps", "eval_every"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise LlamoryError(f"{name} must be at least 1, not {value}.")
    if settings.learning_rate <= 0:
        raise LlamoryError(f"learning_rate must be greater than 0, not {settings.learning_rate}.")


def training_arguments(
    settings: RunSettings,
    layer: str,
    *,
    has_eval_data: bool,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    **kwargs: Any,
) -> TrainingArguments:
    """The Trainer's arguments.

    Args:
        settings: of the run.
        layer: class name of the layers that FSDP shards one by one.
        has_eval_data: whether there is something to evaluate on.
        arguments_class: their class.
        kwargs: further arguments.

    Raises:
        LlamoryError: a setting that the Trainer can't use.
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
            use_cpu=settings.cpu or not torch.cuda.is_available(),
            fsdp="full_shard auto_wrap" if settings.fsdp else None,
            fsdp_config=fsdp if settings.fsdp else None,
            ddp_find_unused_parameters=False,
            **kwargs,
        )


def _checkpointing(settings: RunSettings) -> dict[str, Any]:
    # transformers renamed these arguments in 5.2x; the older names go in its version 6.
    name = "activation" if "activation_checkpointing" in TrainingArguments.__dataclass_fields__ else "gradient"
    if not settings.gradient_checkpointing:
        return {}
    return {f"{name}_checkpointing": True, f"{name}_checkpointing_kwargs": {"use_reentrant": False}}


def lora_config(settings: AdaptSettings, **kwargs: Any) -> Any:
    """What settings say of adapters; `kwargs` goes to peft's `LoraConfig` too."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        modules_to_save=None,
        **{"target_modules": settings.lora_targets} | kwargs,
    )


def with_lora(model: Any, settings: AdaptSettings, **kwargs: Any) -> Any:
    """The model with adapters on the named layers; `kwargs` goes to peft's `LoraConfig`.

    Raises:
        LlamoryError: adapters that don't fit the model.
    """
    from peft import get_peft_model

    with user_errors("These LoRA settings don't fit the model"):
        adapted = get_peft_model(model, lora_config(settings, **kwargs))
    if settings.gradient_checkpointing:
        adapted.enable_input_require_grads()
    return adapted


def run(trainer: Trainer, checkpoint: Path | None, progress: Any) -> None:
    """Train to the end, from a checkpoint if there is one; the progress bar gives the terminal back in any case.

    Raises:
        LlamoryError: the disk is full.
    """
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except RuntimeError as error:
        if "inline_container" in str(error):  # what torch.save says where the system says that the disk is full
            raise LlamoryError(
                f"A checkpoint couldn't be written whole to {trainer.args.output_dir}, the disk is probably full; free "
                "some space and go on with --resume."
            ) from error
        raise
    finally:
        progress.close()


def last_logged(trainer: Trainer, *keys: str) -> dict[str, float]:
    """The newest logged values of those keys that the log has."""
    history = trainer.state.log_history
    found = {key: [entry[key] for entry in history if key in entry] for key in keys}
    return {key: values[-1] for key, values in found.items() if values}


def save_trained_model(
    trainer: Trainer,
    settings: RunSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    result: Mapping[str, Any],
    *,
    save: Callable[[Path], None] | None = None,
) -> None:
    """Save the model in the output folder itself, weights before config; adapters are merged, and kept beside.

    Args:
        trainer: has the model.
        settings: of the run.
        tokenizer: saved with the model, if given.
        result: what the run tells, kept beside the settings.
        save: writes the model into a folder, in place of the Trainer.
    """
    output = Path(settings.output)
    partial = output / "partial"
    if save is not None:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
            save(partial)
    elif isinstance(settings, AdaptSettings) and settings.lora:
        if trainer.args.should_save:
            trainer.model.save_pretrained(partial / "adapter")
        merged = trainer.model.merge_and_unload()
        merged.tie_weights()
        if trainer.args.should_save:
            merged.save_pretrained(partial)
    else:
        trainer.save_model(str(partial))
    if trainer.args.should_save:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        record = {"settings": dataclasses.asdict(settings)} | dict(result)
        (partial / SETTINGS_FILE).write_text(json.dumps(record, indent=1))
        (partial / "training_args.bin").unlink(missing_ok=True)
        _move_to_parent(partial, output)


def _move_to_parent(partial: Path, output: Path) -> None:
    """Move a finished save one folder up, its config last: a folder without it is no model."""
    for source in sorted(partial.iterdir(), key=lambda p: (_MOVE_ORDER.get(p.name, 0), p.name)):
        target = output / source.name
        if target.is_dir():
            shutil.rmtree(target)
        source.replace(target)
    partial.rmdir()

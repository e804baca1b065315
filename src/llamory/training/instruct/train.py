"""Instruction and chat tuning with part of each example in memory (Tworkowski et al. 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llamory.errors import LlamoryError
from llamory.longllama.configuration import DEFAULT_LAST_CONTEXT
from llamory.longllama.losses import IGNORE_INDEX
from llamory.models import base as backbone
from llamory.training.corpus import make_sources
from llamory.training.distillation import load_teacher
from llamory.training.fot.contexts import check_negative_weight
from llamory.training.instruct.batches import (
    FrozenContextBatches,
    HiddenStateCache,
    InstructBatches,
    MemorySplit,
    check_rows,
)
from llamory.training.instruct.dataset import InstructFormat, Lengths, load_instructions
from llamory.training.long_models import load_trainable, memory_config_overrides
from llamory.training.settings import InstructSettings
from llamory.training.streaming import StreamingTrainer, setup_run

_EVAL = "eval_loss"


def train_instruct(settings: InstructSettings) -> dict[str, Any]:
    """Tune any LLaMA with memory to follow instructions and save it in `settings.output`.

    Returns the output folder, steps done, the last loss and, with eval_data, the last loss on it. Raises LlamoryError
    if settings, data, model, checkpoint or output folder can't be used, or a loss isn't finite.
    """
    _check(settings)
    run_context = setup_run(settings, has_eval_data=bool(settings.eval_data), ignored_settings=["num_proc"])
    arguments = run_context.arguments
    config = backbone.load_config(settings.model)
    split = _split(settings, config)
    config_overrides = memory_config_overrides(settings, config, split.row_length, split.last_context_length)
    tokenizer = backbone.load_tokenizer(settings.model)
    with arguments.main_process_first(desc="data"):
        streams = _streams(settings, split, tokenizer, arguments.process_index, arguments.world_size)
        held_out = _held_out(settings, split, tokenizer)
    warmup_steps = round(settings.negative_weight_warmup * (settings.steps or 0))
    teacher = load_teacher(settings, config)
    model = load_trainable(settings, config_overrides)
    return run_context.train_and_save(
        InstructTrainer,
        "Instruction tuning",
        model=model,
        batch_source=InstructBatchSource(streams, warmup_steps),
        tokenizer=tokenizer,
        held_out=held_out,
        logged_metrics=("loss", _EVAL),
        teacher=teacher,
        teacher_weight=settings.teacher_weight,
        hidden_state_cache=HiddenStateCache(settings.context_cache_rows),
    )


class InstructBatchSource:
    """The batches of one process's streams; the max weight of negatives grows from the min in `warmup_steps`."""

    def __init__(self, streams: Mapping[int, InstructBatches], warmup_steps: int = 0) -> None:
        self.streams, self.warmup_steps = dict(streams), warmup_steps

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """A batch of each stream."""
        for batches in self.streams.values():
            batches.negative_weight_progress = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        return [_model_inputs(next(batches)) for batches in self.streams.values()]

    def state_dict(self) -> dict[str, Any]:
        """The positions of the streams."""
        return {"streams": {str(number): batches.state_dict() for number, batches in self.streams.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        for number, batches in self.streams.items():
            batches.load_state_dict(state["streams"][str(number)])


class InstructTrainer(StreamingTrainer):
    """Evaluates on a list of batches, and encodes frozen contexts before it calls the model."""

    def __init__(self, *args: Any, hidden_state_cache: HiddenStateCache, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_state_cache = hidden_state_cache

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = super()._prepare_inputs(inputs)
        if "context_ids" in inputs:
            model = self.accelerator.unwrap_model(self.model)
            model = model.get_base_model() if hasattr(model, "get_base_model") else model
            with self.accelerator.autocast():
                states = self.hidden_state_cache.get(model.model, inputs.pop("context_ids"), inputs["context_lengths"])
            inputs["context_states"] = states
        return inputs

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ARG002
        """The mean loss of answer tokens in all held-out batches."""
        self.model.eval()
        total, count = self.sum_over_batches(self.eval_dataset, self._loss)
        metrics = {_EVAL: total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """(2,) the sum of the losses of answer tokens, and their number."""
        inputs = self._prepare_inputs(dict(batch))
        loss = self.model(**inputs, num_items_in_batch=1).loss.float()
        return torch.stack([loss, (inputs["shift_labels"] != IGNORE_INDEX).sum()])


def _check(settings: InstructSettings) -> None:
    if settings.frozen_context and (settings.trainable != "memory_projections" or settings.fsdp):
        raise LlamoryError("frozen_context needs trainable: memory_projections, and no fsdp.")
    if settings.steps is None:
        raise LlamoryError("Instruction tuning has no last batch; set steps.")
    _negative_weight(settings)
    _lengths(settings)
    make_sources(settings.data, settings.proportions or None)


def _negative_weight(settings: InstructSettings) -> tuple[float, float]:
    negative_weight = settings.negative_weight or [1.0, 1.0]
    check_negative_weight(negative_weight)
    return negative_weight[0], negative_weight[1]


def _lengths(settings: InstructSettings) -> Lengths:
    return Lengths(settings.input_length, settings.output_length, settings.total_length)


def _split(settings: InstructSettings, config: PretrainedConfig) -> MemorySplit:
    """How examples are split for this model."""
    row = config.max_position_embeddings if settings.row_length is None else settings.row_length
    last = settings.last_context_length
    if last is None:
        last = min(getattr(config, "last_context_length", None) or DEFAULT_LAST_CONTEXT, row)
    split = MemorySplit(row, last, settings.total_length, settings.split)
    check_rows(split, settings.batch_size)
    return split


def _streams(
    settings: InstructSettings, split: MemorySplit, tokenizer: PreTrainedTokenizerBase, process: int, processes: int
) -> dict[int, InstructBatches]:
    """One stream for each micro-batch of this process in a step."""
    sources = make_sources(settings.data, settings.proportions or None)
    data = [_examples(settings, source.paths, tokenizer) for source in sources], [each.proportion for each in sources]
    count = settings.accumulation
    return {
        number: _batches(settings, split, tokenizer, *data, stream=number, streams=count * processes)
        for number in range(process * count, (process + 1) * count)
    }


def _held_out(
    settings: InstructSettings, split: MemorySplit, tokenizer: PreTrainedTokenizerBase
) -> list[dict[str, Any]]:
    """The batches for evaluation, split as in training."""
    if not settings.eval_data:
        return []
    batches = _batches(settings, split, tokenizer, [_examples(settings, settings.eval_data, tokenizer)], [1.0])
    return [_model_inputs(batch) for batch in islice(batches, settings.eval_batches)]


def _batches(
    settings: InstructSettings,
    split: MemorySplit,
    tokenizer: PreTrainedTokenizerBase,
    datasets: list[Any],
    proportions: list[float],
    **stream: Any,
) -> InstructBatches:
    batches_class: Any = InstructBatches
    if settings.frozen_context:
        batches_class, stream["query_token_budget"] = FrozenContextBatches, settings.query_token_budget
    return batches_class(
        datasets,
        proportions,
        split,
        rows=settings.batch_size,
        pad_token_id=tokenizer.pad_token_id,
        seed=settings.seed,
        negatives=settings.negatives,
        negative_weight=_negative_weight(settings),
        **stream,
    )


def _examples(settings: InstructSettings, paths: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(InstructFormat)}
    return load_instructions(
        paths,
        tokenizer,
        InstructFormat(**fields),
        _lengths(settings),
        skip_broken=settings.skip_broken,
        num_proc=settings.num_proc,
    )


def _model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key != "sources"}

"""FoT training on the Hugging Face Trainer: trains a LLaMA to use memory (Tworkowski et al. 2023, section 3.2)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llamory.common.io import write_json
from llamory.embedding.encoder import escape_slot_tokens
from llamory.embedding.pipeline import load_embedder
from llamory.errors import LlamoryError
from llamory.longllama.losses import IGNORE_INDEX
from llamory.models import base as backbone
from llamory.training.corpus import DocumentStream, Source, make_sources
from llamory.training.distillation import load_teacher
from llamory.training.fot.batches import FotBatches
from llamory.training.fot.contexts import (
    PUBLISHED_CROSSBATCH_SCHEDULES,
    ContextSampler,
    ContextSamplingConfig,
    embedder,
)
from llamory.training.long_models import load_trainable, memory_config_overrides
from llamory.training.settings import FotSettings
from llamory.training.streaming import StreamingTrainer, setup_run

CURVE_FILE = "curve.json"
_LOSS_WITH_MEMORY, _LOSS_WITHOUT_MEMORY = "eval_loss", "eval_loss_without_memory"
_DEFAULT_CROSSBATCH_SCHEDULE = "3b"
_PAIR = re.compile(r"(\d+)[+:](\d+)")  # YAML reads 1:1 as a number unless it is quoted


def train_fot(settings: FotSettings) -> dict[str, Any]:
    """Train a LLaMA to use memory and save it as a LongLLaMA in `settings.output`.

    Returns the output folder, steps done, the last loss and, with eval_data, the last losses with and without memory.
    Raises LlamoryError if settings, data, model, checkpoint or output folder can't be used, or a loss isn't finite.
    """
    sampling_config = _check(settings)
    run_context = setup_run(settings, has_eval_data=bool(settings.eval_data))
    arguments = run_context.arguments
    config = backbone.load_config(settings.model)
    config_overrides = memory_config_overrides(settings, config, settings.row_length)
    tokenizer = backbone.load_tokenizer(settings.model)
    context_sampler = _context_sampler(settings, sampling_config, tokenizer, str(arguments.device))
    streams = _streams(settings, tokenizer, arguments.process_index, arguments.world_size)
    held_out = _held_out(settings, tokenizer)
    teacher = load_teacher(settings, config)
    model = load_trainable(settings, config_overrides)
    return run_context.train_and_save(
        FotTrainer,
        "FoT training",
        model=model,
        batch_source=FotBatchSource(streams, context_sampler),
        tokenizer=tokenizer,
        held_out=held_out,
        logged_metrics=("loss", _LOSS_WITH_MEMORY, _LOSS_WITHOUT_MEMORY),
        teacher=teacher,
        teacher_weight=settings.teacher_weight,
        settings=settings,
        context_sampler=context_sampler,
    )


class FotBatchSource:
    """The batches of one process's streams, with the contexts of their rows."""

    def __init__(self, streams: Mapping[int, FotBatches], context_sampler: ContextSampler) -> None:
        self.streams, self.context_sampler = dict(streams), context_sampler

    def micro_batches(self, step: int) -> list[dict[str, Any]]:
        """A batch of each stream."""
        micro_batches = []
        for number, batches in self.streams.items():
            batch: dict[str, Any] = next(batches)
            contexts = self.context_sampler.select(step, number, batch["input_ids"], batch.pop("documents"))
            weights = self.context_sampler.weights(contexts, step, number)
            weighted = {} if weights is None else {"context_weights": weights}
            micro_batches.append(batch | {"contexts": contexts} | weighted)
        return micro_batches

    def state_dict(self) -> dict[str, Any]:
        """The positions of the streams and the state of the curriculum."""
        streams = {str(number): batches.state_dict() for number, batches in self.streams.items()}
        return {"streams": streams, "contexts": self.context_sampler.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state."""
        for number, batches in self.streams.items():
            batches.load_state_dict(state["streams"][str(number)])
        self.context_sampler.load_state_dict(state["contexts"])


class FotTrainer(StreamingTrainer):
    """Evaluates with and without memory; with a curriculum it measures the training accuracy."""

    def __init__(self, *args: Any, settings: FotSettings, context_sampler: ContextSampler, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.settings, self.context_sampler = settings, context_sampler
        self._accuracy: float | None = None

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The next-token loss; the last pass of a step reports the accuracy to the context sampler."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.settings.schedule == "curriculum" and model.training:
            accuracy = self.step_accuracy(outputs["hidden_states"][0], inputs["shift_labels"])
            if accuracy is not None:
                self._accuracy = accuracy
                self.context_sampler.observe(accuracy)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log training accuracy and number of contexts as well, unless they are constant."""
        if "loss" in logs and self.settings.schedule != "constant":
            size = self.context_sampler.size(self.state.global_step)
            logs |= {} if size is None else {"contexts": size}
            logs |= {} if self._accuracy is None else {"accuracy": round(self._accuracy, 6)}
        super().log(logs, *args, **kwargs)

    @torch.no_grad()
    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:  # noqa: ARG002
        """The loss of held-out rows that have earlier chunks in their batch, with these in memory and without."""
        self.model.eval()
        with_memory, without_memory, count = self.sum_over_batches(self.eval_dataset, self._losses)
        metrics = {_LOSS_WITH_MEMORY: with_memory / count, _LOSS_WITHOUT_MEMORY: without_memory / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.args.should_save:
            self._write_curve(int(count))
        return metrics

    def _losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(3,) sums of the losses with memory and without, and the number of tokens."""
        inputs = self._prepare_inputs(dict(batch))
        contexts = _earlier_chunks(len(inputs["input_ids"]), self.settings.dataset_packing)
        no_contexts: list[list[int]] = [[] for _ in contexts]
        counted = torch.tensor([bool(seen) for seen in contexts], device=inputs["input_ids"].device)
        targets = inputs["shift_labels"].masked_fill(~counted[:, None], IGNORE_INDEX)
        losses = [
            self.model(inputs["input_ids"], shift_labels=targets, contexts=seen, num_items_in_batch=1).loss.float()
            for seen in (contexts, no_contexts)
        ]
        return torch.stack([*losses, (targets != IGNORE_INDEX).sum().float()])

    def _write_curve(self, tokens: int) -> None:
        keys = {"step": "step", "loss_with_memory": _LOSS_WITH_MEMORY, "loss_without_memory": _LOSS_WITHOUT_MEMORY}
        history = [entry for entry in self.state.log_history if _LOSS_WITH_MEMORY in entry]
        curve = {
            "model": self.settings.model,
            "eval_data": self.settings.eval_data,
            "row_length": self.settings.row_length,
            "memory_rows": self.settings.dataset_packing - 1,
            "tokens": tokens,
            "curve": [{name: entry[key] for name, key in keys.items()} for entry in history],
        }
        write_json(Path(self.args.output_dir) / CURVE_FILE, curve)


def _earlier_chunks(batch_size: int, dataset_packing: int) -> list[list[int]]:
    """Per row, all earlier chunks of its document, nearest first."""
    return [[row - offset for offset in range(1, row % dataset_packing + 1)] for row in range(batch_size)]


def _check(settings: FotSettings) -> ContextSamplingConfig:
    if settings.steps is None:
        raise LlamoryError("FoT training has no last batch; set steps.")
    if settings.schedule == "curriculum" and settings.fsdp:
        raise LlamoryError("A curriculum needs the training accuracy, which isn't available with FSDP; use DDP.")
    if settings.eval_data and settings.dataset_packing < 2:
        raise LlamoryError("Evaluation needs earlier chunks of a document as memory; set dataset_packing to 2 or more.")
    if settings.negatives == "similar" and settings.retriever is None:
        raise LlamoryError("Similar negatives need a retriever; give a Sentence Transformers model.")
    use_range = settings.cross_batch_range is not None and not settings.crossbatch_schedule
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ContextSamplingConfig)}
    values["crossbatch_schedule"] = None if use_range else _parse_crossbatch_schedule(settings.crossbatch_schedule)
    values["negative_weight"] = settings.negative_weight or (1.0, 1.0)
    sampling_config = ContextSamplingConfig(**values)
    # Checks the configuration against the batch; the retriever is loaded later.
    unloaded = dataclasses.replace(sampling_config, negatives="random")
    ContextSampler(unloaded, settings.batch_size, settings.dataset_packing, settings.seed)
    return sampling_config


def _parse_crossbatch_schedule(entries: list[str]) -> list[tuple[int, int]]:
    """Parse a crossbatch_schedule: a published name, or POSITIVES+NEGATIVES entries, also comma-separated."""
    parts = [part.strip() for entry in entries or [_DEFAULT_CROSSBATCH_SCHEDULE] for part in str(entry).split(",")]
    if len(parts) == 1 and parts[0] in PUBLISHED_CROSSBATCH_SCHEDULES:
        return PUBLISHED_CROSSBATCH_SCHEDULES[parts[0]]
    pairs = [_PAIR.fullmatch(part) for part in parts]
    if wrong := [part for part, pair in zip(parts, pairs, strict=True) if pair is None]:
        raise LlamoryError(
            f"crossbatch_schedule has the entry {wrong[0]!r}, but it must be POSITIVES+NEGATIVES, such as 2+1, "
            f"or one of {', '.join(PUBLISHED_CROSSBATCH_SCHEDULES)} alone."
        )
    return [(int(pair[1]), int(pair[2])) for pair in pairs if pair]


def _context_sampler(
    settings: FotSettings, sampling_config: ContextSamplingConfig, tokenizer: PreTrainedTokenizerBase, device: str
) -> ContextSampler:
    embed = None
    if settings.negatives == "similar":
        assert settings.retriever is not None
        retriever = load_embedder(settings.retriever, device=device)
        embed = embedder(retriever, tokenizer, clean=lambda texts: escape_slot_tokens(retriever, texts))
    return ContextSampler(sampling_config, settings.batch_size, settings.dataset_packing, settings.seed, embed)


def _streams(
    settings: FotSettings, tokenizer: PreTrainedTokenizerBase, process: int, processes: int
) -> dict[int, FotBatches]:
    """One stream for each micro-batch of this process in a step."""
    sources, count = make_sources(settings.data, settings.proportions or None), settings.accumulation
    options = {"shards": count * processes, "shuffle_buffer": settings.shuffle_buffer}
    return {
        number: _batches(settings, sources, tokenizer, shard=number, **options)
        for number in range(process * count, (process + 1) * count)
    }


def _held_out(settings: FotSettings, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Tensor]]:
    """The first batches of eval_data, in the order of the files."""
    if not settings.eval_data:
        return []
    batches = _batches(settings, make_sources(settings.eval_data), tokenizer, shuffle_buffer=0)
    keys = ("input_ids", "shift_labels")
    return [{key: batch[key] for key in keys} for batch in islice(batches, settings.eval_batches)]


def _batches(
    settings: FotSettings, sources: list[Source], tokenizer: PreTrainedTokenizerBase, **options: int
) -> FotBatches:
    """Batches of a stream; `options` are its shard, the number of shards and the size of its shuffle buffer."""
    stream = DocumentStream(
        sources,
        tokenizer,
        seed=settings.seed,
        min_length=settings.row_length if settings.min_length is None else settings.min_length,
        text_field=settings.text_field,
        skip_broken=settings.skip_broken,
        **options,
    )
    return FotBatches(
        stream,
        row_length=settings.row_length,
        batch_size=settings.batch_size,
        dataset_packing=settings.dataset_packing,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )

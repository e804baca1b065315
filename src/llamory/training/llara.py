"""LLARA pretraining (Li et al. 2023) on the Hugging Face Trainer."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainingArguments

from llamory.embedding.pipeline import add_whitening, export_sentence_transformer, fit_whitening_on_texts, load_embedder
from llamory.embedding.whitening import MIN_TEXTS, WHITENING_FILE
from llamory.errors import LlamoryError
from llamory.llara.data import LlaraCollator, load_examples, passage_texts
from llamory.llara.losses import IGNORE_INDEX
from llamory.llara.modeling import PreLlamaModel
from llamory.llara.template import LlaraTemplate
from llamory.models import base as backbone
from llamory.training.run import (
    prepare_run,
    run,
    run_result,
    save_trained_model,
    stop_if_finished,
    training_arguments,
    user_errors,
    with_lora,
)
from llamory.training.settings import LlaraSettings

EMBEDDER_FOLDER = "sentence-transformers"
_LOSSES = ("ar_loss", "bow_summarize_loss", "bow_predict_loss")
# Batch columns that hold the targets of each loss.
_TARGETS = {"ar": "labels", "summarize": "output_summarize_ids", "predict": "output_predict_ids"}


def train_llara(settings: LlaraSettings) -> dict[str, Any]:
    """Pretrain a LLaMA with LLARA; saves it, and an embedder for Sentence Transformers, in `settings.output`.

    Returns the output folder, the embedder's folder, the number of steps and the last losses. Raises LlamoryError if
    settings, data, model or output folder can't be used, or a loss is not finite.
    """
    if settings.whiten and settings.whiten < MIN_TEXTS:
        raise LlamoryError(f"whiten must be 0 or at least {MIN_TEXTS} passages, not {settings.whiten}.")
    arguments: TrainingArguments = training_arguments(
        settings,
        "LlamaDecoderLayer",
        has_eval_data=bool(settings.eval_data or settings.eval_fraction),
        num_train_epochs=settings.epochs,
        dataloader_num_workers=settings.workers,
    )
    checkpoint = prepare_run(settings, arguments)
    model, tokenizer = _load(settings)
    template = model.template
    assert template is not None
    with arguments.main_process_first(desc="data"):
        train, evaluation = _data(settings, tokenizer, template)
    if settings.whiten and not settings.streaming and len(train) < MIN_TEXTS:
        count = f"at least {MIN_TEXTS} passages and there are {len(train)}"
        raise LlamoryError(f"Whitening needs {count}; add data, or set whiten to 0.")
    make_trainer = partial(
        LlaraTrainer,
        model=_with_lora(model, settings) if settings.lora else model,
        args=arguments,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=LlaraCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        template=template,
        losses=settings.losses,
    )
    trainer = run(make_trainer, settings, checkpoint, "LLARA pretraining")
    assert isinstance(trainer, LlaraTrainer)
    return _save_and_export(trainer, settings, tokenizer, train)


class LlaraTrainer(Trainer):
    """A Trainer with LLARA's three losses, each averaged over all forward passes of a step in all processes."""

    def __init__(self, *args: Any, template: LlaraTemplate, losses: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.template = template
        self._disabled_targets = [target for name, target in _TARGETS.items() if name not in losses]
        self.model_accepts_loss_kwargs = True
        self.can_return_loss = True
        self._sums: dict[str, Tensor] = {}
        self._micro_batches = 0

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """The step's batches, and (3,) counts over all processes: target tokens, and passages with targets per loss."""
        if stop_if_finished(self):
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        ignored = torch.tensor(self.template.ignored_ids, device=batches[0]["labels"].device)

        def passages(targets: Tensor) -> Tensor:
            return ((targets >= 0) & ~torch.isin(targets, ignored)).any(1).sum()

        counts = torch.zeros(3, dtype=torch.long, device=device)
        for batch in batches:
            for i, target in enumerate(_TARGETS.values()):
                if target not in self._disabled_targets:
                    values = batch[target]
                    counts[i] += ((values != IGNORE_INDEX).sum() if target == "labels" else passages(values)).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return batches, counts

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        """The sum of the losses; raises LlamoryError with step, losses and examples unless it is finite."""
        inputs = dict(inputs)
        examples = inputs.pop("example")
        for target in self._disabled_targets:
            inputs.pop(target)
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if not torch.isfinite(loss):
            parts = ", ".join(f"{key} {float(outputs[key]):.4g}" for key in _LOSSES if outputs.get(key) is not None)
            raise LlamoryError(
                f"The loss of step {self.state.global_step + 1} isn't finite ({parts}) in "
                f"{self._example_names(examples)}; check these examples or lower the learning rate."
            )
        if model.training:
            self._micro_batches += 1
            for key in _LOSSES:
                if outputs.get(key) is not None:
                    self._sums[key] = self._sums.get(key, 0) + outputs[key].detach()
        return (loss, outputs) if return_outputs else loss

    def _example_names(self, examples: Tensor) -> str:
        dataset = self.train_dataset if self.model.training else self.eval_dataset
        numbers = examples.tolist()
        names = f"examples {', '.join(map(str, numbers))}"
        if hasattr(dataset, "column_names") and hasattr(dataset, "__len__"):
            sources = zip(dataset["example"], dataset["source"], strict=True)
            names += ": " + ", ".join(source for number, source in sources if number in numbers)
        return names

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the three losses to the log."""
        if "loss" in logs and self._micro_batches:
            steps = max(1, self._micro_batches // self.args.gradient_accumulation_steps)
            for key, value in self._sums.items():
                # The value of a forward pass is its part of the step's mean; the parts of all processes add up.
                logs[key] = round(float(self.accelerator.reduce(value.clone(), reduction="sum")) / steps, 6)
            self._sums, self._micro_batches = {}, 0
        super().log(logs, *args, **kwargs)


def _load(settings: LlaraSettings) -> tuple[PreLlamaModel, PreTrainedTokenizerBase]:
    """The model with the template of the checkpoint, or a new one from the tokenizer."""
    backbone.load_config(settings.model)  # raises for another architecture, before anything else
    tokenizer = backbone.load_tokenizer(settings.model)
    model = backbone.load_model(
        settings.model, PreLlamaModel, dtype=torch.float32, attn_implementation=settings.attn_implementation
    )
    template = LlaraTemplate.from_config(model.config) or LlaraTemplate.from_tokenizer(tokenizer, settings.slots)
    template.check_tokenizer(tokenizer)
    if template.slots != settings.slots:
        raise LlamoryError(f"{settings.model} has {template.slots} slots per prompt; set slots to {template.slots}.")
    names = ("prediction_sees_summary", "bow_weighting", "bow_weight", "query_prompt")
    dataclasses.replace(template, **{name: getattr(settings, name) for name in names}).prepare_model(model)
    return model, tokenizer


def _data(settings: LlaraSettings, tokenizer: PreTrainedTokenizerBase, template: LlaraTemplate) -> tuple[Any, Any]:
    def load(paths: list[str]) -> Any:
        return load_examples(
            paths,
            tokenizer,
            template,
            max_length=settings.max_length,
            chunk_size=settings.chunk_size,
            languages=tuple(settings.languages),
            text_field=settings.text_field,
            skip_broken=settings.skip_broken,
            streaming=settings.streaming,
            num_proc=settings.num_proc,
        )

    train = load(settings.data)
    if settings.eval_data:
        return train, load(settings.eval_data)
    if settings.eval_fraction:
        with user_errors(f"{len(train)} examples can't be split by eval_fraction"):
            parts = train.train_test_split(test_size=settings.eval_fraction, seed=settings.seed)
        return parts["train"], parts["test"]
    return train, None


def _with_lora(model: PreLlamaModel, settings: LlaraSettings) -> Any:
    """Add adapters; of the embeddings only the slot tokens' rows are trained."""
    template = model.template
    assert template is not None
    slots = sorted(template.summarize_slot_ids + template.predict_slot_ids)
    adapted = with_lora(model, settings, trainable_token_indices={"embed_tokens": slots})
    model.head_trainable = False  # a tied head would compute gradients of all rows for those of the slots
    for name, parameter in adapted.named_parameters():
        if name.endswith("bow_log_variance"):
            parameter.requires_grad = True
    return adapted


def _save_and_export(
    trainer: LlaraTrainer, settings: LlaraSettings, tokenizer: PreTrainedTokenizerBase, train: Any
) -> dict[str, Any]:
    """Save the model and its whitening, and export the embedder."""
    output = Path(settings.output)
    result = run_result(trainer, "loss", *_LOSSES)
    save_trained_model(trainer, settings, tokenizer, result)
    if trainer.args.should_save:
        (output / WHITENING_FILE).unlink(missing_ok=True)  # from an earlier end of the same run
        shutil.rmtree(output / EMBEDDER_FOLDER, ignore_errors=True)
        if settings.whiten or settings.export:
            embedder = load_embedder(output, max_length=settings.max_seq_length, device=str(trainer.args.device))
        if settings.whiten:
            texts = passage_texts(train, tokenizer, settings.whiten, settings.seed)
            whitening = fit_whitening_on_texts(embedder, texts)
            whitening.save(output)
            add_whitening(embedder, whitening)
        if settings.export:
            export_sentence_transformer(embedder, output / EMBEDDER_FOLDER)
            result["embedder"] = str(output / EMBEDDER_FOLDER)
    trainer.accelerator.wait_for_everyone()
    return result

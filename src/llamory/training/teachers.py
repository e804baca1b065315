"""A teacher of short contexts: what a model predicts without memory stays what the teacher predicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from llamory.errors import LlamoryError
from llamory.longllama.losses import teacher_loss
from llamory.models import base as backbone
from llamory.training.settings import DistillationSettings


class Teacher:
    """Reads some rows of each batch without memory, beside the model that is trained.

    Args:
        model: a plain LLaMA; it is frozen.
        rows: of a batch that are read.
    """

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.model, self.rows = model.eval().requires_grad_(False), rows

    def loss(self, student: Any, batch: Mapping[str, Any], pass_index: int) -> Tensor:
        """Mean divergence of the student's predictions from the teacher's, in nats.

        Args:
            student: the LongLLaMA that is trained, wrapped or not.
            batch: its arguments; `input_ids` (rows, columns) and, if rows are padded, `attention_mask`.
            pass_index: which rows' pass_index it is.
        """
        ids = batch["input_ids"]
        mask = batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        row_indices = [(pass_index * self.rows + number) % len(ids) for number in range(min(self.rows, len(ids)))]
        ids, mask = ids[row_indices], mask[row_indices]
        with torch.no_grad():
            wanted = self.model.to(ids.device)(ids, attention_mask=mask, use_cache=False).logits
        # A last window of all columns: nothing of the row is in memory.
        student_logits = student(ids, attention_mask=mask, use_cache=False, last_context_length=ids.shape[1]).logits
        return teacher_loss(student_logits, wanted, mask)


def check_teacher(settings: DistillationSettings) -> None:
    """Refuse settings that no teacher can be had with.

    Raises:
        LlamoryError: no rows, or a negative weight.
    """
    if settings.teacher_rows < 1:
        raise LlamoryError(f"teacher_rows must be at least 1, not {settings.teacher_rows}.")
    if settings.teacher_weight < 0:
        raise LlamoryError(f"teacher_weight must be at least 0, not {settings.teacher_weight}.")


def load_teacher(settings: DistillationSettings, student: PretrainedConfig) -> Teacher | None:
    """The teacher that is wanted, if any.

    Args:
        settings: of the run.
        student: configuration of the model that is trained.

    Raises:
        LlamoryError: as `backbone.load_model`, or its vocabulary is another.
    """
    if settings.teacher is None or not settings.teacher_weight:
        return None
    config = backbone.load_config(settings.teacher)
    if config.vocab_size != student.vocab_size:
        raise LlamoryError(
            f"The teacher {settings.teacher} has {config.vocab_size:,} tokens, the model {student.vocab_size:,}; give "
            "a teacher with the same tokenizer."
        )
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    return Teacher(backbone.load_model(settings.teacher, dtype=dtype), settings.teacher_rows)

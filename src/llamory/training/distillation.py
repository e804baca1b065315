"""Distillation: a teacher of predictions without memory, and a retriever's losses with a teacher's scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import CachedLossMixin
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    DistillKLDivLoss,
    MarginMSELoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from llamory.errors import LlamoryError
from llamory.longllama.losses import teacher_loss
from llamory.models import base as backbone
from llamory.training.settings import MemorySettings, RetrieverSettings


class Teacher:
    """A frozen plain LLaMA whose predictions without memory the student keeps, on some rows of each batch."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        self.model, self.rows = model.eval().requires_grad_(False), rows

    def loss(self, student: Any, batch: Mapping[str, Any], pass_index: int) -> Tensor:
        """Mean divergence of the student's predictions from the teacher's, in nats; `pass_index` selects the rows.

        `batch` has `input_ids` (rows, columns) and, if rows are padded, `attention_mask`.
        """
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        rows = [(pass_index * self.rows + number) % len(ids) for number in range(min(self.rows, len(ids)))]
        ids, mask = ids[rows], mask[rows]
        with torch.no_grad():
            teacher_logits = self.model.to(ids.device)(ids, attention_mask=mask, use_cache=False).logits
        # The last window covers all columns, so nothing of the row is in memory.
        student_logits = student(ids, attention_mask=mask, use_cache=False, last_context_length=ids.shape[1]).logits
        return teacher_loss(student_logits, teacher_logits, mask)


def load_teacher(settings: MemorySettings, student: PretrainedConfig) -> Teacher | None:
    """Load the teacher that the settings name, if any; raises LlamoryError if it has another vocabulary."""
    if settings.teacher is None or not settings.teacher_weight:
        return None
    config = backbone.load_config(settings.teacher)
    if config.vocab_size != student.vocab_size:
        sizes = f"{config.vocab_size:,} tokens, the model {student.vocab_size:,}"
        raise LlamoryError(f"The teacher {settings.teacher} has {sizes}; give a teacher with the same tokenizer.")
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    return Teacher(backbone.load_model(settings.teacher, dtype=dtype), settings.teacher_rows)


def ranking_loss(
    embedder: SentenceTransformer, settings: RetrieverSettings, *, teacher: str, gather_across_devices: bool
) -> Any:
    """The loss of a retriever on in-batch and hard negatives; `teacher` is "kl", "margin_mse" or "off"."""
    common: dict[str, Any] = {"scale": 1 / settings.temperature, "gather_across_devices": gather_across_devices}
    loss: Any
    if settings.cache:
        loss = CachedMultipleNegativesRankingLoss(embedder, mini_batch_size=settings.mini_batch, **common)
    else:
        loss = MultipleNegativesRankingLoss(embedder, **common)
    if teacher != "off":
        loss = CachedDistillation(embedder, loss, settings, teacher)
    if settings.matryoshka:
        dimension = embedder.get_embedding_dimension()
        loss = MatryoshkaLoss(embedder, loss, sorted({*settings.matryoshka, dimension}, reverse=True))
    return loss


class CachedDistillation(CachedLossMixin, nn.Module):
    """Weighted sum of a loss on the teacher's scores of a query's documents and of the contrastive loss.

    "kl": Kullback-Leibler divergence of the model's distribution over the documents (cosine / temperature) from the
    teacher's (score / teacher_temperature). "margin_mse": squared error of the margin between positive and negatives,
    in cosine, against the teacher's margin in score / teacher_temperature.
    """

    model: Any
    contrastive_loss: Any
    distill: DistillKLDivLoss | MarginMSELoss

    def __init__(
        self, embedder: SentenceTransformer, contrastive_loss: Any, settings: RetrieverSettings, teacher: str
    ) -> None:
        super().__init__()
        self.model, self.contrastive_loss = embedder, contrastive_loss
        self.uses_gradient_cache, self.mini_batch_size = settings.cache, settings.mini_batch
        self.contrastive_weight, self.weight = settings.contrastive_weight, settings.distill_weight
        self.teacher_temperature = settings.teacher_temperature
        similarity = torch.nn.CosineSimilarity(dim=1)
        if teacher == "kl":
            temperatures = {"student_temperature": settings.temperature, "teacher_temperature": 1.0}
            self.distill = DistillKLDivLoss(embedder, similarity, **temperatures)
            # DistillKLDivLoss multiplies by the squared temperature; this undoes it.
            self.weight /= settings.temperature**2
        else:
            self.distill = MarginMSELoss(embedder, similarity)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings, as CachedLossMixin calls it; `with_backward` gives a detached loss.

        `reps` has a list of (mini-batch, dimension) per column, `labels` the teacher's (queries, documents) scores.
        """
        assert labels is not None
        embeddings = [torch.cat(parts) for parts in reps]
        loss = self.weight * self.distill.compute_loss_from_embeddings(embeddings, labels / self.teacher_temperature)
        if self.contrastive_weight:
            contrast: Any = self.contrastive_loss
            if isinstance(contrast, CachedMultipleNegativesRankingLoss):
                loss = loss + self.contrastive_weight * contrast.calculate_loss(reps)
            else:
                loss = loss + self.contrastive_weight * contrast.compute_loss_from_embeddings(embeddings, labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch; `labels` are the teacher's scores (queries, documents per query)."""
        if self.uses_gradient_cache:
            return self.forward_cached(sentence_features, labels)  # type: ignore[operator]
        reps = [[self.model(features)["sentence_embedding"]] for features in sentence_features]
        return self.calculate_loss(reps, labels)

    def get_config_dict(self) -> dict[str, Any]:
        """The entry of the model card."""
        return {"distillation": type(self.distill).__name__, "contrastive_weight": self.contrastive_weight}

"""Losses of a retriever: in-batch and hard negatives, a teacher's scores, several dimensions; the library's own."""

from __future__ import annotations

from collections.abc import Iterable
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

from llamory.training.settings import RetrieverSettings


def ranking_loss(
    embedder: SentenceTransformer, settings: RetrieverSettings, *, teacher: str, gather_across_devices: bool
) -> Any:
    """The loss that settings ask for.

    Args:
        embedder: the model.
        settings: of the run.
        teacher: "kl", "margin_mse" or "off".
        gather_across_devices: whether the documents of all processes are negatives of every query.
    """
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
    """A teacher's scores of each query's own documents, and contrast with all documents of the batch, weighted.

    "kl": Kullback-Leibler divergence of the model's distribution over the documents (cosine / temperature) from the
    teacher's (score / teacher_temperature). "margin_mse": squared error of the model's differences in cosine between
    positive and negatives, beside the teacher's differences in score / teacher_temperature.
    """

    def __init__(
        self,
        embedder: SentenceTransformer,
        contrast: CachedMultipleNegativesRankingLoss | MultipleNegativesRankingLoss,
        settings: RetrieverSettings,
        teacher: str,
    ) -> None:
        """Take the contrastive loss, cached or not, and what to weigh it with."""
        super().__init__()
        self.model: Any
        self.contrastive_loss: Any
        self.model, self.contrastive_loss = embedder, contrast
        self.uses_gradient_cache = settings.cache
        self.mini_batch_size = settings.mini_batch
        self.contrastive_weight, self.weight = settings.contrastive_weight, settings.distill_weight
        self.teacher_temperature = settings.teacher_temperature
        similarity = torch.nn.CosineSimilarity(dim=1)
        self.distill: DistillKLDivLoss | MarginMSELoss
        if teacher == "kl":
            self.distill = DistillKLDivLoss(
                embedder, similarity, student_temperature=settings.temperature, teacher_temperature=1.0
            )
            # The library multiplies with the temperature's square; what is meant is the divergence itself.
            self.weight /= settings.temperature**2
        else:
            self.distill = MarginMSELoss(embedder, similarity)

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """The loss of embeddings: one list per column, of (mini-batch, dimension) each; as the library asks for it."""
        assert labels is not None
        columns = [torch.cat(column) for column in reps]
        loss = self.weight * self.distill.compute_loss_from_embeddings(columns, labels / self.teacher_temperature)
        if self.contrastive_weight:
            loss = loss + self.contrastive_weight * self._contrastive_loss(reps, columns, labels)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def _contrastive_loss(self, reps: list[list[Tensor]], columns: list[Tensor], labels: Tensor) -> Tensor:
        if isinstance(self.contrastive_loss, CachedMultipleNegativesRankingLoss):
            return self.contrastive_loss.calculate_loss(reps)
        return self.contrastive_loss.compute_loss_from_embeddings(columns, labels)

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor) -> Tensor:
        """The loss of a batch's columns, whose labels are the teacher's scores (queries, documents per query)."""
        if self.uses_gradient_cache:
            return self.forward_cached(sentence_features, labels)  # type: ignore[operator]
        reps = [[self.model(features)["sentence_embedding"]] for features in sentence_features]
        return self.calculate_loss(reps, labels)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card tells of the loss."""
        return {"distillation": type(self.distill).__name__, "contrastive_weight": self.contrastive_weight}

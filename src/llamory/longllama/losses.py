"""The next-token loss, in chunks that avoid (length × vocabulary) logits, and the distillation loss."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
# Maximum bytes of a chunk's float32 logits, and its minimum rows, below which matrix products are slow.
_CHUNK_BYTES = 32 * 2**20
_MIN_CHUNK_ROWS = 128


def next_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor, count: Tensor | int | None = None) -> Tensor:
    """Mean next-token loss.

    Args:
        hidden: (..., hidden) last hidden states.
        weight: (vocabulary, hidden) of the output head.
        targets: (...) token ids to predict, -100 for none.
        count: divides the sum; by default the number of targets.
    """
    chunks = _chunks(hidden, weight, targets)
    num_targets = sum(len(target) for _, target in chunks)
    total = hidden.new_zeros((), dtype=torch.float32) if num_targets else hidden.sum() * 0.0
    for chunk, target in chunks:
        total = total + checkpoint(_chunk_loss, chunk, weight, target, use_reentrant=False)
    return total / (max(1, num_targets) if count is None else count)


def teacher_loss(logits: Tensor, teacher_logits: Tensor, mask: Tensor) -> Tensor:
    """Mean KL divergence of next-token distributions from a teacher's, in nats (Hinton et al. 2015).

    Args:
        logits: (batch, length, vocabulary) of the model.
        teacher_logits: the same shape, without gradient.
        mask: (batch, length), True where a distribution counts.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for row, teacher, real in zip(logits, teacher_logits, mask.bool(), strict=True):
        total = total + checkpoint(_kl_divergence, row[real], teacher[real], use_reentrant=False)
    return total / mask.sum().clamp(min=1)


@torch.no_grad()
def correct_tokens(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """How many targets have the highest logit; arguments as for `next_token_loss`."""
    chunks = _chunks(hidden, weight, targets)
    return torch.stack([(F.linear(chunk, weight).argmax(-1) == target).sum() for chunk, target in chunks]).sum()


def _chunks(hidden: Tensor, weight: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Hidden states and targets of the tokens with a target, some rows at a time; one empty chunk if there are none."""
    labelled, size = targets != IGNORE_INDEX, max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // (4 * len(weight)))
    return list(zip(hidden[labelled].split(size), targets[labelled].split(size), strict=True))


def _chunk_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), targets, reduction="sum")


def _kl_divergence(logits: Tensor, teacher_logits: Tensor) -> Tensor:
    log_probs, teacher_log_probs = logits.float().log_softmax(-1), teacher_logits.float().log_softmax(-1)
    return F.kl_div(log_probs, teacher_log_probs, reduction="sum", log_target=True)

"""The three losses of LLARA, computed in chunks: the (length × vocabulary) logits are never in memory at once.

Next token (AR): minus the mean log-probability of the passage tokens. Bag of words (BoW), per head (Li et al. 2023,
sections 3.2 and 3.3, EBAE and EBAR): logits at the slots, maximum over the slots, log-softmax over the vocabulary,
minus the mean over the distinct target ids; mean over the passages that have a target. A chunk's gradient is computed
together with its logits, so the backward pass needs no product with the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100
_CHUNK_BYTES = 32 * 2**20  # of a chunk's float32 logits
_MIN_CHUNK_ROWS = 128  # keeps matrix products efficient


@dataclass(frozen=True)
class BagOfWords:
    """One head's targets for B passages."""

    slots: Tensor  # (B, K) row of each slot in the hidden states
    targets: Tensor  # (B, T) target ids
    valid: Tensor  # (B, T) which of them count


def bag_of_words(slots: Tensor, targets: Tensor, ignored_ids: Tensor) -> BagOfWords:
    """Count each target id of a passage once; leave out padding (negative ids) and `ignored_ids` (I,)."""
    targets = targets.sort(dim=1).values
    valid = (targets >= 0) & ~torch.isin(targets, ignored_ids)
    valid[:, 1:] &= targets[:, 1:] != targets[:, :-1]
    return BagOfWords(slots, targets.clamp(min=0), valid)


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    weights: Tensor,
    rows: Tensor,
    labels: Tensor,
    counts: Tensor,
    summarize: BagOfWords | None = None,
    predict: BagOfWords | None = None,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of the three losses, and each of them.

    Args:
        hidden: (N, hidden) last hidden states.
        weight: (vocabulary, hidden) of the output head.
        weights: (3,) factors of the AR, summary and prediction loss in the sum.
        rows: (M,) rows of `hidden` that predict a passage token.
        labels: (M,) the tokens they should predict.
        counts: (3,) what each loss's sum is divided by: passage tokens, passages with a summary target, passages with
            a prediction target. Zero leaves that loss out.

    Returns:
        The sum, differentiable in `hidden`, `weight` and `weights`, and the three losses (3,) as plain values.
    """
    # Inside a Function gradients are off and `needs_input_grad` ignores no_grad, so the mode is asked for here.
    return _HeadLosses.apply(  # type: ignore[no-untyped-call]
        hidden, weight, weights, rows, labels, counts, summarize, predict, torch.is_grad_enabled()
    )


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        hidden, weight, weights, rows, labels, counts, summarize, predict, needs_grad = inputs
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        with torch.autocast(device, enabled=False):
            head = _Head(hidden, weight, dtype, *(needs_grad and needed for needed in ctx.needs_input_grad[:2]))
            # Dividing by the count first keeps the factors on the device.
            scale = torch.where(counts > 0, 1 / counts.clamp(min=1), 0.0).float()
            losses = [head.next_token(rows, labels, weights[0] * scale[0])]
            for i, bag in enumerate((summarize, predict), start=1):
                losses.append(head.bag_of_words(bag, weights[i] * scale[i]) if bag is not None else scale[i] * 0)
            means = torch.stack(losses) * scale
            ctx.save_for_backward(head.grad_hidden, head.grad_weight, means)
            ctx.weight_dtype = weight.dtype
            ctx.mark_non_differentiable(means)
            return (weights.float() * means).sum(), means

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _grad_means: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight, means = ctx.saved_tensors
        # Scaled in place: a second backward pass isn't supported.
        for gradient in (grad_hidden, grad_weight):
            if gradient is not None:
                gradient.mul_(grad_total.to(gradient.dtype))
        grad_weight = None if grad_weight is None else grad_weight.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, grad_total * means, *[None] * 6


class _Head:
    """The output head and its gradients, accumulated chunk by chunk in reused buffers."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, dtype: torch.dtype, needs_hidden_grad: bool, needs_weight_grad: bool
    ):
        self.hidden, self.dtype = hidden, dtype
        self.weight = weight.to(dtype)
        self.needs_grad = needs_hidden_grad or needs_weight_grad
        self.grad_hidden = torch.zeros_like(hidden) if needs_hidden_grad else None
        # Chunks are summed in float32, whatever the dtype of the products.
        self.grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight_grad else None
        self.chunk = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // (4 * weight.shape[0]))
        self._buffers: dict[str, Tensor] = {}

    def _buffer(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, vocabulary); allocating it anew takes as long as the product that fills it."""
        if name not in self._buffers or len(self._buffers[name]) < rows:
            self._buffers[name] = self.hidden.new_empty(rows, len(self.weight), dtype=dtype)
        return self._buffers[name][:rows]

    def _logits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states of the rows, and their logits."""
        chunk = self.hidden.index_select(0, rows).to(self.dtype)
        return chunk, torch.mm(chunk, self.weight.T, out=self._buffer("logits", len(rows), self.dtype))

    def next_token(self, rows: Tensor, labels: Tensor, factor: Tensor) -> Tensor:
        """Sum of the next-token losses; gradients are scaled by `factor`."""
        total = self.hidden.new_zeros((), dtype=torch.float32)
        for part, label in zip(rows.split(self.chunk), labels.split(self.chunk), strict=True):
            chunk, logits = self._logits(part)
            target_logits = logits.gather(1, label[:, None]).squeeze(1).float()
            # The CPU's softmax reads a whole row before it writes it, so it can work in place.
            reuse_logits = logits.dtype == torch.float32 and logits.device.type == "cpu"
            gradient = logits if reuse_logits else self._buffer("gradient", len(part), torch.float32)
            log_norm = _softmax(logits, gradient)
            total += (log_norm - target_logits).sum()
            if self.needs_grad:
                gradient.scatter_(1, label[:, None], (target_logits - log_norm).exp()[:, None] - 1)
                self._add_gradient(gradient, chunk, part, factor)
        return total

    def bag_of_words(self, bag: BagOfWords, factor: Tensor) -> Tensor:
        """Sum of one head's bag-of-words losses over the passages; gradients are scaled by `factor`."""
        total = self.hidden.new_zeros((), dtype=torch.float32)
        size = max(1, self.chunk // bag.slots.shape[1])
        target_weights = bag.valid / bag.valid.sum(1, keepdim=True).clamp(min=1)
        for slots, targets, weights in zip(
            bag.slots.split(size), bag.targets.split(size), target_weights.split(size), strict=True
        ):
            rows = slots.flatten()
            chunk, logits = self._logits(rows)
            max_logits, argmax_slots = logits.view(*slots.shape, -1).max(dim=1)
            probability = torch.empty_like(max_logits, dtype=torch.float32)
            log_norm = _softmax(max_logits, probability)
            has_target = (weights > 0).any(1)
            target_logits = (max_logits.gather(1, targets).float() * weights).sum(1)
            total += ((log_norm - target_logits) * has_target).sum()
            if self.needs_grad:
                vocabulary_gradient = probability.mul_(has_target[:, None]).scatter_add_(1, targets, -weights)
                # Only the slot with the maximum gets the gradient of a word.
                gradient = self._buffer("gradient", len(rows), torch.float32).zero_()
                gradient.view(*slots.shape, -1).scatter_(1, argmax_slots[:, None], vocabulary_gradient[:, None])
                self._add_gradient(gradient, chunk, rows, factor)
        return total

    def _add_gradient(self, gradient: Tensor, chunk: Tensor, rows: Tensor, factor: Tensor) -> None:
        """Propagate the gradient of a chunk's logits to hidden states and weight."""
        # `factor` scales the small operands, so the probabilities stay well inside the range of bfloat16.
        if self.dtype != torch.float32:
            gradient = self._buffer("logits", len(rows), self.dtype).copy_(gradient)  # the logits are no longer needed
        if self.grad_hidden is not None:
            update = (gradient @ self.weight).float() * factor
            self.grad_hidden.index_add_(0, rows, update.to(self.grad_hidden.dtype))
        if self.grad_weight is not None:
            scaled = (chunk.float() * factor).to(self.dtype)
            if self.dtype == torch.float32:
                self.grad_weight.addmm_(gradient.T, scaled)
            else:
                self.grad_weight += gradient.T @ scaled


def _softmax(logits: Tensor, out: Tensor) -> Tensor:
    """Softmax over the last dimension into `out` (float32, may be `logits`); returns the log of its normalizer."""
    max_logit = logits.amax(-1).float()
    torch.softmax(logits, dim=-1, dtype=torch.float32, out=out)
    return max_logit - out.amax(-1).log()  # the greatest probability never underflows

"""Estimates of what tokens contribute that aren't read, from the mean and the variance of their keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scores of a page's tokens vary less than the sum over its keys' channels says, as channels go together.
VARIANCE_SCALE = 0.7
# Largest score of a page above its mean, in units of what it would be with normally distributed scores.
MAX_SCORE_SCALE = 1.1


def score_moments(query: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the scores of queries (..., queries, head_dim) over pages (..., pages, head_dim)."""
    return query @ means.transpose(-1, -2), query.square() @ variances.transpose(-1, -2)


def log_sum_exp(mean: Tensor, variance: Tensor, count: int | Tensor) -> Tensor:
    """Estimated logarithm of the sum of exp(score) over the `count` tokens of a page.

    For a normal distribution it is log(count) + mean + variance / 2; a page's few scores have no such long tail as
    large variances promise, so the correction grows slower there.
    """
    variance = variance * VARIANCE_SCALE
    return (mean + _log(count)).addcdiv_(variance, variance / 8 + 2)


def log_error_bound(mean: Tensor, variance: Tensor, count: int | Tensor) -> Tensor:
    """Logarithm of the error that not reading a page may bring: the root of its expected sum of exp(2 * score).

    Tokens of a page that isn't read get the same share each instead of their own, and their values go each its own
    way. For normally distributed scores that sum is count * exp(2 * mean + 2 * variance), but no score is larger than
    the largest of so many.
    """
    log_count = _log(count)
    largest = variance.sqrt().mul_((2 * log_count) ** 0.5 * MAX_SCORE_SCALE)
    return torch.minimum(largest, variance + log_count / 2, out=largest).add_(mean)


def softmax_shares(estimates: Tensor, lse: Tensor) -> Tensor:
    """Share of each page (..., queries, pages) in a log-sum-exp (..., queries), 0 where that is -inf; in place."""
    return estimates.sub_(lse.clamp_min(torch.finfo(torch.float32).min).unsqueeze(-1)).exp_()


def _log(count: int | Tensor) -> float | Tensor:
    return count.log() if isinstance(count, Tensor) else math.log(count)

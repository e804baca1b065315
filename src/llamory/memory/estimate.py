"""Estimates of what tokens contribute that aren't read, from the mean and the variance of their keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Scores of a page's tokens vary less than the sum over its keys' channels says, as channels go together.
VARIANCE_SHARE = 0.7


def score_moments(query: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the scores of queries (..., queries, head_dim) over pages (..., pages, head_dim)."""
    return query @ means.transpose(-1, -2), query.square() @ variances.transpose(-1, -2) * VARIANCE_SHARE


def log_mean_exp(mean: Tensor, variance: Tensor) -> Tensor:
    """Estimated logarithm of the mean of exp(score) over a page.

    For a normal distribution it is mean + variance / 2; a page's few scores have no such long tail as large variances
    promise, so the correction grows slower there.
    """
    return mean + variance / (2 + variance / 8)


def expected_error(mean: Tensor, variance: Tensor, count: int, whole: Tensor) -> Tensor:
    """Square of the output's expected error, as a share of the values' size, through pages that aren't read.

    It is the expected sum of the tokens' squared shares, count * exp(2 * mean + 2 * variance) / exp(2 * whole) for
    normally distributed scores, as the values go each its own way. A page's largest score bounds it.

    Args:
        mean, variance: of the scores, (..., queries, pages); -inf as the mean of pages that are read.
        count: tokens per page.
        whole: log-sum-exp of the whole attention, (..., queries).
    """
    variance = variance / VARIANCE_SHARE * ERRVAR
    log_count = math.log(count)
    squares = torch.minimum(log_count + 2 * variance, variance.sqrt() * (2 * ZF* math.sqrt(2 * log_count)))
    return (2 * (mean - whole.unsqueeze(-1)) + squares).logsumexp(-1)

ERRVAR=1.0
ZF=1.0

def weigh(estimates: Tensor) -> tuple[Tensor, Tensor]:
    """Shares of each page in what isn't read (0 if that is nothing), and its log-sum-exp."""
    log_sum = estimates.logsumexp(-1)
    return (estimates - log_sum.clamp_min(torch.finfo(torch.float32).min).unsqueeze(-1)).exp(), log_sum

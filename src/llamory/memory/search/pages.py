"""Search by pages: the best pages of like keys are read exactly, all other pages through their means.

Per key-value head and group of queries: superpages are judged by the estimated sum of their keys' exponentials, the
best are superpage_ids, their pages are judged alike, and the best pages are read. Chapters and pages that aren't read keep
their estimated share, with the mean of their values. Queries whose estimate itself says that it may be far off read
everything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.memory.attention import empty_attention, flash, merge
from llamory.memory.blocks import Span
from llamory.memory.search.clustering import balanced_pca_partition
from llamory.memory.search.estimates import log_error_bound, log_sum_exp, score_moments, softmax_shares
from llamory.memory.search.exact import (
    TOLERANCE,
    AttentionResult,
    attend_spans,
    group_heads,
    refine_uncertain,
    ungroup_heads,
)
from llamory.memory.search.page_index import LayerPageIndex, get_or_build_index
from llamory.memory.search.page_segments import PAGE_SIZE, PAGES_PER_SUPERPAGE, SUPERPAGE_SIZE

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

DEFAULT_PAGES = 32
GROUP_SIZE = 64  # queries of a row, at most, that share the pages they read
MAX_SHARED_QUERIES = 192  # queries that are few enough to share all they read: a question's, in heads that share keys
EXACT_TOKENS = 8192  # up to so many, a window of queries reads everything faster than it finds pages
GROUP_PAGES = 2  # times the pages of one query are read by a group, and twice as many by a question
MIN_SUPERPAGES = 64  # at least
MAX_ESTIMATES = 1 << 19  # made at once, so that they stay in the processor's cache
TOLERANCE_SCALE_TOKENS = 16384  # in a memory of more, the tolerance grows in proportion
MAX_LOG_ERROR = 40.0  # logarithm, so that sums stay finite
MAX_GATHERED_ELEMENTS = 1 << 21  # page_ids of keys, and of values, that are gathered at once


class PagesSearch:
    """Reads the best pages of a memory.

    Args:
        top_k: pages (of 32 tokens) that one query reads per head; a group of queries softmax_shares twice as many.
        tolerance: expected error of the output, as a share of the values' size, from which a query reads everything,
            in memories of up to `TOLERANCE_SCALE_TOKENS` tokens. Expected is the worst, so several times the usual error.
    """

    def __init__(self, top_k: int | None = None, tolerance: float = TOLERANCE):
        self.top_k = DEFAULT_PAGES if top_k is None else top_k
        self.tolerance = tolerance

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`."""
        return self.attend_with_stats(query, bank, layer, scaling)[:2]

    def attend_with_stats(
        self, query: Tensor, bank: MemoryBank, layer: int, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend`, and the log-sum-exp of the tokens that were read, to see what was found."""
        spans = bank.spans(layer)
        if not spans or query.numel() == 0:
            output, lse = empty_attention(query)
            return output, lse, lse
        grouped_query = group_heads(query, spans[0].block.keys.shape[0])
        parts = []
        for device in {span.block.keys.device for span in spans}:
            device_spans = [span for span in spans if span.block.keys.device == device]
            found = self._attend(grouped_query.to(device), device_spans, scaling, len(query))
            parts.append([tensor.to(query.device) for tensor in found])
        outputs, lses, read_lses = zip(*parts, strict=True)
        output, lse = ungroup_heads(*merge(outputs, lses), query)
        return output, lse, ungroup_heads(outputs[0], torch.stack(read_lses).logsumexp(0), query)[1]

    def _attend(self, query: Tensor, spans: list[Span], scaling: float, rows: int) -> AttentionResult:
        page_index, rest = get_or_build_index(spans)
        if (
            page_index is None
            or self.top_k >= page_index.page_count
            or (query.shape[1] // rows > GROUP_SIZE and page_index.page_count * PAGE_SIZE <= EXACT_TOKENS)
        ):
            output, lse = attend_spans(query, spans, scaling)
            return AttentionResult(output, lse, lse)
        heads, queries, head_dim = query.shape
        query = query.float()
        order = _groups(query, rows)
        groups, size = order.shape[1:]
        at = order.view(heads, -1)
        grouped = query.gather(1, _expand_head_dim(at, head_dim)).mul_(scaling).view(heads, groups, size, head_dim)
        rest_output, rest_lse = attend_spans(grouped.view(heads, -1, head_dim), rest, 1.0)
        rest_lse = rest_lse.view(heads, groups, size)
        step = max(1, MAX_ESTIMATES // (heads * size * page_index.superpages[0].shape[1]))
        parts = [
            self._search(grouped[:, start : start + step], page_index, rest_lse[:, start : start + step])
            for start in range(0, groups, step)
        ]
        exact_output, exact_lse, estimated, estimated_lse, log_error = (
            tensors[0] if groups <= step else torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)
        )
        result, lse = merge(
            (rest_output.view_as(grouped), exact_output, estimated), (rest_lse, exact_lse, estimated_lse)
        )
        sums = torch.stack([lse, torch.logaddexp(rest_lse, exact_lse), (log_error - lse).exp_()])
        output = torch.empty_like(query).scatter_(1, _expand_head_dim(at, head_dim), result.view(heads, -1, head_dim))
        lse, read_lse, error = query.new_empty(3, heads, queries).scatter_(
            2, at.expand(3, -1, -1), sums.view(3, heads, -1)
        )
        # What reading everything costs grows with the memory; what it mends doesn't.
        tolerance = self.tolerance * max(1.0, page_index.page_count * PAGE_SIZE / TOLERANCE_SCALE_TOKENS)
        return refine_uncertain(AttentionResult(output, lse, read_lse), error, tolerance, query, rows, spans, scaling)

    def _search(self, query: Tensor, page_index: LayerPageIndex, other_lse: Tensor) -> tuple[Tensor, ...]:
        """Attention of groups of scaled queries to a page_index.

        Args:
            query: (kv_heads, groups, size, head_dim).
            page_index: what to search.
            other_lse: log-sum-exp of what the queries see besides, (kv_heads, groups, size).

        Returns:
            Output and log-sum-exp of what is read, those of what is estimated, and the logarithm of the error that
            the estimate may have, not yet divided by the total_lse sum.
        """
        heads, groups, size, head_dim = query.shape
        num_pages = self.top_k * min(size, GROUP_PAGES if size <= GROUP_SIZE else 2 * GROUP_PAGES)
        means, variances, values = page_index.superpages
        count = means.shape[1]
        flat = query.reshape(heads, -1, head_dim)
        mean, variance = (moment.view(heads, groups, size, -1) for moment in score_moments(flat, means, variances))
        superpages = log_sum_exp(mean, variance, SUPERPAGE_SIZE)
        total_lse = torch.logaddexp(superpages.logsumexp(-1), other_lse)
        errors = _relative_errors(log_error_bound(mean, variance, SUPERPAGE_SIZE), total_lse)
        superpage_ids = _select_top(errors, min(count, max(MIN_SUPERPAGES, num_pages)))
        _mask_out(superpage_ids, superpages, errors)

        means, variances, page_values = page_index.superpage_tables(superpage_ids).split(head_dim, -1)
        mean, variance = score_moments(query, means, variances)
        pages, page_errors = (
            log_sum_exp(mean, variance, PAGE_SIZE),
            _relative_errors(log_error_bound(mean, variance, PAGE_SIZE), total_lse),
        )
        page_choices = _select_top(page_errors, min(pages.shape[3], num_pages))
        _mask_out(page_choices, pages, page_errors)
        page_ids = (
            superpage_ids.gather(2, page_choices // PAGES_PER_SUPERPAGE) * PAGES_PER_SUPERPAGE
            + page_choices % PAGES_PER_SUPERPAGE
        )

        estimated_lse = torch.logaddexp(superpages.logsumexp(-1), pages.logsumexp(-1))
        superpage_weights, page_weights = (
            softmax_shares(superpages, estimated_lse),
            softmax_shares(pages, estimated_lse),
        )
        estimated = (superpage_weights.view(heads, -1, count) @ values).view(query.shape) + page_weights @ page_values
        log_error = torch.hypot(torch.linalg.vector_norm(errors, dim=-1), torch.linalg.vector_norm(page_errors, dim=-1))
        return *_read_pages(query, page_index, page_ids), estimated, estimated_lse, log_error.log() + total_lse


def _groups(query: Tensor, rows: int) -> Tensor:
    """Which queries read pages together: their page_ids, (kv_heads, groups, size); some may stand there twice.

    Groups are made row by row, so that no row's result depends on the others.
    """
    heads, queries, head_dim = query.shape
    per_row = queries // rows
    row_offsets = torch.arange(rows, device=query.device).unsqueeze(1) * per_row
    if per_row <= MAX_SHARED_QUERIES:
        within = torch.arange(per_row, device=query.device).expand(heads * rows, 1, -1)
    else:
        # Queries that are alike want the same pages; neighbouring ones much less so.
        groups = 1 << math.ceil(math.log2(per_row / GROUP_SIZE))
        size = -(-per_row // groups)
        padded = torch.arange(size * groups, device=query.device).clamp_max_(per_row - 1)
        within = padded[balanced_pca_partition(query.view(heads * rows, per_row, head_dim)[:, padded], size)].view(
            -1, groups, size
        )
    return (within.unflatten(0, (heads, rows)) + row_offsets.unsqueeze(1)).flatten(1, 2)


def _relative_errors(errors: Tensor, total_lse: Tensor) -> Tensor:
    """Risks (kv_heads, groups, size, pages), given as logarithms, as softmax_shares of the total_lse attention; in place."""
    return errors.sub_(total_lse.unsqueeze(-1)).clamp_max_(MAX_LOG_ERROR).exp_()


def _select_top(errors: Tensor, count: int) -> Tensor:
    """The pages (kv_heads, groups, count) that it would cost a group most not to read."""
    return errors.sum(2).topk(count, -1, sorted=False).indices


def _mask_out(page_ids: Tensor, estimates: Tensor, errors: Tensor) -> None:
    """Pages (kv_heads, groups, count) that are read have no estimate (kv_heads, groups, size, pages) and no log_error."""
    at = page_ids.unsqueeze(2).expand(-1, -1, errors.shape[2], -1)
    estimates.scatter_(3, at, -torch.inf)
    errors.scatter_(3, at, 0)


def _read_pages(query: Tensor, page_index: LayerPageIndex, page_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Exact attention of groups of scaled queries to their pages (kv_heads, groups, pages)."""
    heads, groups, size, head_dim = query.shape
    tokens = page_ids.shape[2] * PAGE_SIZE
    step = max(1, MAX_GATHERED_ELEMENTS // (heads * tokens * head_dim))
    parts = []
    for start in range(0, groups, step):
        part = query[:, start : start + step].reshape(1, -1, size, head_dim)
        tensors = page_index.gather(page_ids[:, start : start + step])
        key, value = (tensor.view(1, -1, tokens, head_dim) for tensor in tensors)
        output, lse = flash(part, key, value, scaling=1.0)
        parts.append((output.view(heads, -1, size, head_dim), lse.view(heads, -1, size)))
    if len(parts) == 1:
        return parts[0]
    output, lse = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return output, lse


def _expand_head_dim(at: Tensor, head_dim: int) -> Tensor:
    return at.unsqueeze(-1).expand(-1, -1, head_dim)

"""Search by pages: the best pages of similar keys are read exactly, all other pages through their means.

Per key-value head and group of queries: superpages are ranked by the estimated error of not reading them, the best are
opened, their pages are ranked alike, and the best pages are read. Superpages and pages that aren't read keep their
estimated weight with the mean of their values. Queries whose expected error is large read everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from llamory.memory.blocks import SpanList
from llamory.memory.search import base, page_index
from llamory.memory.search.base import AttentionResult, Search, flash, in_steps, merge, merge_results, softmax_weights
from llamory.memory.search.exact import TOLERANCE, attend_spans, refine_uncertain
from llamory.memory.search.page_index import PAGE_SIZE, PAGES_PER_SUPERPAGE, SUPERPAGE_SIZE, LayerPageIndex

GROUP_SIZE = 64  # queries of a row, at most, that read the same pages
MAX_SHARED_QUERIES = 192  # up to so many queries of a row form one group: a question's, in heads that share keys
EXACT_TOKENS = 8192  # up to so many, a window of queries reads everything faster than it finds pages
GROUP_PAGES = 2  # a group reads this times the pages of one query, a larger group twice as many
MIN_SUPERPAGES = 64  # superpages that are opened, at least
MAX_ESTIMATES = 1 << 19  # computed at once, so that they stay in the processor's cache
TOLERANCE_SCALE_TOKENS = 16384  # in a memory of more tokens the tolerance grows in proportion
MAX_LOG_ERROR = 40.0  # keeps sums of exponentials finite
MAX_GATHERED_ELEMENTS = 1 << 21  # numbers of keys, and of values, that are gathered at once


class PagesSearch(Search):
    """Reads the `top_k` best pages (of 32 tokens) of each query and head; a group of queries reads twice as many.

    `tolerance`, of the expected worst error, holds for memories of up to `TOLERANCE_SCALE_TOKENS` tokens.
    """

    default_top_k, default_tolerance = 32, TOLERANCE

    def attend_grouped(self, query: Tensor, spans: SpanList, scaling: float, rows: int) -> AttentionResult:
        """See `Search.attend_grouped`."""
        results = []
        for device, device_spans in spans.by_device.items():
            result = self._attend(query.to(device), device_spans, scaling, rows)
            results.append(AttentionResult(*(part.to(query.device) for part in result)))
        return merge_results(results)

    def _attend(self, query: Tensor, spans: SpanList, scaling: float, rows: int) -> AttentionResult:
        """Attention to spans on the query's device."""
        index, rest = page_index.get_or_build_index(spans)
        if (
            index is None
            or self.top_k >= index.page_count
            or (query.shape[1] // rows > GROUP_SIZE and index.page_count * PAGE_SIZE <= EXACT_TOKENS)
        ):
            output, lse = attend_spans(query, spans, scaling)
            return AttentionResult(output, lse, lse)
        heads, queries, head_dim = query.shape
        query = query.float()
        order = _groups(query, rows)  # (kv_heads, groups, size)
        groups, size = order.shape[1:]
        indices = order.view(heads, -1)
        grouped = query.gather(1, _expand(indices, head_dim)).mul_(scaling).view(heads, groups, size, head_dim)
        rest_output, rest_lse = attend_spans(grouped.view(heads, -1, head_dim), rest, 1.0)
        rest_lse = rest_lse.view(heads, groups, size)
        step = MAX_ESTIMATES // (heads * size * index.superpages[0].shape[1])
        parts = in_steps(lambda *parts: self._search(index, *parts), step, grouped, rest_lse)
        read_output, read_lse, estimated, estimated_lse, log_error = parts
        result, lse = merge((rest_output.view_as(grouped), read_output, estimated), (rest_lse, read_lse, estimated_lse))
        sums = torch.stack([lse, torch.logaddexp(rest_lse, read_lse), (log_error - lse).exp_()])
        # Back from groups to the queries' order; a query may be in a group twice.
        output = torch.empty_like(query).scatter_(1, _expand(indices, head_dim), result.view(heads, -1, head_dim))
        sums = sums.view(3, heads, -1)
        lse, read_lse, error = query.new_empty(3, heads, queries).scatter_(2, indices.expand(3, -1, -1), sums)
        # The cost of reading everything grows with the memory, its benefit doesn't.
        tolerance = self.tolerance * max(1.0, index.page_count * PAGE_SIZE / TOLERANCE_SCALE_TOKENS)
        return refine_uncertain(AttentionResult(output, lse, read_lse), error, tolerance, query, rows, spans, scaling)

    def _search(self, index: LayerPageIndex, query: Tensor, other_lse: Tensor) -> tuple[Tensor, ...]:
        """Attention of groups of scaled queries (kv_heads, groups, size, head_dim) to the pages of an index.

        `other_lse` (kv_heads, groups, size) is that of the tokens in no page. Returns output and log-sum-exp of the
        pages that are read, those of the estimated ones, and the log of the estimate's error times the softmax's sum.
        """
        heads, groups, size, head_dim = query.shape
        num_pages = self.top_k * min(size, GROUP_PAGES if size <= GROUP_SIZE else 2 * GROUP_PAGES)
        means, variances, values = index.superpages
        count = means.shape[1]
        moments = base.score_moments(query.reshape(heads, -1, head_dim), means, variances)
        mean, variance = (moment.view(heads, groups, size, -1) for moment in moments)
        superpages = base.log_sum_exp(mean, variance, SUPERPAGE_SIZE)  # (kv_heads, groups, size, superpages)
        total_lse = torch.logaddexp(superpages.logsumexp(-1), other_lse)
        errors = _relative_errors(base.log_error_bound(mean, variance, SUPERPAGE_SIZE), total_lse)
        superpage_ids = _select_top(errors, min(count, max(MIN_SUPERPAGES, num_pages)))
        _mask_out(superpage_ids, superpages, errors)

        means, variances, page_values = index.superpage_tables(superpage_ids).split(head_dim, -1)
        mean, variance = base.score_moments(query, means, variances)
        pages = base.log_sum_exp(mean, variance, PAGE_SIZE)  # (kv_heads, groups, size, pages of the opened superpages)
        page_errors = _relative_errors(base.log_error_bound(mean, variance, PAGE_SIZE), total_lse)
        selected = _select_top(page_errors, min(pages.shape[3], num_pages))
        _mask_out(selected, pages, page_errors)
        page_ids = superpage_ids.gather(2, selected // PAGES_PER_SUPERPAGE) * PAGES_PER_SUPERPAGE
        page_ids += selected % PAGES_PER_SUPERPAGE

        estimated_lse = torch.logaddexp(superpages.logsumexp(-1), pages.logsumexp(-1))
        superpage_weights, page_weights = (softmax_weights(each, estimated_lse) for each in (superpages, pages))
        estimated = (superpage_weights.view(heads, -1, count) @ values).view(query.shape) + page_weights @ page_values
        log_error = torch.hypot(torch.linalg.vector_norm(errors, dim=-1), torch.linalg.vector_norm(page_errors, dim=-1))
        return *_read_pages(query, index, page_ids), estimated, estimated_lse, log_error.log() + total_lse


def _groups(query: Tensor, rows: int) -> Tensor:
    """The indices (kv_heads, groups, size) of queries that read pages together, row by row; some occur twice."""
    heads, queries, head_dim = query.shape
    per_row = queries // rows
    row_offsets = torch.arange(rows, device=query.device).unsqueeze(1) * per_row
    if per_row <= MAX_SHARED_QUERIES:
        within = torch.arange(per_row, device=query.device).expand(heads * rows, 1, -1)
    else:
        # Similar queries need the same pages, adjacent ones much less so.
        groups = 1 << math.ceil(math.log2(per_row / GROUP_SIZE))
        size = -(-per_row // groups)
        padded = torch.arange(size * groups, device=query.device).clamp_max_(per_row - 1)
        order = page_index.balanced_pca_partition(query.view(heads * rows, per_row, head_dim)[:, padded], size)
        within = padded[order].view(-1, groups, size)
    return (within.unflatten(0, (heads, rows)) + row_offsets.unsqueeze(1)).flatten(1, 2)


def _relative_errors(log_errors: Tensor, total_lse: Tensor) -> Tensor:
    """Errors (kv_heads, groups, size, pages) relative to the whole softmax, given as logs; in place."""
    return log_errors.sub_(total_lse.unsqueeze(-1)).clamp_max_(MAX_LOG_ERROR).exp_()


def _select_top(errors: Tensor, count: int) -> Tensor:
    """The pages (kv_heads, groups, count) with the largest error summed over a group's queries."""
    return errors.sum(2).topk(count, -1, sorted=False).indices


def _mask_out(page_ids: Tensor, estimates: Tensor, errors: Tensor) -> None:
    """Remove pages (kv_heads, groups, count) from estimates and errors (kv_heads, groups, size, pages)."""
    indices = page_ids.unsqueeze(2).expand(-1, -1, errors.shape[2], -1)
    estimates.scatter_(3, indices, -torch.inf)
    errors.scatter_(3, indices, 0)


def _read_pages(query: Tensor, index: LayerPageIndex, page_ids: Tensor) -> Sequence[Tensor]:
    """Exact attention of groups of scaled queries to their pages (kv_heads, groups, pages)."""
    heads, _, size, head_dim = query.shape
    tokens = page_ids.shape[2] * PAGE_SIZE

    def attention(query: Tensor, page_ids: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (tensor.view(1, -1, tokens, head_dim) for tensor in index.gather(page_ids))
        output, lse = flash(query.reshape(1, -1, size, head_dim), key, value, scaling=1.0)
        return output.view(heads, -1, size, head_dim), lse.view(heads, -1, size)

    return in_steps(attention, MAX_GATHERED_ELEMENTS // (heads * tokens * head_dim), query, page_ids)


def _expand(indices: Tensor, head_dim: int) -> Tensor:
    return indices.unsqueeze(-1).expand(-1, -1, head_dim)

"""Search by pages: the best pages of like keys are read exactly, all other pages through their means.

Per key-value head and group of queries: chapters are judged by the estimated sum of their keys' exponentials, the
best are opened, their pages are judged alike, and the best pages are read. Chapters and pages that aren't read keep
their estimated share, with the mean of their values. Queries whose estimate itself says that it may be far off read
everything.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.memory.attention import flash, merge, nothing
from llamory.memory.blocks import Span
from llamory.memory.search.clustering import alike
from llamory.memory.search.estimates import log_sum_exp, potential, score_moments, shares
from llamory.memory.search.exact import TOLERANCE, Found, fold, read, read_uncertain, unfold
from llamory.memory.search.page_index import Volume, volume_of
from llamory.memory.search.page_segments import CHAPTER, CHAPTER_PAGES, PAGE

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

DEFAULT_PAGES = 32
GROUP = 64  # queries of a row, at most, that share the pages they read
QUESTION = 192  # queries that are few enough to share all they read: a question's, in heads that share keys
EXACT_TOKENS = 8192  # up to so many, a window of queries reads everything faster than it finds pages
GROUP_PAGES = 2  # times the pages of one query are read by a group, and twice as many by a question
OPENED_CHAPTERS = 64  # at least
ESTIMATES = 1 << 19  # made at once, so that they stay in the processor's cache
TOLERATED_TOKENS = 16384  # in a memory of more, the tolerance grows in proportion
LARGEST_RISK = 40.0  # logarithm, so that sums stay finite
GATHERED = 1 << 21  # numbers of keys, and of values, that are gathered at once


class PagesSearch:
    """Reads the best pages of a memory.

    Args:
        top_k: pages (of 32 tokens) that one query reads per head; a group of queries shares twice as many.
        tolerance: expected error of the output, as a share of the values' size, from which a query reads everything,
            in memories of up to `TOLERATED_TOKENS` tokens. Expected is the worst, so several times the usual error.
    """

    def __init__(self, top_k: int | None = None, tolerance: float = TOLERANCE):
        self.top_k = DEFAULT_PAGES if top_k is None else top_k
        self.tolerance = tolerance

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`."""
        return self.attend_and_tell(query, bank, layer, scaling)[:2]

    def attend_and_tell(
        self, query: Tensor, bank: MemoryBank, layer: int, scaling: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend`, and the log-sum-exp of the tokens that were read, to see what was found."""
        spans = bank.spans(layer)
        if not spans or query.numel() == 0:
            output, log_sum = nothing(query)
            return output, log_sum, log_sum
        folded = fold(query, spans[0].block.keys.shape[0])
        parts = []
        for device in {span.block.keys.device for span in spans}:
            here = [span for span in spans if span.block.keys.device == device]
            found = self._attend(folded.to(device), here, scaling, len(query))
            parts.append([tensor.to(query.device) for tensor in found])
        outputs, log_sums, read_sums = zip(*parts, strict=True)
        output, log_sum = unfold(*merge(outputs, log_sums), query)
        return output, log_sum, unfold(outputs[0], torch.stack(read_sums).logsumexp(0), query)[1]

    def _attend(self, query: Tensor, spans: list[Span], scaling: float, rows: int) -> Found:
        volume, rest = volume_of(spans)
        if (
            volume is None
            or self.top_k >= volume.page_count
            or (query.shape[1] // rows > GROUP and volume.page_count * PAGE <= EXACT_TOKENS)
        ):
            output, log_sum = read(query, spans, scaling)
            return Found(output, log_sum, log_sum)
        heads, queries, head_dim = query.shape
        query = query.float()
        order = _groups(query, rows)
        groups, size = order.shape[1:]
        at = order.view(heads, -1)
        grouped = query.gather(1, _wide(at, head_dim)).mul_(scaling).view(heads, groups, size, head_dim)
        beside, beside_sum = read(grouped.view(heads, -1, head_dim), rest, 1.0)
        beside_sum = beside_sum.view(heads, groups, size)
        step = max(1, ESTIMATES // (heads * size * volume.chapters[0].shape[1]))
        parts = [
            self._search(grouped[:, start : start + step], volume, beside_sum[:, start : start + step])
            for start in range(0, groups, step)
        ]
        exactly, exact_sum, unread, unread_sum, risk = (
            tensors[0] if groups <= step else torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)
        )
        result, log_sum = merge((beside.view_as(grouped), exactly, unread), (beside_sum, exact_sum, unread_sum))
        sums = torch.stack([log_sum, torch.logaddexp(beside_sum, exact_sum), (risk - log_sum).exp_()])
        output = torch.empty_like(query).scatter_(1, _wide(at, head_dim), result.view(heads, -1, head_dim))
        log_sum, read_sum, error = query.new_empty(3, heads, queries).scatter_(
            2, at.expand(3, -1, -1), sums.view(3, heads, -1)
        )
        # What reading everything costs grows with the memory; what it mends doesn't.
        tolerance = self.tolerance * max(1.0, volume.page_count * PAGE / TOLERATED_TOKENS)
        return read_uncertain(Found(output, log_sum, read_sum), error, tolerance, query, rows, spans, scaling)

    def _search(self, query: Tensor, volume: Volume, known: Tensor) -> tuple[Tensor, ...]:
        """Attention of groups of scaled queries to a volume.

        Args:
            query: (kv_heads, groups, size, head_dim).
            volume: what to search.
            known: log-sum-exp of what the queries see besides, (kv_heads, groups, size).

        Returns:
            Output and log-sum-exp of what is read, those of what is estimated, and the logarithm of the error that
            the estimate may have, not yet divided by the whole sum.
        """
        heads, groups, size, head_dim = query.shape
        wanted = self.top_k * min(size, GROUP_PAGES if size <= GROUP else 2 * GROUP_PAGES)
        means, variances, values = volume.chapters
        count = means.shape[1]
        flat = query.reshape(heads, -1, head_dim)
        mean, variance = (moment.view(heads, groups, size, -1) for moment in score_moments(flat, means, variances))
        chapters = log_sum_exp(mean, variance, CHAPTER)
        whole = torch.logaddexp(chapters.logsumexp(-1), known)
        risks = _relative(potential(mean, variance, CHAPTER), whole)
        opened = _best(risks, min(count, max(OPENED_CHAPTERS, wanted)))
        _take_out(opened, chapters, risks)

        means, variances, page_values = volume.open(opened).split(head_dim, -1)
        mean, variance = score_moments(query, means, variances)
        pages, page_risks = log_sum_exp(mean, variance, PAGE), _relative(potential(mean, variance, PAGE), whole)
        chosen = _best(page_risks, min(pages.shape[3], wanted))
        _take_out(chosen, pages, page_risks)
        numbers = opened.gather(2, chosen // CHAPTER_PAGES) * CHAPTER_PAGES + chosen % CHAPTER_PAGES

        unread_sum = torch.logaddexp(chapters.logsumexp(-1), pages.logsumexp(-1))
        of_chapters, of_pages = shares(chapters, unread_sum), shares(pages, unread_sum)
        unread = (of_chapters.view(heads, -1, count) @ values).view(query.shape) + of_pages @ page_values
        risk = torch.hypot(torch.linalg.vector_norm(risks, dim=-1), torch.linalg.vector_norm(page_risks, dim=-1))
        return *_read_pages(query, volume, numbers), unread, unread_sum, risk.log() + whole


def _groups(query: Tensor, rows: int) -> Tensor:
    """Which queries read pages together: their numbers, (kv_heads, groups, size); some may stand there twice.

    Groups are made row by row, so that no row's result depends on the others.
    """
    heads, queries, head_dim = query.shape
    per_row = queries // rows
    numbers = torch.arange(rows, device=query.device).unsqueeze(1) * per_row
    if per_row <= QUESTION:
        within = torch.arange(per_row, device=query.device).expand(heads * rows, 1, -1)
    else:
        # Queries that are alike want the same pages; neighbouring ones much less so.
        groups = 1 << math.ceil(math.log2(per_row / GROUP))
        size = -(-per_row // groups)
        padded = torch.arange(size * groups, device=query.device).clamp_max_(per_row - 1)
        within = padded[alike(query.view(heads * rows, per_row, head_dim)[:, padded], size)].view(-1, groups, size)
    return (within.unflatten(0, (heads, rows)) + numbers.unsqueeze(1)).flatten(1, 2)


def _relative(risks: Tensor, whole: Tensor) -> Tensor:
    """Risks (kv_heads, groups, size, pages), given as logarithms, as shares of the whole attention; in place."""
    return risks.sub_(whole.unsqueeze(-1)).clamp_max_(LARGEST_RISK).exp_()


def _best(risks: Tensor, count: int) -> Tensor:
    """The pages (kv_heads, groups, count) that it would cost a group most not to read."""
    return risks.sum(2).topk(count, -1, sorted=False).indices


def _take_out(numbers: Tensor, estimates: Tensor, risks: Tensor) -> None:
    """Pages (kv_heads, groups, count) that are read have no estimate (kv_heads, groups, size, pages) and no risk."""
    at = numbers.unsqueeze(2).expand(-1, -1, risks.shape[2], -1)
    estimates.scatter_(3, at, -torch.inf)
    risks.scatter_(3, at, 0)


def _read_pages(query: Tensor, volume: Volume, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Exact attention of groups of scaled queries to their pages (kv_heads, groups, pages)."""
    heads, groups, size, head_dim = query.shape
    tokens = numbers.shape[2] * PAGE
    step = max(1, GATHERED // (heads * tokens * head_dim))
    parts = []
    for start in range(0, groups, step):
        part = query[:, start : start + step].reshape(1, -1, size, head_dim)
        tensors = volume.gather(numbers[:, start : start + step])
        key, value = (tensor.view(1, -1, tokens, head_dim) for tensor in tensors)
        output, log_sum = flash(part, key, value, scaling=1.0)
        parts.append((output.view(heads, -1, size, head_dim), log_sum.view(heads, -1, size)))
    if len(parts) == 1:
        return parts[0]
    output, log_sum = (torch.cat(tensors, 1) for tensors in zip(*parts, strict=True))
    return output, log_sum


def _wide(at: Tensor, head_dim: int) -> Tensor:
    return at.unsqueeze(-1).expand(-1, -1, head_dim)

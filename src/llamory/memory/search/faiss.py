"""Search by Faiss: nearest neighbours by inner product are read exactly, the rest through the means of their lists.

Every long range of a block has an inverted file (IVF) per head: its lists hold similar keys. The tokens of a list that
aren't found keep an estimated weight: the list's means less what was found.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamory.common.io import atomic_path
from llamory.errors import LlamoryError
from llamory.memory.blocks import Span, SpanList
from llamory.memory.search import base
from llamory.memory.search.base import AttentionResult, Search, in_steps, merge, softmax_weights
from llamory.memory.search.exact import TOLERANCE, attend_spans, refine_uncertain
from llamory.memory.search.page_index import aligned_ranges, get_or_build_range, stable_spans

LENGTHS = (1 << 20, 1 << 18, 1 << 16, 1 << 14, 1 << 12)  # tokens of a range; each token is in the largest that fits
MIN_PROBES = 8  # lists that are searched, or
PROBE_DIVISOR = 64  # one list in so many, if that is more
TRAINING_STEPS = 10
MAX_GATHERED_ELEMENTS = 1 << 22  # numbers of keys, and of values, that are gathered at once


class FaissSearch(Search):
    """Reads the `top_k` nearest neighbours of each query and head, of each range that has an index."""

    default_top_k, default_tolerance = 128, TOLERANCE

    def attend_grouped(self, query: Tensor, spans: SpanList, scaling: float, rows: int) -> AttentionResult:
        """See `Search.attend_grouped`."""
        ranges, rest = indexed_ranges(spans)
        if not ranges or spans.tokens <= self.top_k:
            output, lse = attend_spans(query, spans, scaling)
            return AttentionResult(output, lse, lse)
        query = query.float()
        results = [self._search(query * scaling, span) for span in ranges]
        rest_output, rest_lse = attend_spans(query, rest, scaling)
        neighbors, neighbor_lses, estimated, estimated_lses, log_errors = zip(*results, strict=True)
        output, lse = merge((rest_output, *neighbors, *estimated), (rest_lse, *neighbor_lses, *estimated_lses))
        read_lse = torch.stack([rest_lse, *neighbor_lses]).logsumexp(0)
        error = (torch.stack(log_errors).logsumexp(0) - lse).exp_()
        result = AttentionResult(output, lse, read_lse)
        return refine_uncertain(result, error, self.tolerance, query, rows, spans, scaling)

    def _search(self, query: Tensor, span: Span) -> tuple[Tensor, ...]:
        """Attention of scaled queries (kv_heads, queries, head_dim) to a range with an index.

        Returns output and log-sum-exp of the neighbours, those of the rest, and the log of the estimate's error times
        the softmax's sum.
        """
        part, count = get_or_build_part(span, self.folder), min(self.top_k, len(span))
        device_query = query.to(span.block.keys.device)
        step = MAX_GATHERED_ELEMENTS // (len(query) * count * query.shape[-1])
        parts = in_steps(lambda queries: _attend_part(queries, span, part, count), step, device_query)
        return tuple(each.to(query.device) for each in parts)


def indexed_ranges(spans: SpanList) -> tuple[list[Span], list[Span]]:
    """The ranges of some spans that get an index, and the spans that are too short for one."""
    key = ("faiss", LENGTHS)
    if key not in spans.derived:
        stable, rest = stable_spans(spans, LENGTHS[-1])
        ranges: list[Span] = []
        for span in stable:
            aligned, remaining = aligned_ranges(span, LENGTHS)
            ranges += [Span(span.block, *each) for each in aligned]
            rest += remaining
        spans.derived[key] = ranges, rest
    return spans.derived[key]


def _attend_part(query: Tensor, span: Span, part: IndexedPart, count: int) -> tuple[Tensor, ...]:
    tokens = part.search(query, count)  # (kv_heads, queries, count)
    missing = tokens < 0
    tokens = tokens.clamp_min(0)
    keys, values = gather(span, tokens)
    scores = (keys @ query.unsqueeze(-1)).squeeze(-1).masked_fill_(missing, -torch.inf)
    neighbor_lse = scores.logsumexp(-1)
    neighbors = (softmax_weights(scores.clone(), neighbor_lse).unsqueeze(2) @ values).squeeze(2)

    # What remains of each list without the tokens that were found.
    found_mask = (~missing).float()
    lists = part.lists.gather(1, tokens.view(len(query), -1)).view(tokens.shape).long()
    mean, variance = base.score_moments(query, part.means, part.variances)  # (kv_heads, queries, lists)
    counts = part.counts.unsqueeze(1).expand_as(mean)
    remaining = counts.scatter_add(2, lists, -found_mask)
    mean = (mean * counts).scatter_add(2, lists, -scores.masked_fill(missing, 0)) / remaining.clamp_min(1)
    empty = remaining < 0.5
    remaining = remaining.clamp_min(1)
    rest = base.log_sum_exp(mean, variance, remaining).masked_fill_(empty, -torch.inf)
    # In a list that was searched, no remaining score is higher than the lowest that was found.
    min_score = scores.masked_fill(missing, torch.inf).amin(-1, keepdim=True)
    log_errors = base.log_error_bound(mean, variance, remaining)
    log_errors = torch.where(remaining < counts - 0.5, torch.minimum(log_errors, (rest + min_score) / 2), log_errors)
    log_error = (2 * log_errors.masked_fill_(empty, -torch.inf)).logsumexp(-1) / 2
    estimated_lse = rest.logsumexp(-1)
    per_token = softmax_weights(rest, estimated_lse) / remaining
    estimated = (per_token * counts) @ part.values
    estimated = estimated - ((per_token.gather(2, lists) * found_mask).unsqueeze(2) @ values).squeeze(2)
    return neighbors, neighbor_lse, estimated, estimated_lse, log_error


def gather(span: Span, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (kv_heads, queries, count, head_dim) in float32 of tokens, numbered within their span."""
    block = span.block
    offsets = torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1) * block.capacity + span.start
    rows = (tokens + offsets).view(-1)

    def gathered(tensor: Tensor, scales: Tensor | None) -> Tensor:
        numbers = tensor.reshape(-1, tensor.shape[-1]).index_select(0, rows).float()
        if scales is not None:
            numbers *= scales.reshape(-1).index_select(0, rows).unsqueeze(-1)
        return numbers.view(*tokens.shape, -1)

    return gathered(block.keys, block.key_scales), gathered(block.values, block.value_scales)


@dataclass
class IndexedPart:
    """The indexes of a range and the statistics of their lists, for each head."""

    indexes: list[Any]  # per head, of the keys less their mean: same order of inner products, directions differ more
    lists: Tensor  # (kv_heads, tokens) int16, the list of each token
    means: Tensor  # of each list's keys, (kv_heads, lists, head_dim) float32, as the next two
    variances: Tensor
    values: Tensor  # mean of each list's values
    counts: Tensor  # tokens of each list, (kv_heads, lists) float32

    def search(self, query: Tensor, count: int) -> Tensor:
        """Numbers of the nearest tokens, -1 where there are fewer, for queries (kv_heads, queries, head_dim)."""
        heads = zip(self.indexes, query.cpu().contiguous().numpy(), strict=True)
        neighbors = [torch.from_numpy(index.search(head, count)[1]) for index, head in heads]
        return torch.stack(neighbors).to(query.device)


def get_or_build_part(span: Span, folder: Path | None) -> IndexedPart:
    """The cached indexes of a range; else they are read from the folder, or built and stored there."""

    def build() -> IndexedPart:
        indexes = _build(span) if folder is None else _load_or_build(span, folder)
        return _indexed_part(indexes, span)

    return get_or_build_range(span.block.search_cache.setdefault(f"faiss {folder}", {}), span.start, span.stop, build)


def _build(span: Span) -> list[Any]:
    indexes = []
    for head in span.keys(torch.float32):
        centered = (head - head.mean(0)).cpu().numpy()
        index = _new_index(*centered.shape)
        index.train(centered)
        index.add(centered)
        indexes.append(index)
    return indexes


def _new_index(tokens: int, head_dim: int) -> Any:
    import faiss

    lists = 1 << round(tokens.bit_length() / 2)
    # One byte per number is enough to find neighbours, which are then read from the memory itself.
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(head_dim), head_dim, lists, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.niter = TRAINING_STEPS
    index.nprobe = max(MIN_PROBES, lists // PROBE_DIVISOR)
    return index


def _indexed_part(indexes: list[Any], span: Span) -> IndexedPart:
    keys = span.keys(torch.float32)
    lists = torch.stack([_lists_of(index) for index in indexes]).to(keys.device)
    indices = lists.long()
    counts = torch.zeros(len(lists), int(indices.max()) + 1, device=keys.device)
    counts.scatter_add_(1, indices, torch.ones_like(indices, dtype=torch.float32))
    expanded = indices.unsqueeze(-1).expand_as(keys)

    def mean_of(tensor: Tensor) -> Tensor:
        sums = torch.zeros(*counts.shape, keys.shape[-1], device=keys.device).scatter_add_(1, expanded, tensor)
        return sums / counts.clamp_min(1).unsqueeze(-1)

    means = mean_of(keys)
    variances = mean_of((keys - means.gather(1, expanded)).square_())
    return IndexedPart(indexes, lists, means, variances, mean_of(span.values(torch.float32)), counts)


def _lists_of(index: Any) -> Tensor:
    """The list of each token of a head, (tokens,) int16."""
    import faiss

    lists = torch.empty(index.ntotal, dtype=torch.int16)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size).copy()
            lists[torch.from_numpy(ids)] = number
    return lists


def _load_or_build(span: Span, folder: Path) -> list[Any]:
    """The indexes from files named by the keys' content; built and written if one is missing."""
    import faiss

    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _digest(span)
        files = [folder / f"{digest}-{head}.faiss" for head in range(len(span.block.keys))]
        if not all(file.is_file() for file in files):
            for index, file in zip(_build(span), files, strict=True):
                with atomic_path(file) as temporary:
                    faiss.write_index(index, str(temporary))
    except OSError as error:
        problem = f"The folder {folder} can't store indexes of memory ({error.strerror})"
        raise LlamoryError(f"{problem}: give a folder that is writable.") from error
    indexes = []
    for file in files:
        try:
            indexes.append(faiss.read_index(str(file), faiss.IO_FLAG_MMAP))  # its lists are read when searched
        except RuntimeError as error:
            raise LlamoryError(f"{file} is not a complete memory index: remove it, and it is built again.") from error
    return indexes


def _digest(span: Span) -> str:
    """Name of a span's keys: equal keys have the same index, whatever file or block they are in."""
    digest = hashlib.blake2b(digest_size=16)
    for part in span.split(1 << 16):
        digest.update(part.keys().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return f"{len(span)}-{digest.hexdigest()}"

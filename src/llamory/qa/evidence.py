"""Select the evidence for a question: the documents, and parts of long ones, with the highest query likelihood.

Query likelihood (Ponte and Croft 1998; with a language model Sachan et al. 2022, arXiv:2204.07496) is computed from
memories, without encoding the documents again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.longllama.cache import LongLlamaCache
from llamory.memory import MemoryBank, SegmentSpan
from llamory.memory.search import Search
from llamory.memory.search.exact import ExactSearch

if TYPE_CHECKING:
    from llamory.longllama.causal import LongLlamaForCausalLM

DEFAULT_EVIDENCE_RATIO = 100.0  # evidence whose likelihood is this many times below the best is dropped
# Documents are scored in units of at most COARSE_TOKENS, the likeliest of them in units of at most FINE_TOKENS.
COARSE_TOKENS, FINE_TOKENS = 2048, 512
MARGIN = 64  # tokens added at both ends of a unit, as sentences cross its ends
# If there are more than MAX_UNITS, units SIZE_FACTOR times as large come first; at least MIN_UNITS of them are split.
MAX_UNITS, MIN_UNITS, SIZE_FACTOR = 128, 8, 4
_BATCH_UNITS, _BATCH_TOKENS = 16, 1024  # units, and question tokens (which all have logits), per batch
MAX_QUESTION_TOKENS = 128  # of a longer question only the end is scored
MAX_EXACT_TOKENS = 8192  # of parts of documents: clustering them takes longer than exact search

EvidenceUnit = tuple[SegmentSpan, ...]  # scored together: a part of a document, or several documents


@torch.no_grad()
def question_likelihoods(
    model: LongLlamaForCausalLM, question: Sequence[int], memory: MemoryBank, units: Sequence[Sequence[SegmentSpan]]
) -> Tensor:
    """Log-likelihood of a question with one unit at a time in memory; the model is in evaluation mode.

    Args:
        question: token ids; the first one isn't predicted.
        memory: has the segments of the units.

    Returns:
        (units,) float64, in nats: sum of ln p(token | previous tokens, unit).
    """
    log_likelihoods, batch_size = [], max(1, min(_BATCH_UNITS, _BATCH_TOKENS // len(question)))
    for start in range(0, len(units), batch_size):
        banks = [memory.slice(unit) for unit in units[start : start + batch_size]]
        ids = torch.tensor([list(question)] * len(banks), device=model.device)
        cache = LongLlamaCache(model.config, banks)
        cache.search = ExactSearch()  # an index of a unit would serve this question only
        with evaluation_mode(model):
            logits = model(ids, past_key_values=cache).logits[:, :-1].float()  # (units, tokens - 1, vocabulary)
        tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        log_likelihoods.append(-tokens.view(len(banks), -1).double().sum(1).cpu())
    return torch.cat(log_likelihoods)


def select_evidence(
    model: LongLlamaForCausalLM,
    question: Sequence[int],
    memory: MemoryBank,
    documents: Sequence[str],
    evidence_ratio: float,
) -> list[SegmentSpan]:
    """The documents, whole or in parts, to answer a question from; their order stays.

    Args:
        question: token ids.
        memory: has a segment per document.
        evidence_ratio: drop units whose likelihood is more than this many times below the best; 0 keeps all.

    Raises:
        LlamoryError: `evidence_ratio` is neither 0 nor at least 1.
    """
    check_evidence_ratio(evidence_ratio)
    question = list(question)[-min(MAX_QUESTION_TOKENS, model.config.max_position_embeddings) :]
    full_spans = [SegmentSpan(name, 0, memory.length(segment=name)) for name in documents]
    if not evidence_ratio or len(question) < 2:
        return full_spans
    sizes, selected, previous_units = [FINE_TOKENS, COARSE_TOKENS], full_spans, list[EvidenceUnit]()
    while len(split_units(full_spans, sizes[-1])) > MAX_UNITS:
        sizes.append(sizes[-1] * SIZE_FACTOR)
    for size in reversed(sizes):
        units = split_units(selected, size)
        if len(units) < 2 or units == previous_units:
            continue
        likelihoods = question_likelihoods(model, question, memory, units)
        is_likely = likelihoods >= likelihoods.max() - math.log(evidence_ratio)
        if size > COARSE_TOKENS:
            is_likely[likelihoods.topk(min(MIN_UNITS, len(units))).indices] = True
        previous_units = [unit for unit, each in zip(units, is_likely.tolist(), strict=True) if each]
        selected = [span for unit in previous_units for span in unit]
    return _add_margin(selected, full_spans)


def make_evidence_search(
    model: LongLlamaForCausalLM, memory: MemoryBank, spans: Sequence[SegmentSpan]
) -> Search | None:
    """Exact search for few tokens of parts of documents; None for the model's own search."""
    is_partial = any(stop - start < memory.length(segment=name) for name, start, stop in spans)
    is_small = sum(stop - start for _, start, stop in spans) <= MAX_EXACT_TOKENS
    return ExactSearch() if is_partial and is_small and not model.config.mem_top_k_attention else None


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode (no dropout) for the block, and restore its mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_evidence_ratio(evidence_ratio: float) -> None:
    """Raise LlamoryError unless an evidence ratio is 0 or at least 1."""
    if evidence_ratio and not evidence_ratio >= 1:
        raise LlamoryError(f"evidence_ratio must be at least 1, or 0 to disable it, not {evidence_ratio:g}.")


def split_units(spans: Sequence[SegmentSpan], size: int) -> list[EvidenceUnit]:
    """Units of at most `size` tokens: long spans in equal parts; over COARSE_TOKENS, neighbours that fit share one."""
    units, free_tokens = list[list[SegmentSpan]](), -1
    for name, start, stop in spans:
        length = stop - start
        if length <= free_tokens:
            units[-1].append(SegmentSpan(name, start, stop))
            free_tokens -= length
            continue
        num_parts = max(1, math.ceil(length / size))
        boundaries = [start + length * number // num_parts for number in range(num_parts + 1)]
        units += [[SegmentSpan(name, *each)] for each in pairwise(boundaries)]
        free_tokens = size - length if num_parts == 1 and size > COARSE_TOKENS else -1
    return [tuple(unit) for unit in units]


def _add_margin(spans: Sequence[SegmentSpan], full_spans: Sequence[SegmentSpan]) -> list[SegmentSpan]:
    """Extend parts of documents by MARGIN tokens at both ends; parts that then overlap are joined."""
    lengths = {span.segment: span.stop for span in full_spans}
    result: list[SegmentSpan] = []
    for name, start, stop in spans:
        start, stop = max(0, start - MARGIN), min(lengths[name], stop + MARGIN)
        if result and result[-1].segment == name and start <= result[-1].stop:
            start = result.pop().start
        result.append(SegmentSpan(name, start, stop))
    return result

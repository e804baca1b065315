"""What in memory a question is about: the documents, and of long ones the stretches, that make the question likeliest.

Query likelihood (Ponte and Croft 1998; with a language model Sachan et al. 2022, arXiv:2204.07496), from memories: no
token of a document is read again. A reader with much in one softmax may take another fact of the same kind for the one
that is asked for; the names in a question tell places apart long before the answer does.
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

# What makes the question so many times less likely than the best does isn't answered from.
DEFAULT_EVIDENCE_RATIO = 100.0
# Tokens: documents are looked at by stretches of at most COARSE_TOKENS, the likeliest of these by windows of at most WINDOW.
COARSE_TOKENS, FINE_TOKENS = 2048, 512
MARGIN = 64
# Of more than MOST, larger ones are looked at first, and the FEWEST best of these are cut further at least.
MAX_UNITS, MIN_UNITS, SIZE_FACTOR = 128, 8, 4
_BATCH_UNITS, _BATCH_TOKENS = 16, 1024  # units, and tokens of the question with all of them: each has logits
MAX_QUESTION_TOKENS = 128  # tokens: a longer question is looked for by its end, or it would be read like a document
MAX_EXACT_TOKENS = 8192  # tokens of pieces: making pages of these takes longer than reading them all

EvidenceUnit = tuple[SegmentSpan, ...]  # what is looked at together: a part of a document, or several documents


@torch.no_grad()
def question_likelihoods(
    model: LongLlamaForCausalLM, question: Sequence[int], memory: MemoryBank, units: Sequence[Sequence[SegmentSpan]]
) -> Tensor:
    """Log-likelihood of a question's tokens with one unit at a time in memory.

    Args:
        model: the model.
        question: its tokens; the first one isn't predicted.
        memory: with the segments that the units are of.
        units: pieces of memory, each unit's together.

    Returns:
        (units,) in float64, in nats: the sum of ln p(token | tokens before, unit).
    """
    log_likelihoods, batch_size = [], max(1, min(_BATCH_UNITS, _BATCH_TOKENS // len(question)))
    for start in range(0, len(units), batch_size):
        banks = [memory.slice(unit) for unit in units[start : start + batch_size]]
        ids = torch.tensor([list(question)] * len(banks), device=model.device)
        cache = LongLlamaCache(model.config, banks)
        cache.search = ExactSearch()  # pages or an index of a unit would be made for this question only
        logits = model(ids, past_key_values=cache).logits[:, :-1].float()
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
    """What to answer from: documents in their order, whole or in pieces.

    Args:
        model, question: as for `question_likelihoods`.
        memory: with a segment for each of the documents.
        documents: their names.
        evidence_ratio: left out is what makes the question so many times less likely than the best does; 0: nothing.
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
    """How these pieces are searched: few tokens of parts of documents exactly, else as the model is set (None)."""
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
    """Raise LlamoryError for a evidence_ratio that would leave out everything."""
    if evidence_ratio and not evidence_ratio >= 1:
        raise LlamoryError(f"evidence_ratio must be at least 1, or 0 to disable it, not {evidence_ratio:g}.")


def split_units(spans: Sequence[SegmentSpan], size: int) -> list[EvidenceUnit]:
    """Pieces as units of at most `size` tokens.

    Larger ones are cut into equal parts. Where `size` is more than COARSE_TOKENS, neighbours are put together as long as they
    fit.
    """
    units: list[list[SegmentSpan]] = []
    free_tokens = -1
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
    """Parts of documents with MARGIN tokens more at both ends, as sentences don't end where windows do."""
    lengths = {span.segment: span.stop for span in full_spans}
    result: list[SegmentSpan] = []
    for name, start, stop in spans:
        start, stop = max(0, start - MARGIN), min(lengths[name], stop + MARGIN)
        if result and result[-1].segment == name and start <= result[-1].stop:
            start = result.pop().start
        result.append(SegmentSpan(name, start, stop))
    return result

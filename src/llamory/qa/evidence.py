"""What in memory a question is about: the documents, and of long ones the stretches, that make the question likeliest.

Query likelihood (Ponte and Croft 1998; with a language model Sachan et al. 2022, arXiv:2204.07496), from memories: no
token of a document is read again. A reader with much in one softmax may take another fact of the same kind for the one
that is asked for; the names in a question tell places apart long before the answer does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.longllama.cache import LongLlamaCache
from llamory.memory import MemoryBank, SegmentSpan
from llamory.memory.search.base import Search
from llamory.memory.search.exact import ExactSearch

if TYPE_CHECKING:
    from llamory.longllama.causal import LongLlamaForCausalLM

# What makes the question so many times less likely than the best does isn't answered from.
DEFAULT_EVIDENCE_RATIO = 100.0
# Tokens: documents are looked at by stretches of at most STRETCH, the likeliest of these by windows of at most WINDOW.
STRETCH, WINDOW = 2048, 512
MARGIN = 64
# Of more than MOST, larger ones are looked at first, and the FEWEST best of these are cut further at least.
MOST, FEWEST, FACTOR = 128, 8, 4
_AT_ONCE, _TOKENS_AT_ONCE = 16, 1024  # units, and tokens of the question with all of them: each has logits
MOST_OF_QUESTION = 128  # tokens: a longer question is looked for by its end, or it would be read like a document
MOST_EXACT = 8192  # tokens of pieces: making pages of these takes longer than reading them all

Unit = tuple[SegmentSpan, ...]  # what is looked at together: a part of a document, or several documents


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
    found, rows = [], max(1, min(_AT_ONCE, _TOKENS_AT_ONCE // len(question)))
    for start in range(0, len(units), rows):
        banks = [memory.slice(unit) for unit in units[start : start + rows]]
        ids = torch.tensor([list(question)] * len(banks), device=model.device)
        cache = LongLlamaCache(model.config, banks)
        cache.search = ExactSearch()  # pages or an index of a unit would be made for this question only
        logits = model(ids, past_key_values=cache).logits[:, :-1].float()
        tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found.append(-tokens.view(len(banks), -1).double().sum(1).cpu())
    return torch.cat(found)


def choose(
    model: LongLlamaForCausalLM, question: Sequence[int], memory: MemoryBank, documents: Sequence[str], focus: float
) -> list[SegmentSpan]:
    """What to answer from: documents in their order, whole or in pieces.

    Args:
        model, question: as for `question_likelihoods`.
        memory: with a segment for each of the documents.
        documents: their names.
        focus: left out is what makes the question so many times less likely than the best does; 0: nothing.
    """
    check_evidence_ratio(focus)
    question = list(question)[-min(MOST_OF_QUESTION, model.config.max_position_embeddings) :]
    whole = [SegmentSpan(name, 0, memory.length(segment=name)) for name in documents]
    if not focus or len(question) < 2:
        return whole
    sizes, kept, seen = [WINDOW, STRETCH], whole, list[Unit]()
    while len(cut(whole, sizes[-1])) > MOST:
        sizes.append(sizes[-1] * FACTOR)
    for size in reversed(sizes):
        units = cut(kept, size)
        if len(units) < 2 or units == seen:
            continue
        likelihoods = question_likelihoods(model, question, memory, units)
        likely = likelihoods >= likelihoods.max() - math.log(focus)
        if size > STRETCH:
            likely[likelihoods.topk(min(FEWEST, len(units))).indices] = True
        seen = [unit for unit, each in zip(units, likely.tolist(), strict=True) if each]
        kept = [piece for unit in seen for piece in unit]
    return _widened(kept, whole)


def search_of(model: LongLlamaForCausalLM, memory: MemoryBank, pieces: Sequence[SegmentSpan]) -> Search | None:
    """How these pieces are searched: few tokens of parts of documents exactly, else as the model is set (None)."""
    parts = any(stop - start < memory.length(segment=name) for name, start, stop in pieces)
    few = sum(stop - start for _, start, stop in pieces) <= MOST_EXACT
    return ExactSearch() if parts and few and not model.config.mem_top_k_attention else None


def check_evidence_ratio(focus: float) -> None:
    """Raise LlamoryError for a focus that would leave out everything."""
    if focus and not focus >= 1:
        raise LlamoryError(f"A focus is a factor of at least 1, or 0 for none, not {focus:g}.")


def cut(pieces: Sequence[SegmentSpan], size: int) -> list[Unit]:
    """Pieces as units of at most `size` tokens.

    Larger ones are cut into equal parts. Where `size` is more than STRETCH, neighbours are put together as long as they
    fit.
    """
    units: list[list[SegmentSpan]] = []
    room = -1
    for name, start, stop in pieces:
        length = stop - start
        if length <= room:
            units[-1].append(SegmentSpan(name, start, stop))
            room -= length
            continue
        parts = max(1, math.ceil(length / size))
        edges = [start + length * part // parts for part in range(parts + 1)]
        units += [[SegmentSpan(name, *each)] for each in pairwise(edges)]
        room = size - length if parts == 1 and size > STRETCH else -1
    return [tuple(unit) for unit in units]


def _widened(pieces: Sequence[SegmentSpan], whole: Sequence[SegmentSpan]) -> list[SegmentSpan]:
    """Parts of documents with MARGIN tokens more at both ends, as sentences don't end where windows do."""
    lengths = {piece.segment: piece.stop for piece in whole}
    result: list[SegmentSpan] = []
    for name, start, stop in pieces:
        start, stop = max(0, start - MARGIN), min(lengths[name], stop + MARGIN)
        if result and result[-1].segment == name and start <= result[-1].stop:
            start = result.pop().start
        result.append(SegmentSpan(name, start, stop))
    return result

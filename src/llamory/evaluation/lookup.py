"""The dictionary look-up figure (Tworkowski et al. 2023, section 4.1): accuracy as memory fills with other documents.

Memory holds the definitions of some documents, each read by itself as in training. The same few documents, the first
ones, are asked about at every length, so that lengths differ in nothing but how many others there are. No key is
defined twice, so every question has one correct answer.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.evaluation.lookup_data import Dictionaries, LookupTask
from llamory.longllama import LongLlamaCache, LongLlamaForCausalLM
from llamory.longllama.losses import IGNORE_INDEX
from llamory.memory import MemoryBank

ENCODE_BATCH_SIZE = 64  # documents of a forward pass
QUERY_BATCH_SIZE = 8
SEGMENT = "dictionaries"


@dataclass(frozen=True)
class LookupCell:
    """What was found at one length of memory.

    Attributes:
        tokens: in memory.
        accuracy: share of the values' tokens that are the model's first choice, the correct ones before them given.
        whole: share of the values all of whose tokens are.
        asked: values that were asked for.
        reading: seconds that filling memory took since the length before.
        asking: seconds that all questions took, an index's building included.
        peak: bytes that the process has taken at most so far.
    """

    tokens: int
    accuracy: float
    whole: float
    asked: int
    reading: float
    asking: float
    peak: int


def run_lookup(
    model: LongLlamaForCausalLM,
    lengths: Sequence[int],
    *,
    task: LookupTask,
    documents: int = 16,
    seed: int = 0,
    on_cell: Callable[[LookupCell], None] | None = None,
    on_read: Callable[[int], None] | None = None,
) -> list[LookupCell]:
    """Ask the same documents at all lengths of memory.

    Args:
        model: trained for the task; its `mem_search`, `mem_top_k` and `mem_dtype` say how memory is kept and read.
        lengths: tokens of memory, rounded down to whole documents.
        task: the documents' shape.
        documents: how many are asked about; memory holds them at every length.
        seed: of the documents.
        on_cell: called with each length's result.
        on_read: called with the tokens of each batch that was read.

    Raises:
        LlamoryError: the model has no memory, or a length holds fewer documents than are asked about.
    """
    if not model.config.mem_layers:
        raise LlamoryError("This model has no memory layers, so it can't look anything up.")
    counts = sorted({length // task.half for length in lengths})
    if not counts or counts[0] < documents:
        raise LlamoryError(
            f"A memory of {min(lengths, default=0):,} tokens holds fewer than the {documents} documents that are asked "
            f"about; take at least {documents * task.half:,} tokens."
        )
    dictionaries = task.draw_distinct(counts[-1], torch.Generator().manual_seed(seed))
    asked = dictionaries.first(documents)
    questions, targets = task.questions(asked, torch.Generator().manual_seed(seed))
    bank, cells, num_encoded = model.new_memory(), [], 0
    for count in counts:
        start = time.perf_counter()
        for rows in _batches(num_encoded, count, ENCODE_BATCH_SIZE):
            part = Dictionaries(dictionaries.keys[rows], dictionaries.values[rows])
            write_to_memory(model, task.definitions(part), bank)
            if on_read is not None:
                on_read((rows.stop - rows.start) * task.half)
        num_encoded, read = count, time.perf_counter()
        correct = _answers(model, questions, targets, bank)
        values = correct.view(-1, task.value_length)
        cell = LookupCell(
            tokens=count * task.half,
            accuracy=correct.float().mean().item(),
            whole=values.all(1).float().mean().item(),
            asked=len(values),
            reading=read - start,
            asking=time.perf_counter() - read,
            peak=peak_memory(),
        )
        cells.append(cell)
        if on_cell is not None:
            on_cell(cell)
    return cells


def peak_memory() -> int:
    """Bytes that this process has taken at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@torch.no_grad()
def write_to_memory(model: LongLlamaForCausalLM, rows: Tensor, bank: MemoryBank) -> None:
    """Read rows (documents, half), each by itself, and append what they leave to one segment of a memory."""
    cache = LongLlamaCache(model.config)
    half = rows.shape[1]
    model.model(
        rows.to(model.device), past_key_values=cache, use_cache=False, last_context_length=half, logits_to_keep=None
    )
    for layer in bank.layers:
        for row in cache.memory:
            bank.append(layer, row.keys(layer), row.values(layer), segment=SEGMENT)


@torch.no_grad()
def _answers(model: LongLlamaForCausalLM, questions: Tensor, targets: Tensor, bank: MemoryBank) -> Tensor:
    """Which of the values' tokens are the first choice, in the order they are asked for."""
    correct = []
    for rows in _batches(0, len(questions), QUERY_BATCH_SIZE):
        ids, wanted = questions[rows].to(model.device), targets[rows].to(model.device)
        output = model(ids, past_key_values=model.memory_cache(bank), last_context_length=ids.shape[1])
        correct.append((output.logits.argmax(-1) == wanted)[wanted != IGNORE_INDEX].cpu())
    return torch.cat(correct)


def _batches(start: int, stop: int, size: int) -> Iterator[slice]:
    for at in range(start, stop, size):
        yield slice(at, min(at + size, stop))

"""Passes of a model over documents: one window of several rows at a time, each row into a memory of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from llamory.common import ram
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.cache import LongLlamaCache
from llamory.memory import MemoryBank

# Documents of one window at most are read together: one by one, a processor waits for memory more than it computes.
MAX_BATCH_ROWS, MAX_BATCH_TOKENS = 16, 4096

T = TypeVar("T")


def batches_by_length(documents: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Documents to read together, of rising length.

    Args:
        documents: of one window each at most.
        length: gives a document's tokens.
    """
    batch: list[T] = []
    for document in sorted(documents, key=length):
        if batch and (len(batch) == MAX_BATCH_ROWS or (len(batch) + 1) * length(document) > MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


@torch.no_grad()
def encode_window(model: LongLlamaForCausalLM, rows: Sequence[Tensor], banks: list[MemoryBank]) -> None:
    """Read one window of each row, (tokens,), into its bank; the rows see nothing of one another.

    Raises:
        MemoryError: there is too little room for it.
    """
    ram.require_free_ram(2 * sum(map(len, rows)) * bytes_per_token(banks[0]))
    ids = torch.nn.utils.rnn.pad_sequence([row.long() for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(ids.shape[1]) < lengths[:, None]
    model.model(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        past_key_values=LongLlamaCache(model.config, banks),
        use_cache=False,
        last_context_length=model.config.max_position_embeddings,
        logits_to_keep=None,
    )


def bytes_per_token(bank: MemoryBank) -> int:
    """What a token takes in all layers of a memory."""
    scale = torch.float32.itemsize if bank.dtype == torch.int8 else 0
    return len(bank.layers) * bank.kv_heads * 2 * (bank.head_dim * bank.dtype.itemsize + scale)

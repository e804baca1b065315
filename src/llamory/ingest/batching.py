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
ROWS_TOGETHER, TOKENS_TOGETHER = 16, 4096

T = TypeVar("T")


def groups(documents: Iterable[T], length: Callable[[T], int]) -> Iterator[list[T]]:
    """Documents to read together, of rising length.

    Args:
        documents: of one window each at most.
        length: gives a document's tokens.
    """
    group: list[T] = []
    for document in sorted(documents, key=length):
        if group and (len(group) == ROWS_TOGETHER or (len(group) + 1) * length(document) > TOKENS_TOGETHER):
            yield group
            group = []
        group.append(document)
    if group:
        yield group


@torch.no_grad()
def read_window(model: LongLlamaForCausalLM, rows: Sequence[Tensor], banks: list[MemoryBank]) -> None:
    """Read one window of each row, (tokens,), into its bank; the rows see nothing of one another.

    Raises:
        MemoryError: there is too little room for it.
    """
    ram.require_free_ram(2 * sum(map(len, rows)) * token_bytes(banks[0]))
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


def token_bytes(bank: MemoryBank) -> int:
    """What a token takes in all layers of a memory."""
    scale = torch.float32.itemsize if bank.dtype == torch.int8 else 0
    return len(bank.layers) * bank.kv_heads * 2 * (bank.head_dim * bank.dtype.itemsize + scale)

"""Batches for FoT training: rows of consecutive chunks of documents, each document in one pack of the batch."""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.training.corpus import DocumentStream, Key, check_same_settings


class FotBatches:
    """An endless iterator of batches (Tworkowski et al. 2023, section 3.2 and appendix A.2).

    A batch has packs of `dataset_packing` rows with consecutive chunks. A document continues in its pack over as many
    batches as it needs; the next one follows after an end-of-text token. There is no padding. Each batch has
    `input_ids` (batch_size, row_length); `shift_labels` (batch_size, row_length), the next token in the pack, across
    rows and batches; `documents` (batch_size,), the running number of the document of each row's first token.

    `bos_token_id` (None for none) starts each document, `eos_token_id` ends it. Raises LlamoryError if a number is too
    small, packing doesn't divide the batch, or there is no end-of-text token; while iterating, as the stream.
    """

    def __init__(
        self,
        stream: DocumentStream,
        *,
        row_length: int,
        batch_size: int,
        dataset_packing: int = 1,
        bos_token_id: int | None,
        eos_token_id: int | None,
    ) -> None:
        if row_length < 2:
            raise LlamoryError(f"Rows must have at least 2 tokens, not {row_length}.")
        if batch_size < 1 or dataset_packing < 1:
            raise LlamoryError(f"batch_size, dataset_packing must be at least 1, not {batch_size}, {dataset_packing}.")
        if batch_size % dataset_packing:
            raise LlamoryError(f"A dataset_packing of {dataset_packing} doesn't divide the batch of {batch_size} rows.")
        if eos_token_id is None:
            raise LlamoryError("The tokenizer has no end-of-text token to separate documents; set its eos_token.")
        self.stream, self.row_length, self.packing = stream, row_length, dataset_packing
        self._prefix, self._suffix = [] if bos_token_id is None else [bos_token_id], [eos_token_id]
        self._settings = {
            "row_length": row_length,
            "batch_size": batch_size,
            "dataset_packing": dataset_packing,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
        }
        self._packs = [_Pack() for _ in range(batch_size // dataset_packing)]
        self._documents = 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        length = self.packing * self.row_length
        inputs, labels, documents = [], [], []
        for pack in self._packs:
            # One token more than the rows hold, as the label of their last token.
            while pack.num_waiting_tokens() <= length:
                tokens, source, key = next(self.stream)
                pack.queue.append(self._queued_document(tokens, source, key, self._documents))
                self._documents += 1
            tokens_and_next = pack.next_tokens(length + 1)
            inputs.append(tokens_and_next[:-1].view(self.packing, self.row_length))
            labels.append(tokens_and_next[1:].view(self.packing, self.row_length))
            documents += pack.document_numbers(range(0, length, self.row_length))
            pack.advance(length)
        return {"input_ids": torch.cat(inputs), "shift_labels": torch.cat(labels), "documents": torch.tensor(documents)}

    def _queued_document(self, tokens: list[int], source: int, key: Key, number: int) -> _QueuedDocument:
        ids = torch.tensor([*self._prefix, *tokens, *self._suffix], dtype=torch.int32)
        return _QueuedDocument(ids, source, key, number)

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values: the stream's, and the documents and the offset of each pack."""
        packs = []
        for pack in self._packs:
            queue = [[document.source, list(document.key), document.number] for document in pack.queue]
            packs.append({"offset": pack.offset, "queue": queue})
        position = {"settings": self._settings, "stream": self.stream.state_dict()}
        return position | {"documents": self._documents, "packs": packs}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position with the same batches; raises LlamoryError if it is of other files or settings."""
        check_same_settings(state["settings"], self._settings)
        self.stream.load_state_dict(state["stream"])
        wanted = [(source, tuple(key)) for pack in state["packs"] for source, key, _ in pack["queue"]]
        tokens = iter(self.stream.read(wanted))
        self._documents = state["documents"]
        self._packs = [_Pack(deque(), pack["offset"]) for pack in state["packs"]]
        for pack, saved in zip(self._packs, state["packs"], strict=True):
            for source, key, number in saved["queue"]:
                pack.queue.append(self._queued_document(next(tokens), source, tuple(key), number))


@dataclass(frozen=True)
class _QueuedDocument:
    """A document in a pack: its tokens with bos and eos, source, key, and running number."""

    tokens: Tensor
    source: int
    key: Key
    number: int


@dataclass
class _Pack:
    """The queued documents of a pack, and how many tokens of the first one are used."""

    queue: deque[_QueuedDocument] = field(default_factory=deque)
    offset: int = 0

    def num_waiting_tokens(self) -> int:
        return sum(len(document.tokens) for document in self.queue) - self.offset

    def next_tokens(self, count: int) -> Tensor:
        parts, remaining = [], self.offset + count
        for document in self.queue:
            parts.append(document.tokens[:remaining])
            remaining -= len(parts[-1])
            if not remaining:
                break
        return torch.cat(parts)[self.offset :].long()

    def document_numbers(self, offsets: range) -> list[int]:
        ends = list(accumulate(len(document.tokens) for document in self.queue))
        return [self.queue[bisect_right(ends, self.offset + offset)].number for offset in offsets]

    def advance(self, count: int) -> None:
        self.offset += count
        while self.queue and self.offset >= len(self.queue[0].tokens):
            self.offset -= len(self.queue.popleft().tokens)

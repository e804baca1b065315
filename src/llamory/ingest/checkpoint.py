"""Progress of an ingest run, saved beside the memory file so that a stopped run can resume."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from llamory.ingest.documents import TokenizedDocument
from llamory.longllama import LongLlamaForCausalLM
from llamory.memory import MemoryBank

SAVE_INTERVAL_SECONDS = 60.0  # between two saves within a document
_SAVE_TIME_RATIO = 20  # saving takes at most 1 / 20 of the time
_UNFINISHED = "unfinished"


class IngestCheckpoint:
    """Encoded documents, and the windows of unfinished ones, in segments named by their source.

    Args:
        path: the checkpoint file.
        model, name: the model that encodes the documents, and its name for the metadata.
        bank: the content of the checkpoint file, if there is one.
    """

    def __init__(self, path: Path, model: LongLlamaForCausalLM, name: str, bank: MemoryBank | None = None):
        self.path, self._model, self._name = path, model, name
        self._context_length: int = model.config.max_position_embeddings
        self._current: tuple[TokenizedDocument, MemoryBank] | None = None
        self._has_changes, self._saved_tokens = False, 0
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0
        self._load(model.new_memory() if bank is None else bank)

    def contains(self, document: TokenizedDocument) -> bool:
        """Whether a document is finished."""
        return _has_current(self.bank, document)

    def resumable_tokens(self, document: TokenizedDocument) -> int:
        """Tokens of an unfinished document that are encoded, in whole windows."""
        if not _has_current(self._unfinished_bank, document):
            return 0
        # If the run was stopped within a window, only the first layers have it.
        bank = self._unfinished_bank
        tokens = min(bank.length(layer, document.source) for layer in bank.layers)
        return tokens - tokens % self._context_length

    def start(self, document: TokenizedDocument) -> MemoryBank:
        """A bank for a long document, with the windows that an earlier run encoded."""
        bank, tokens = self._model.new_memory(), self.resumable_tokens(document)
        if tokens:
            devices = {layer: self._device(layer) for layer in bank.layers}
            # Window by window: blocks, and sums over them, are then those of an uninterrupted run to the bit.
            step = self._context_length
            bank.attach_copy(self._unfinished_bank, document.source, tokens=tokens, step=step, devices=devices)
        self._current, self._saved_tokens = (document, bank), tokens
        return bank

    def add(self, document: TokenizedDocument, bank: MemoryBank) -> None:
        """Store a document that is encoded to its end, with its memory of one segment."""
        self._current = None
        self._drop_segment(document.source)
        bank.rename(bank.segments[0], document.source)
        if len(document.ids) > self._context_length:
            self.bank.attach(bank)
        else:
            # Short documents share blocks: most of a block of their own would stay empty.
            self.bank.attach_copy(bank, document.source)
        self.bank.set_metadata(document.source, **document.metadata(self._name, self._context_length))
        self._has_changes = True

    def save_if_due(self, *, mid_document: bool = False) -> None:
        """Save unless the last save is too recent; within a long document (`mid_document`) the interval is longer.

        With `mid_document` nothing is saved if no long document is being encoded, or at its last window.
        """
        if mid_document and (self._current is None or self._current[1].length() >= len(self._current[0].ids)):
            return
        interval = max(_SAVE_TIME_RATIO * self._save_seconds, SAVE_INTERVAL_SECONDS if mid_document else 0.0)
        if time.perf_counter() - self._saved_at >= interval:
            self.save()

    def save(self) -> None:
        """Write what was encoded since the last save, if anything was; OSError if the file can't be written."""
        current_tokens = 0 if self._current is None else self._current[1].length()
        if not self._has_changes and current_tokens <= self._saved_tokens:
            return
        started = time.perf_counter()
        self._combined_bank().save(self.path)
        self._load(MemoryBank.load(self.path, verify=False))  # frees the RAM: the file is mapped
        self._has_changes, self._saved_tokens = False, current_tokens
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - started

    def remove(self, documents: Iterable[TokenizedDocument]) -> None:
        """Remove documents that are in the memory file now; an empty checkpoint file is deleted."""
        for document in documents:
            self._drop_segment(document.source)
        combined = self._combined_bank()
        if combined.segments:
            combined.save(self.path)
        else:
            self.path.unlink(missing_ok=True)

    def _load(self, bank: MemoryBank) -> None:
        """Split a bank into finished and unfinished documents."""
        unfinished = [name for name in bank.segments if bank.metadata(name).get(_UNFINISHED)]
        self.bank, self._unfinished_bank = bank.fork(), bank.slice([])
        self._unfinished_bank.attach(bank, unfinished)
        for name in unfinished:
            self.bank.drop(name)

    def _combined_bank(self) -> MemoryBank:
        """The content of the file: finished documents, the current one and unfinished ones of earlier runs."""
        combined = self.bank.fork()
        if self._current is not None and self._current[1].segments:
            document, bank = self._current
            part = bank.fork()
            part.rename(part.segments[0], document.source)
            combined.attach(part)
            metadata = document.metadata(self._name, self._context_length)
            combined.set_metadata(document.source, **metadata, **{_UNFINISHED: True})
        earlier = [name for name in self._unfinished_bank.segments if name not in combined.segments]
        combined.attach(self._unfinished_bank, earlier)
        return combined

    def _device(self, layer: int) -> torch.device:
        """Where a layer's keys are computed."""
        decoder_layer: Any = self._model.model.layers[layer]
        device: torch.device = decoder_layer.self_attn.k_proj.weight.device
        # Offloaded weights have the device "meta": they are moved to the inputs.
        return self._model.device if device.type == "meta" else device

    def _drop_segment(self, source: str) -> None:
        for bank in (self.bank, self._unfinished_bank):
            if source in bank.segments:
                bank.drop(source)


def _has_current(bank: MemoryBank, document: TokenizedDocument) -> bool:
    name = document.source
    return name in bank.segments and bank.metadata(name).get("digest") == document.digest

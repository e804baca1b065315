"""What was read so far, kept beside a memory file so that a run that is stopped goes on from there."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamory.ingest.documents import TokenizedDocument
from llamory.longllama import LongLlamaForCausalLM
from llamory.memory import MemoryBank

# Between two savings within a document, in seconds; and saving takes a twentieth of the time at most.
SAVE_INTERVAL_SECONDS = 60.0
_SAVE_TIME_RATIO = 20
_UNFINISHED = "unfinished"


def document_metadata(document: TokenizedDocument) -> dict[str, Any]:
    """What a memory notes of a document."""
    return {
        "source": document.source,
        "file": document.file,
        "title": document.title,
        "digest": document.digest,
        "tokens": len(document.ids),
    }


class IngestCheckpoint:
    """Finished documents, and the windows of one that isn't finished; segments are named by their source.

    Args:
        path: the file.
        model: whose memory it is.
        bank: what a run before has left there.
    """

    def __init__(self, path: Path, model: LongLlamaForCausalLM, bank: MemoryBank | None):
        self.path, self._model = path, model
        self.bank = model.new_memory() if bank is None else bank
        self._unfinished_bank = model.new_memory()  # windows of documents that a run before has begun
        self._current: tuple[str, MemoryBank, dict[str, Any]] | None = None
        self._has_changes, self._saved_tokens = False, 0
        self._saved_at, self._save_seconds = time.perf_counter(), 0.0
        self._context_length = model.config.max_position_embeddings
        self._split_unfinished()

    # ---- what is there -------------------------------------------------------------------------------------------

    def has(self, document: TokenizedDocument) -> bool:
        """Whether a document is finished."""
        return self._has_current(self.bank, document)

    def resumable_tokens(self, document: TokenizedDocument) -> int:
        """How many tokens of an unfinished document are read, in whole windows."""
        if not self._has_current(self._unfinished_bank, document):
            return 0
        # A run that was stopped within a window has written it in the first layers only.
        tokens = min(self._unfinished_bank.length(layer, document.source) for layer in self._unfinished_bank.layers)
        return tokens - tokens % self._context_length

    def add(self, document: TokenizedDocument, bank: MemoryBank, metadata: dict[str, Any]) -> None:
        """Keep a document that was read into a bank of its own."""
        self._drop_segment(document.source)
        for layer in bank.layers:
            # Copied into blocks that many documents share: short ones would waste most of a block each.
            self.bank.append(layer, bank.keys(layer), bank.values(layer), segment=document.source)
        self.bank.set_metadata(document.source, **metadata)
        self._has_changes = True

    def resume(self, document: TokenizedDocument, metadata: dict[str, Any]) -> MemoryBank:
        """A bank of its own for a document, with what was read of it before."""
        bank, resumed_tokens, context_length = (
            self._model.new_memory(),
            self.resumable_tokens(document),
            self._context_length,
        )
        for layer in bank.layers if resumed_tokens else ():
            # Window by window, as they came the first time: then the blocks are the same, and so are the sums that
            # attention takes over them, to the bit.
            device = self._model.model.layers[layer].self_attn.k_proj.weight.device
            if device.type == "meta":  # offloaded: it comes to where the inputs are
                device = self._model.device
            keys, values = (
                part(layer, document.source).to(device)
                for part in (self._unfinished_bank.keys, self._unfinished_bank.values)
            )
            for start in range(0, resumed_tokens, context_length):
                part = slice(start, start + context_length)
                bank.append(layer, keys[:, part], values[:, part], segment=document.source)
        self._current, self._saved_tokens = (document.source, bank, metadata), resumed_tokens
        return bank

    def finish_document(self) -> None:
        """The document that was resumed is read to its end."""
        assert self._current is not None
        source, bank, metadata = self._current
        self._current = None
        self._drop_segment(source)
        bank.rename(bank.segments[0], source)
        self.bank.attach(bank)
        self.bank.set_metadata(source, **metadata)
        self._has_changes = True

    # ---- the file ------------------------------------------------------------------------------------------------

    def save_if_due(self, *, mid_document: bool = False) -> None:
        """Save, unless it was done a short while ago; `mid_document` a document that is a longer while."""
        if time.perf_counter() - self._saved_at >= max(
            _SAVE_TIME_RATIO * self._save_seconds, SAVE_INTERVAL_SECONDS if mid_document else 0.0
        ):
            self.save()

    def save(self) -> None:
        """Write down what was read since the last time, if anything was."""
        read_tokens = 0 if self._current is None else self._current[1].length()
        if not self._has_changes and read_tokens <= self._saved_tokens:
            return
        started = time.perf_counter()
        self._combined_bank().save(self.path)
        # What is on the disk needs no room in memory any more.
        self.bank = MemoryBank.load(self.path, verify=False)
        self._split_unfinished()
        self._has_changes, self._saved_tokens = False, read_tokens
        self._saved_at = time.perf_counter()
        self._save_seconds = self._saved_at - started

    def remove(self, documents: Iterable[TokenizedDocument]) -> None:
        """Take out documents that have come into the memory itself; without any others the file goes, too."""
        for document in documents:
            self._drop_segment(document.source)
        combined = self._combined_bank()
        if combined.segments:
            combined.save(self.path)
        else:
            self.path.unlink(missing_ok=True)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _combined_bank(self) -> MemoryBank:
        """All that is worth keeping in the file."""
        combined = self.bank.fork()
        if self._current is not None and self._current[1].segments:
            source, bank, metadata = self._current
            part = bank.fork()
            part.rename(part.segments[0], source)
            combined.attach(part)
            combined.set_metadata(source, **metadata, **{_UNFINISHED: True})
        for name in self._unfinished_bank.segments:
            if name not in combined.segments:
                combined.attach(self._unfinished_bank, [name])
        return combined

    def _split_unfinished(self) -> None:
        self._unfinished_bank = self._model.new_memory()
        for name in self.bank.segments:
            if self.bank.metadata(name).get(_UNFINISHED):
                self._unfinished_bank.attach(self.bank, [name])
                self.bank.drop(name)

    def _drop_segment(self, source: str) -> None:
        for bank in (self.bank, self._unfinished_bank):
            if source in bank.segments:
                bank.drop(source)

    @staticmethod
    def _has_current(bank: MemoryBank, document: TokenizedDocument) -> bool:
        name = document.source
        return name in bank.segments and bank.metadata(name).get("digest") == document.digest

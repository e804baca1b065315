"""What was read so far, kept beside a memory file so that a run that is stopped goes on from there."""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llamory.ingest.documents import Manuscript
from llamory.longllama import LongLlamaForCausalLM
from llamory.memory import MemoryBank

# Between two savings within a document, in seconds; and saving takes a twentieth of the time at most.
SAVE_EVERY = 60.0
_SHARE = 20
_UNFINISHED = "unfinished"


def facts_of(manuscript: Manuscript) -> dict[str, Any]:
    """What a memory notes of a document."""
    return {
        "source": manuscript.source,
        "file": manuscript.file,
        "title": manuscript.title,
        "digest": manuscript.digest,
        "tokens": len(manuscript.ids),
    }


class Partial:
    """Finished documents, and the windows of one that isn't finished; segments are named by their source.

    Args:
        path: the file.
        model: whose memory it is.
        bank: what a run before has left there.
    """

    def __init__(self, path: Path, model: LongLlamaForCausalLM, bank: MemoryBank | None):
        self.path, self._model = path, model
        self.bank = model.new_memory() if bank is None else bank
        self._old = model.new_memory()  # windows of documents that a run before has begun
        self._open: tuple[str, MemoryBank, dict[str, Any]] | None = None
        self._changed, self._read_at_saving = False, 0
        self._saved, self._cost = time.perf_counter(), 0.0
        self._window = model.config.max_position_embeddings
        self._set_unfinished_aside()

    # ---- what is there -------------------------------------------------------------------------------------------

    def has(self, manuscript: Manuscript) -> bool:
        """Whether a document is finished."""
        return self._holds(self.bank, manuscript)

    def begun(self, manuscript: Manuscript) -> int:
        """How many tokens of an unfinished document are read, in whole windows."""
        if not self._holds(self._old, manuscript):
            return 0
        # A run that was stopped within a window has written it in the first layers only.
        tokens = min(self._old.length(layer, manuscript.source) for layer in self._old.layers)
        return tokens - tokens % self._window

    def take(self, manuscript: Manuscript, bank: MemoryBank, facts: dict[str, Any]) -> None:
        """Keep a document that was read into a bank of its own."""
        self._forget(manuscript.source)
        for layer in bank.layers:
            # Copied into blocks that many documents share: short ones would waste most of a block each.
            self.bank.append(layer, bank.keys(layer), bank.values(layer), segment=manuscript.source)
        self.bank.set_metadata(manuscript.source, **facts)
        self._changed = True

    def resume(self, manuscript: Manuscript, facts: dict[str, Any]) -> MemoryBank:
        """A bank of its own for a document, with what was read of it before."""
        bank, begun, window = self._model.new_memory(), self.begun(manuscript), self._window
        for layer in bank.layers if begun else ():
            # Window by window, as they came the first time: then the blocks are the same, and so are the sums that
            # attention takes over them, to the bit.
            device = self._model.model.layers[layer].self_attn.k_proj.weight.device
            if device.type == "meta":  # offloaded: it comes to where the inputs are
                device = self._model.device
            keys, values = (part(layer, manuscript.source).to(device) for part in (self._old.keys, self._old.values))
            for start in range(0, begun, window):
                part = slice(start, start + window)
                bank.append(layer, keys[:, part], values[:, part], segment=manuscript.source)
        self._open, self._read_at_saving = (manuscript.source, bank, facts), begun
        return bank

    def finish(self) -> None:
        """The document that was resumed is read to its end."""
        assert self._open is not None
        source, bank, facts = self._open
        self._open = None
        self._forget(source)
        bank.rename(bank.segments[0], source)
        self.bank.attach(bank)
        self.bank.set_metadata(source, **facts)
        self._changed = True

    # ---- the file ------------------------------------------------------------------------------------------------

    def save_if_due(self, *, within: bool = False) -> None:
        """Save, unless it was done a short while ago; `within` a document that is a longer while."""
        if time.perf_counter() - self._saved >= max(_SHARE * self._cost, SAVE_EVERY if within else 0.0):
            self.save()

    def save(self) -> None:
        """Write down what was read since the last time, if anything was."""
        read = 0 if self._open is None else self._open[1].length()
        if not self._changed and read <= self._read_at_saving:
            return
        started = time.perf_counter()
        self._whole().save(self.path)
        # What is on the disk needs no room in memory any more.
        self.bank = MemoryBank.load(self.path, verify=False)
        self._set_unfinished_aside()
        self._changed, self._read_at_saving = False, read
        self._saved = time.perf_counter()
        self._cost = self._saved - started

    def drop(self, manuscripts: Iterable[Manuscript]) -> None:
        """Take out documents that have come into the memory itself; without any others the file goes, too."""
        for manuscript in manuscripts:
            self._forget(manuscript.source)
        whole = self._whole()
        if whole.segments:
            whole.save(self.path)
        else:
            self.path.unlink(missing_ok=True)

    # ---- inside --------------------------------------------------------------------------------------------------

    def _whole(self) -> MemoryBank:
        """All that is worth keeping in the file."""
        whole = self.bank.fork()
        if self._open is not None and self._open[1].segments:
            source, bank, facts = self._open
            part = bank.fork()
            part.rename(part.segments[0], source)
            whole.attach(part)
            whole.set_metadata(source, **facts, **{_UNFINISHED: True})
        for name in self._old.segments:
            if name not in whole.segments:
                whole.attach(self._old, [name])
        return whole

    def _set_unfinished_aside(self) -> None:
        self._old = self._model.new_memory()
        for name in self.bank.segments:
            if self.bank.metadata(name).get(_UNFINISHED):
                self._old.attach(self.bank, [name])
                self.bank.drop(name)

    def _forget(self, source: str) -> None:
        for bank in (self.bank, self._old):
            if source in bank.segments:
                bank.drop(source)

    @staticmethod
    def _holds(bank: MemoryBank, manuscript: Manuscript) -> bool:
        name = manuscript.source
        return name in bank.segments and bank.metadata(name).get("digest") == manuscript.digest

"""Documents into memory: each is read by itself into a segment of its own, and a run that was stopped goes on."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch import Tensor

from llamory.common import ram
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.ingest.batching import batches_by_length, bytes_per_token, encode_window
from llamory.ingest.checkpoint import IngestCheckpoint, document_metadata
from llamory.ingest.documents import PathLike, TokenizedDocument, load_documents
from llamory.ingest.memory_file import (
    MemoryFileInfo,
    canonical_name,
    check_model_matches,
    checkpoint_path,
    load_model_for,
)
from llamory.ingest.sync_plan import SyncPlan, diff_documents
from llamory.longllama import LongLlamaForCausalLM
from llamory.memory import MemoryBank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OOM_ADVICE = (
    "keep the memory as int8, choose fewer memory layers or a smaller model, or read fewer documents at once; "
    "{memory} is as it was before"
)


@dataclass
class ReadReport:
    """What `read_documents_into` did.

    Attributes:
        added: documents that are new in the memory.
        replaced: documents whose content had changed.
        unchanged: documents that were there already.
        removed: documents (JSON lines) that are no longer in their file.
        tokens: tokens that were read now.
        resumed: tokens that a run that was stopped had read.
        seconds: how long reading took, without loading the model.
        documents: documents in the memory now.
        memory_tokens: tokens in the memory now.
        bytes: size of the memory file now.
        model: the model's name.
    """

    added: int = 0
    replaced: int = 0
    unchanged: int = 0
    removed: int = 0
    tokens: int = 0
    resumed: int = 0
    seconds: float = 0.0
    documents: int = 0
    memory_tokens: int = 0
    bytes: int = 0
    model: str = ""

    @property
    def tokens_per_second(self) -> float:
        """How fast tokens were read."""
        return self.tokens / self.seconds if self.tokens else 0.0


def read_documents_into(
    memory: PathLike,
    paths: PathLike | Iterable[PathLike],
    *,
    model: PathLike | LongLlamaForCausalLM | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
    text_field: str = "text",
    skip_broken: bool = False,
    progress: bool = True,
    **settings: Any,
) -> ReadReport:
    """Read files and folders into a memory file, each document by itself into a segment of its own.

    What is in the memory already and hasn't changed is not read again, a document that has changed takes the place of
    its old self, and everything else stays. The memory file is replaced once all is read. Until then, what has been
    read lies beside it in `FILE.partial`, and a run that was stopped goes on from there when it is started again.

        report = read_documents_into("notes.memory", "notes/")
        print(ask("What did we say about the bridge?", "notes.memory").answer)

    Args:
        memory: the memory file; made if there is none.
        paths: files and folders, as for `llamory.documents.find_files`.
        model: a folder, `.gguf` file, hub id, "default" or a loaded model; by default the memory's own, for a new
            memory "default".
        tokenizer: the tokenizer of a loaded model, if it isn't in the model's folder.
        max_tokens: the most tokens that a document may have.
        text_field: entry of a JSON line that holds the text.
        skip_broken: pass over broken JSON lines and files.
        progress: show tokens per second and the time left on standard error.
        settings: as for `llamory.ingest.memory_file.load_model_for`: `mem_layers`, `context_length`, `mem_dtype`,
            `mem_search`, `mem_top_k`, `bf16`, `device`; what isn't given is as it is in the memory.

    Raises:
        LlamoryError: a path can't be read, a document is longer than `max_tokens`, there is no text, the memory is
            damaged or another model's, another run is at it, or the computer's memory or disk is too small. The
            memory file is then as it was before.
    """
    memory = Path(memory)
    loaded = model if isinstance(model, LongLlamaForCausalLM) else None
    with ram.translate_oom(_OOM_ADVICE.format(memory=memory) + "."):
        name = _model_name(model, _memory_files(memory))
        if tokenizer is None:
            from llamory.models.base import load_tokenizer

            tokenizer = load_tokenizer(name)
        documents = load_documents(
            paths, tokenizer, max_tokens=max_tokens, text_field=text_field, skip_broken=skip_broken
        )
        with _exclusive_lock(memory):
            memory_files = _memory_files(memory)
            if loaded is None:
                loaded = load_model_for(memory_files, name, **settings)
            check_model_matches(memory_files, loaded, name)
            return _IngestRun(memory, memory_files, loaded, canonical_name(name), progress).run(documents)


def _memory_files(memory: Path) -> list[MemoryFileInfo]:
    """The memory, and what a run that was stopped has left beside it, as far as they exist."""
    if memory.is_dir():
        raise LlamoryError(f"{memory} is a folder; give the path of a file to keep the memory in.")
    return [MemoryFileInfo(path) for path in (memory, checkpoint_path(memory)) if path.exists()]


def _model_name(model: PathLike | LongLlamaForCausalLM | None, memory_files: Sequence[MemoryFileInfo]) -> str:
    if isinstance(model, LongLlamaForCausalLM):
        return str(model.config._name_or_path)
    return str(model or next((memory_file.model for memory_file in memory_files if memory_file.model), "default"))


class _IngestRun:
    """One run: from what is there already to the new memory file."""

    def __init__(
        self,
        memory: Path,
        memory_files: Sequence[MemoryFileInfo],
        model: LongLlamaForCausalLM,
        name: str,
        progress: bool,
    ):
        self.memory, self.model, self.name, self.progress = memory, model, name, progress
        self.context: int = model.config.max_position_embeddings
        by_path = {Path(memory_file.path): memory_file for memory_file in memory_files}
        checkpoint_file = checkpoint_path(memory)
        self.memory_file = by_path.get(memory)
        self.bank = model.new_memory() if self.memory_file is None else self._load(memory)
        self.checkpoint = IngestCheckpoint(
            checkpoint_file, model, self._load(checkpoint_file) if checkpoint_file in by_path else None
        )
        self.report = ReadReport(model=name)

    def run(self, documents: list[TokenizedDocument]) -> ReadReport:
        report, started = self.report, time.perf_counter()
        plan = diff_documents([] if self.memory_file is None else self.memory_file.segments, documents)
        pending = [each for each in plan.read.values() if not self.checkpoint.has(each)]
        resumed_tokens = [self.checkpoint.resumable_tokens(each) for each in pending]
        num_tokens = sum(len(each.ids) for each in plan.read.values())
        report.resumed = num_tokens - sum(len(each.ids) for each in pending) + sum(resumed_tokens)
        self._check_disk(num_tokens)
        with ProgressBar(
            "Reading",
            num_tokens,
            unit="tokens",
            completed=report.resumed,
            shown=self.progress and bool(pending),
            speed=True,
        ) as bar:
            training = self.model.training
            self.model.eval()
            try:
                self._encode_documents(pending, bar)
            except BaseException:
                # Not lost: the next run goes on from here.
                with suppress(Exception):
                    self.checkpoint.save()
                raise
            finally:
                self.model.train(training)
        report.seconds = time.perf_counter() - started
        self._write(plan)
        return report

    # ---- reading -------------------------------------------------------------------------------------------------

    def _encode_documents(self, pending: list[TokenizedDocument], bar: ProgressBar) -> None:
        # A run that goes on makes the same groups of what is left, as they are made and kept in this order; then
        # what it reads equals what one go would have read, to the bit.
        short = [each for each in pending if len(each.ids) <= self.context]
        for batch in batches_by_length(short, lambda each: len(each.ids)):
            self._encode_batch(batch, bar)
        for document in pending:
            if len(document.ids) > self.context:
                self._encode_long(document, bar)

    def _encode_batch(self, batch: list[TokenizedDocument], bar: ProgressBar) -> None:
        """Read documents of one window at most, as the rows of a batch."""
        banks = [self.model.new_memory() for _ in batch]
        self._encode([each.ids for each in batch], banks)
        for document, bank in zip(batch, banks, strict=True):
            self.checkpoint.add(document, bank, self._metadata(document))
            self._advance(bar, document, len(document.ids))
        self.checkpoint.save_if_due()

    def _encode_long(self, document: TokenizedDocument, bar: ProgressBar) -> None:
        """Read a document window by window, from where a run that was stopped has come to."""
        bank = self.checkpoint.resume(document, self._metadata(document))
        for start in range(bank.length(), len(document.ids), self.context):
            window = document.ids[start : start + self.context]
            self._encode([window], [bank])
            self._advance(bar, document, len(window))
            if start + self.context < len(document.ids):
                self.checkpoint.save_if_due(mid_document=True)
        self.checkpoint.finish_document()
        self.checkpoint.save_if_due()

    def _encode(self, rows: Sequence[Tensor], banks: list[MemoryBank]) -> None:
        encode_window(self.model, rows, banks)

    def _advance(self, bar: ProgressBar, document: TokenizedDocument, tokens: int) -> None:
        self.report.tokens += tokens
        bar.advance(tokens, description=document.label)

    def _metadata(self, document: TokenizedDocument) -> dict[str, Any]:
        return document_metadata(document) | {"model": self.name, "context_length": self.context}

    # ---- the memory file -----------------------------------------------------------------------------------------

    def _load(self, path: PathLike) -> MemoryBank:
        config = self.model.config
        try:
            return MemoryBank.load(
                path,
                fingerprint=self.model.memory_fingerprint(),
                layers=self.model.new_memory().layers,
                dtype=config.mem_dtype,
            )
        except LlamoryError as error:
            if Path(path) == self.memory:
                raise
            raise LlamoryError(f"{str(error).rstrip('.')}; or remove that file to begin anew.") from error

    def _check_disk(self, tokens: int) -> None:
        """The partial file and the new one, which is written beside the old one, must fit."""
        stored_bytes = self.bank.nbytes
        needed = (2 * tokens * bytes_per_token(self.bank) + stored_bytes) if tokens else 0
        free = shutil.disk_usage(self.memory.absolute().parent).free
        if needed > free:
            raise LlamoryError(
                f"Reading {tokens:,} tokens needs {needed / 1e9:.1f} GB on the disk of {self.memory}, which has "
                f"{free / 1e9:.1f} GB left: free some space, or keep the memory as int8 or of fewer layers."
            )

    def _write(self, plan: SyncPlan) -> None:
        """Put the new memory together and in the old one's place."""
        report = self.report
        report.unchanged, report.removed = len(plan.unchanged), len(plan.removed)
        report.replaced = len(plan.replaced)
        report.added = len(plan.read) - report.replaced
        if plan.has_changes:
            plan.apply(self.bank, self.checkpoint.bank, self._metadata)
            self.bank.save(self.memory)
        self.checkpoint.remove(plan.read.values())
        report.documents, report.memory_tokens = len(self.bank.segments), self.bank.length()
        report.bytes = self.memory.stat().st_size


@contextmanager
def _exclusive_lock(memory: Path) -> Iterator[None]:
    """Keep a second run away from the same memory."""
    memory.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(memory.with_name(f".{memory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LlamoryError(f"Another run is reading into {memory}: wait until it is done.") from error
    try:
        yield
    finally:
        with suppress(OSError):
            os.unlink(lock.lock_file)  # noqa: PTH108
        lock.release()

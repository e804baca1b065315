"""Encode documents into memory, each into a segment of its own; `read_documents_into` writes a memory file."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch import Tensor

from llamory.common import ram
from llamory.common.io import PathLike
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.ingest.checkpoint import IngestCheckpoint
from llamory.ingest.documents import TokenizedDocument, load_documents
from llamory.ingest.memory_file import (
    MemoryFileInfo,
    canonical_name,
    check_model_matches,
    checkpoint_path,
    load_model_for,
)
from llamory.ingest.sync_plan import SyncPlan, diff_documents
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.causal import encode_windows
from llamory.memory import MemoryBank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# Documents of at most one window are encoded in batches: single ones leave a processor waiting for its memory.
MAX_BATCH_ROWS, MAX_BATCH_TOKENS = 16, 4096

_OOM_ADVICE = (
    "keep the memory as int8, choose fewer memory layers or a smaller model, or read fewer documents at once; "
    "{memory} is as it was before"
)

# ---- the loop --------------------------------------------------------------------------------------------------------


def encode_documents(
    model: LongLlamaForCausalLM,
    documents: Sequence[TokenizedDocument],
    on_window: Callable[[TokenizedDocument, int], None],
    start: Callable[[TokenizedDocument], MemoryBank] | None = None,
) -> Iterator[list[tuple[TokenizedDocument, MemoryBank]]]:
    """Encode documents, each by itself: first those of at most one window, in batches, then long ones one by one.

    The batches and their order depend on the documents alone, so a run that resumes after a batch computes the same
    numbers as an uninterrupted one.

    Args:
        model: the model.
        documents: the documents.
        on_window: called with a document and the tokens of each window that was encoded.
        start: gives the bank of a long document, which may hold its first windows; by default a new bank.

    Yields:
        The documents of a batch, each with its memory of one segment.

    Raises:
        MemoryError: there is too little RAM.
    """
    context: int = model.config.max_position_embeddings
    for batch in batches_by_length([document for document in documents if len(document.ids) <= context]):
        banks = [model.new_memory() for _ in batch]
        for _ in _encode_rows(model, [document.ids for document in batch], banks):
            for document in batch:
                on_window(document, len(document.ids))
        yield list(zip(batch, banks, strict=True))
    for document in documents:
        if len(document.ids) > context:
            bank = model.new_memory() if start is None else start(document)
            encoded = bank.length()
            for stop in _encode_rows(model, [document.ids], [bank], encoded):
                on_window(document, stop - encoded)
                encoded = stop
            yield [(document, bank)]


def batches_by_length(documents: Iterable[TokenizedDocument]) -> Iterator[list[TokenizedDocument]]:
    """Batches of documents of similar length, shortest first."""
    batch: list[TokenizedDocument] = []
    for document in sorted(documents, key=lambda each: len(each.ids)):
        if batch and (len(batch) == MAX_BATCH_ROWS or (len(batch) + 1) * len(document.ids) > MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(document)
    if batch:
        yield batch


def _encode_rows(
    model: LongLlamaForCausalLM, rows: Sequence[Tensor], banks: Sequence[MemoryBank], start: int = 0
) -> Iterator[int]:
    """`encode_windows` that raises MemoryError before a window that the RAM is too small for."""
    context, longest = model.config.max_position_embeddings, max(map(len, rows))
    window_bytes = banks[0].token_bytes * sum(min(len(row), context) for row in rows)
    ram.require_free_ram(2 * window_bytes)
    for stop in encode_windows(model, rows, banks, start):
        yield stop
        if stop < longest:
            ram.require_free_ram(2 * window_bytes)


# ---- memory files ----------------------------------------------------------------------------------------------------


@dataclass
class ReadReport:
    """Result of `read_documents_into`.

    Attributes:
        added: new documents.
        replaced: documents whose content had changed.
        unchanged: documents that the memory had already.
        removed: documents (JSON lines) that are no longer in their file.
        tokens: tokens encoded by this run.
        resumed: tokens that a stopped run had encoded.
        seconds: duration, without loading the model.
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
        """Tokens encoded per second."""
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
    """Encode files and folders into a memory file, each document into a segment of its own.

    Unchanged documents are not encoded again, changed ones are replaced, and documents of other paths stay. The memory
    file is replaced at the end. Until then finished work is in `FILE.partial`, from which a stopped run resumes.

        report = read_documents_into("notes.memory", "notes/")
        print(OpenMemory("notes.memory").ask("What did we say about the bridge?").answer)

    Args:
        memory: the memory file; created if it doesn't exist.
        paths: files and folders, as for `llamory.documents.find_files`.
        model: a folder, `.gguf` file, hub id, "default" or a loaded model; by default the memory's own, for a new
            memory "default".
        tokenizer: tokenizer of a loaded model, if it isn't in the model's folder.
        max_tokens: maximum tokens of a document.
        text_field: field of a JSON line that holds the text.
        skip_broken: skip JSON lines and files that can't be read.
        progress: show a progress bar on standard error.
        settings: as for `llamory.ingest.memory_file.load_model_for`: `mem_layers`, `context_length`, `mem_dtype`,
            `mem_search`, `mem_top_k`, `bf16`, `device`; by default those of the memory.

    Raises:
        LlamoryError: a path can't be read, a document has more than `max_tokens` tokens, there is no text, the memory
            is damaged or another model's, another run writes it, or there is too little RAM or disk space. The
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
    """The memory file and its checkpoint, as far as they exist."""
    if memory.is_dir():
        raise LlamoryError(f"{memory} is a folder; give the path of a file to keep the memory in.")
    return [MemoryFileInfo(path) for path in (memory, checkpoint_path(memory)) if path.exists()]


def _model_name(model: PathLike | LongLlamaForCausalLM | None, memory_files: Sequence[MemoryFileInfo]) -> str:
    if isinstance(model, LongLlamaForCausalLM):
        return str(model.config._name_or_path)
    return str(model or next((file.model for file in memory_files if file.model), "default"))


class _IngestRun:
    """One run: from the memory file and its checkpoint to the new memory file."""

    def __init__(
        self,
        memory: Path,
        memory_files: Sequence[MemoryFileInfo],
        model: LongLlamaForCausalLM,
        name: str,
        progress: bool,
    ):
        self.memory, self.model, self.progress = memory, model, progress
        self.name, self.context_length = name, model.config.max_position_embeddings
        info_by_path = {Path(file.path): file for file in memory_files}
        checkpoint_file = checkpoint_path(memory)
        self.info = info_by_path.get(memory)
        self.bank = model.new_memory() if self.info is None else self._load(memory)
        resumed = self._load(checkpoint_file) if checkpoint_file in info_by_path else None
        self.checkpoint = IngestCheckpoint(checkpoint_file, model, name, resumed)
        self.report = ReadReport(model=name)

    def run(self, documents: list[TokenizedDocument]) -> ReadReport:
        report, started = self.report, time.perf_counter()
        plan = diff_documents([] if self.info is None else self.info.segments, documents)
        pending = [document for document in plan.read.values() if not self.checkpoint.contains(document)]
        total_tokens = sum(len(document.ids) for document in plan.read.values())
        pending_tokens = sum(len(document.ids) - self.checkpoint.resumable_tokens(document) for document in pending)
        report.resumed = total_tokens - pending_tokens
        self._check_disk(total_tokens)
        with ProgressBar(
            "Reading",
            total_tokens,
            unit="tokens",
            completed=report.resumed,
            shown=self.progress and bool(pending),
            speed=True,
        ) as bar:
            try:
                self._encode(pending, bar)
            except BaseException:
                self._save_interrupted()
                raise
        report.seconds = time.perf_counter() - started
        self._write(plan)
        return report

    def _encode(self, documents: list[TokenizedDocument], bar: ProgressBar) -> None:
        def on_window(document: TokenizedDocument, tokens: int) -> None:
            self.report.tokens += tokens
            bar.advance(tokens, description=document.label)
            self.checkpoint.save_if_due(mid_document=True)

        for batch in encode_documents(self.model, documents, on_window, self.checkpoint.start):
            for document, bank in batch:
                self.checkpoint.add(document, bank)
            self.checkpoint.save_if_due()

    def _save_interrupted(self) -> None:
        """Save for the next run; an error is logged, as the interruption itself is raised."""
        try:
            self.checkpoint.save()
        except Exception as error:
            logger.error(
                "The run was interrupted, and %s can't be saved: %s. What was read since the last save is lost.",
                self.checkpoint.path,
                error,
            )

    def _load(self, path: Path) -> MemoryBank:
        config = self.model.config
        try:
            return MemoryBank.load(
                path,
                fingerprint=self.model.memory_fingerprint(),
                layers=self.model.new_memory().layers,
                dtype=config.mem_dtype,
            )
        except LlamoryError as error:
            if path == self.memory:
                raise
            raise LlamoryError(f"{str(error).rstrip('.')}; or remove that file to begin anew.") from error

    def _check_disk(self, tokens: int) -> None:
        """Check that the checkpoint and the new file, which is written beside the old one, fit."""
        required = (2 * tokens * self.bank.token_bytes + self.bank.nbytes) if tokens else 0
        free = shutil.disk_usage(self.memory.absolute().parent).free
        if required > free:
            raise LlamoryError(
                f"Reading {tokens:,} tokens needs {required / 1e9:.1f} GB on the disk of {self.memory}, which has "
                f"{free / 1e9:.1f} GB left: free some space, or keep the memory as int8 or of fewer layers."
            )

    def _write(self, plan: SyncPlan) -> None:
        """Write the new memory file and clear the checkpoint."""
        report = self.report
        report.unchanged, report.removed = len(plan.unchanged), len(plan.removed)
        report.replaced = len(plan.replaced)
        report.added = len(plan.read) - report.replaced
        if plan.has_changes:
            self.bank = plan.apply(
                self.bank, self.checkpoint.bank, lambda document: document.metadata(self.name, self.context_length)
            )
            self.bank.save(self.memory)
        self.checkpoint.remove(plan.read.values())
        report.documents, report.memory_tokens = len(self.bank.segments), self.bank.length()
        report.bytes = self.memory.stat().st_size


@contextmanager
def _exclusive_lock(memory: Path) -> Iterator[None]:
    """Refuse a second run on the same memory. The lock file stays: deleting one that is held lets two runs in."""
    memory.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(memory.with_name(f".{memory.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise LlamoryError(f"Another run is reading into {memory}: wait until it is done.") from error
    try:
        yield
    finally:
        lock.release()

"""Encode documents into memory, each into a segment of its own; `read_documents_into` writes a memory file."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from torch import Tensor

from llamory.common import ram
from llamory.common.io import PathLike
from llamory.common.progress import ProgressBar
from llamory.documents import SkippedFile
from llamory.errors import LlamoryError
from llamory.ingest.checkpoint import IngestCheckpoint
from llamory.ingest.documents import TokenizedDocument, load_documents
from llamory.ingest.memory_file import (
    MemoryFileInfo,
    SyncPlan,
    canonical_name,
    check_model_matches,
    checkpoint_path,
    diff_documents,
    load_model_for,
)
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
    "{memory} is as it was before."
)


def encode_documents(
    model: LongLlamaForCausalLM,
    documents: Sequence[TokenizedDocument],
    on_window: Callable[[TokenizedDocument, int], None],
    start: Callable[[TokenizedDocument], MemoryBank] | None = None,
) -> Iterator[list[tuple[TokenizedDocument, MemoryBank]]]:
    """Encode documents, each by itself: first those of at most one window, in batches, then long ones one by one.

    Batches depend on the documents alone, so a run that resumes after a batch computes the same numbers.

    Args:
        on_window: called with a document and the tokens of each window that was encoded.
        start: gives the bank of a long document, which may hold its first windows; by default a new bank.

    Yields:
        The documents of a batch, each with its memory of one segment.
    """
    context: int = model.config.max_position_embeddings
    for batch in _batches_by_length(document for document in documents if len(document.ids) <= context):
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


def _batches_by_length(documents: Iterable[TokenizedDocument]) -> Iterator[list[TokenizedDocument]]:
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
    required = 2 * banks[0].token_bytes * sum(min(len(row), context) for row in rows)
    ram.require_free_ram(required)
    for stop in encode_windows(model, rows, banks, start):
        yield stop
        if stop < longest:
            ram.require_free_ram(required)


@dataclass
class ReadReport:
    """Result of `read_documents_into`."""

    added: int = 0  # documents, as the next three
    replaced: int = 0
    unchanged: int = 0
    removed: int = 0  # a JSON line that is no longer in its file is removed
    tokens: int = 0  # encoded by this run
    resumed: int = 0  # tokens that a stopped run had encoded
    seconds: float = 0.0  # without loading the model
    documents: int = 0  # of the memory file now, as the next two
    memory_tokens: int = 0
    bytes: int = 0
    model: str = ""  # the model's name
    skipped: list[SkippedFile] = field(default_factory=list)  # such as links that lead out of the given folders

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

    Unchanged documents are not encoded again, and documents of other paths stay. Until the memory file is replaced at
    the end, finished work is in `FILE.partial`, from which a stopped run resumes.

        report = read_documents_into("notes.memory", "notes/")
        print(OpenMemory("notes.memory").ask("What did we say about the bridge?").answer)

    Args:
        memory: the memory file; created if it doesn't exist.
        model: a folder, `.gguf` file, hub id, "default" or a loaded model; by default the memory's own, for a new
            memory "default".
        tokenizer: tokenizer of a loaded model, if it isn't in the model's folder.
        paths, max_tokens, text_field, skip_broken: as for `llamory.ingest.documents.load_documents`.
        progress: show a progress bar on standard error.
        settings: as for `llamory.ingest.memory_file.load_model_for`: `mem_layers`, `context_length`, `mem_dtype`,
            `mem_search`, `mem_top_k`, `bf16`, `device`; by default those of the memory.

    Raises:
        LlamoryError: as `load_documents`; or the memory is damaged or another model's, another run writes it, or there
            is too little RAM or disk space. The memory file is then as it was before.
    """
    memory = Path(memory)
    with ram.translate_oom(_OOM_ADVICE.format(memory=memory)):
        if isinstance(model, LongLlamaForCausalLM):
            name = str(model.config._name_or_path)
        else:
            name = str(model or next((file.model for file in _memory_files(memory) if file.model), "default"))
        if tokenizer is None:
            from llamory.models.base import load_tokenizer

            tokenizer = load_tokenizer(name)
        skipped: list[SkippedFile] = []
        documents = load_documents(
            paths, tokenizer, max_tokens=max_tokens, text_field=text_field, skip_broken=skip_broken, skipped=skipped
        )
        with _exclusive_lock(memory):
            memory_files = _memory_files(memory)
            loaded = (
                model if isinstance(model, LongLlamaForCausalLM) else load_model_for(memory_files, name, **settings)
            )
            check_model_matches(memory_files, loaded, name)
            report = _IngestRun(memory, memory_files, loaded, canonical_name(name), progress).run(documents)
    report.skipped = skipped
    return report


def _memory_files(memory: Path) -> list[MemoryFileInfo]:
    """The memory file and its checkpoint, as far as they exist."""
    if memory.is_dir():
        raise LlamoryError(f"{memory} is a folder; give the path of a file to keep the memory in.")
    return [MemoryFileInfo(path) for path in (memory, checkpoint_path(memory)) if path.exists()]


class _IngestRun:
    """One run: from the memory file and its checkpoint to the new memory file."""

    def __init__(
        self, memory: Path, files: Sequence[MemoryFileInfo], model: LongLlamaForCausalLM, name: str, progress: bool
    ):
        self.memory, self.model, self.name, self.progress = memory, model, name, progress
        infos = {Path(file.path): file for file in files}
        checkpoint_file = checkpoint_path(memory)
        self.segments = infos[memory].segments if memory in infos else []
        self.bank = self._load(memory) if memory in infos else model.new_memory()
        resumed = self._load(checkpoint_file) if checkpoint_file in infos else None
        self.checkpoint = IngestCheckpoint(checkpoint_file, model, name, resumed)
        self.report = ReadReport(model=name)

    def run(self, documents: list[TokenizedDocument]) -> ReadReport:
        report, started = self.report, time.perf_counter()
        plan = diff_documents(self.segments, documents)
        pending = [document for document in plan.read.values() if not self.checkpoint.contains(document)]
        total_tokens = sum(len(document.ids) for document in plan.read.values())
        pending_tokens = sum(len(document.ids) - self.checkpoint.resumable_tokens(document) for document in pending)
        report.resumed = total_tokens - pending_tokens
        self._check_disk(total_tokens)
        shown = self.progress and bool(pending)
        with ProgressBar(
            "Reading", total_tokens, unit="tokens", completed=report.resumed, shown=shown, speed=True
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
                "%s can't be saved: %s. What was read since the last save is lost.", self.checkpoint.path, error
            )

    def _load(self, path: Path) -> MemoryBank:
        empty = self.model.new_memory()
        try:
            return MemoryBank.load(path, fingerprint=empty.fingerprint, layers=empty.layers, dtype=empty.dtype)
        except LlamoryError as error:
            if path == self.memory:
                raise
            raise LlamoryError(f"{str(error).rstrip('.')}; or remove that file to begin anew.") from error

    def _check_disk(self, tokens: int) -> None:
        """Check that the checkpoint and the new file, which is written beside the old one, fit."""
        required = (2 * tokens * self.bank.token_bytes + self.bank.nbytes) if tokens else 0
        free = shutil.disk_usage(self.memory.absolute().parent).free
        if required > free:
            found = f"Reading {tokens:,} tokens needs {required / 1e9:.1f} GB on the disk of {self.memory}"
            advice = "free some space, or keep the memory as int8 or of fewer layers"
            raise LlamoryError(f"{found}, which has {free / 1e9:.1f} GB left: {advice}.")

    def _write(self, plan: SyncPlan) -> None:
        """Write the new memory file and clear the checkpoint."""
        report, context_length = self.report, self.model.config.max_position_embeddings
        report.unchanged, report.removed = len(plan.unchanged), len(plan.removed)
        report.replaced, report.added = len(plan.replaced), len(plan.read) - len(plan.replaced)
        if plan.has_changes:
            self.bank = plan.apply(
                self.bank, self.checkpoint.bank, lambda document: document.metadata(self.name, context_length)
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

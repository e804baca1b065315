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
from llamory.ingest.batching import groups, read_window, token_bytes
from llamory.ingest.checkpoint import Partial, facts_of
from llamory.ingest.documents import Manuscript, PathLike, prepare
from llamory.ingest.memory_file import Book, check_maker, load_model_for, noted_name, partial_path
from llamory.ingest.sync_plan import Plan, make_plan
from llamory.longllama import LongLlamaForCausalLM
from llamory.memory import MemoryBank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ADVICE = (
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
    with ram.translate_oom(_ADVICE.format(memory=memory) + "."):
        name = _name(model, _books(memory))
        if tokenizer is None:
            from llamory.models.base import load_tokenizer

            tokenizer = load_tokenizer(name)
        manuscripts = prepare(paths, tokenizer, max_tokens=max_tokens, text_field=text_field, skip_broken=skip_broken)
        with _alone_with(memory):
            books = _books(memory)
            if loaded is None:
                loaded = load_model_for(books, name, **settings)
            check_maker(books, loaded, name)
            return _Reading(memory, books, loaded, noted_name(name), progress).run(manuscripts)


def _books(memory: Path) -> list[Book]:
    """The memory, and what a run that was stopped has left beside it, as far as they exist."""
    if memory.is_dir():
        raise LlamoryError(f"{memory} is a folder; give the path of a file to keep the memory in.")
    return [Book(path) for path in (memory, partial_path(memory)) if path.exists()]


def _name(model: PathLike | LongLlamaForCausalLM | None, books: Sequence[Book]) -> str:
    if isinstance(model, LongLlamaForCausalLM):
        return str(model.config._name_or_path)
    return str(model or next((book.model for book in books if book.model), "default"))


class _Reading:
    """One run: from what is there already to the new memory file."""

    def __init__(self, memory: Path, books: Sequence[Book], model: LongLlamaForCausalLM, name: str, progress: bool):
        self.memory, self.model, self.name, self.progress = memory, model, name, progress
        self.context: int = model.config.max_position_embeddings
        there = {Path(book.path): book for book in books}
        beside = partial_path(memory)
        self.book = there.get(memory)
        self.bank = model.new_memory() if self.book is None else self._load(memory)
        self.partial = Partial(beside, model, self._load(beside) if beside in there else None)
        self.report = ReadReport(model=name)

    def run(self, manuscripts: list[Manuscript]) -> ReadReport:
        report, started = self.report, time.perf_counter()
        plan = make_plan([] if self.book is None else self.book.segments, manuscripts)
        waiting = [each for each in plan.read.values() if not self.partial.has(each)]
        begun = [self.partial.begun(each) for each in waiting]
        total = sum(len(each.ids) for each in plan.read.values())
        report.resumed = total - sum(len(each.ids) for each in waiting) + sum(begun)
        self._check_disk(total)
        with ProgressBar(
            "Reading",
            total,
            unit="tokens",
            completed=report.resumed,
            shown=self.progress and bool(waiting),
            speed=True,
        ) as bar:
            training = self.model.training
            self.model.eval()
            try:
                self._read(waiting, bar)
            except BaseException:
                # Not lost: the next run goes on from here.
                with suppress(Exception):
                    self.partial.save()
                raise
            finally:
                self.model.train(training)
        report.seconds = time.perf_counter() - started
        self._write(plan)
        return report

    # ---- reading -------------------------------------------------------------------------------------------------

    def _read(self, waiting: list[Manuscript], bar: ProgressBar) -> None:
        # A run that goes on makes the same groups of what is left, as they are made and kept in this order; then
        # what it reads equals what one go would have read, to the bit.
        short = [each for each in waiting if len(each.ids) <= self.context]
        for group in groups(short, lambda each: len(each.ids)):
            self._read_group(group, bar)
        for manuscript in waiting:
            if len(manuscript.ids) > self.context:
                self._read_long(manuscript, bar)

    def _read_group(self, group: list[Manuscript], bar: ProgressBar) -> None:
        """Read documents of one window at most, as the rows of a batch."""
        banks = [self.model.new_memory() for _ in group]
        self._window([each.ids for each in group], banks)
        for manuscript, bank in zip(group, banks, strict=True):
            self.partial.take(manuscript, bank, self._facts(manuscript))
            self._advance(bar, manuscript, len(manuscript.ids))
        self.partial.save_if_due()

    def _read_long(self, manuscript: Manuscript, bar: ProgressBar) -> None:
        """Read a document window by window, from where a run that was stopped has come to."""
        bank = self.partial.resume(manuscript, self._facts(manuscript))
        for start in range(bank.length(), len(manuscript.ids), self.context):
            window = manuscript.ids[start : start + self.context]
            self._window([window], [bank])
            self._advance(bar, manuscript, len(window))
            if start + self.context < len(manuscript.ids):
                self.partial.save_if_due(within=True)
        self.partial.finish()
        self.partial.save_if_due()

    def _window(self, rows: Sequence[Tensor], banks: list[MemoryBank]) -> None:
        read_window(self.model, rows, banks)

    def _advance(self, bar: ProgressBar, manuscript: Manuscript, tokens: int) -> None:
        self.report.tokens += tokens
        bar.advance(tokens, description=manuscript.label)

    def _facts(self, manuscript: Manuscript) -> dict[str, Any]:
        return facts_of(manuscript) | {"model": self.name, "context_length": self.context}

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
        held = self.bank.nbytes
        needed = (2 * tokens * token_bytes(self.bank) + held) if tokens else 0
        free = shutil.disk_usage(self.memory.absolute().parent).free
        if needed > free:
            raise LlamoryError(
                f"Reading {tokens:,} tokens needs {needed / 1e9:.1f} GB on the disk of {self.memory}, which has "
                f"{free / 1e9:.1f} GB left: free some space, or keep the memory as int8 or of fewer layers."
            )

    def _write(self, plan: Plan) -> None:
        """Put the new memory together and in the old one's place."""
        report = self.report
        report.unchanged, report.removed = len(plan.unchanged), len(plan.removed)
        report.replaced = len(plan.replaced)
        report.added = len(plan.read) - report.replaced
        if plan.changes:
            plan.apply(self.bank, self.partial.bank, self._facts)
            self.bank.save(self.memory)
        self.partial.drop(plan.read.values())
        report.documents, report.memory_tokens = len(self.bank.segments), self.bank.length()
        report.bytes = self.memory.stat().st_size


@contextmanager
def _alone_with(memory: Path) -> Iterator[None]:
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

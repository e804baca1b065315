"""Questions to a library: documents are found, their memories mounted, and the answer says what it rests on."""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llamory.common import ram
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.ingest.stored_documents import StoredDocument
from llamory.library.citations import Citation, cite, sum_mass_by_chunk
from llamory.library.paths import memory_folder
from llamory.library.reader import SEGMENT, Reader, ReaderSettings, has_reader_config
from llamory.memory import MemoryBank
from llamory.qa.attribution import AttentionRecorder
from llamory.qa.chat import Chat
from llamory.qa.generation import OOM_ADVICE, Answer, GenerationSettings, check_question

if TYPE_CHECKING:
    from llamory.documents import Chunk
    from llamory.library.search import Hit, SearchMode

logger = logging.getLogger(__name__)

DEFAULT_TOP_DOCUMENTS = 5
DEFAULT_CITATIONS = 5
# Passages that are looked at per document that is wanted: the best ones are often of the same document.
_PASSAGES_PER_DOCUMENT = 4
_NAMES_SHOWN = 5


class DocumentStore(Protocol):
    """What questions and memories need of a library; `Library` is one."""

    path: str

    def sources(self) -> list[str]:
        """The documents' sources, sorted."""
        ...

    def passages_of(self, sources: Iterable[str]) -> dict[str, list[Chunk]]:
        """The passages of several documents, by source; unknown sources are left out."""
        ...

    def search(
        self, query: str, top: int = 10, *, source: str | Iterable[str] | None = None, mode: SearchMode = "fused"
    ) -> list[Hit]:
        """The passages that answer a query, best first."""
        ...


@dataclass
class CitedAnswer(Answer):
    """What was asked of a library and answered.

    Attributes:
        citations: the passages whose memory got the most attention, most first.
        tokens_read: tokens of documents that had to be read, as their memory wasn't there.
        seconds_to_find: how long finding the documents took.
        seconds_to_attach: how long mounting (and reading) them took.
        seconds_to_first_token: from the question to the answer's first token, all of this included.
    """

    citations: list[Citation] = field(default_factory=list)
    tokens_read: int = 0
    seconds_to_find: float = 0.0
    seconds_to_attach: float = 0.0


@dataclass
class LoadedMemory:
    """Memories of documents as one.

    Attributes:
        memory: a segment per document, named by its source.
        documents: those in memory; of several with the same text the first.
        tokens_read: tokens that had to be read for it.
    """

    memory: MemoryBank
    documents: list[StoredDocument]
    tokens_read: int = 0


class QASession:
    """Where a library's memories are mounted and questions answered.

    Args:
        library: the library.
        settings: who reads, and how.
        device, bf16: where and how the reader computes.
        progress: show on standard error how far reading has come.
    """

    def __init__(
        self,
        library: DocumentStore,
        settings: ReaderSettings,
        *,
        device: str | None = None,
        bf16: bool = False,
        progress: bool = True,
    ):
        self.library, self.progress = library, progress
        self._settings, self._device, self._bf16 = settings, device, bf16
        self.folder = memory_folder(library.path)

    @cached_property
    def reader(self) -> Reader:
        """The reader, loaded when it is first needed."""
        settings = self._settings.with_saved_config(self.folder)
        with ram.translate_oom(OOM_ADVICE):
            reader = Reader(settings, self.folder, device=self._device, bf16=self._bf16)
        self.save_reader_config(change=False)
        return reader

    def reader_factory(self) -> Callable[[], Reader]:
        """Makes this qa_session's reader in another process."""
        settings = self._settings.with_saved_config(self.folder)
        return partial(Reader, settings, self.folder, device=self._device, bf16=self._bf16)

    def save_reader_config(self, *, change: bool) -> None:
        """Note the reader for those who open the library later, unless (with `change`: even if) another one is."""
        settings = self._settings.with_saved_config(self.folder)
        try:
            if change or not has_reader_config(self.folder):
                settings.save_config(self.folder)
        except OSError as error:
            logger.warning("The library's reader can't be noted: %s.", error)

    # ---- which documents ---------------------------------------------------------------------------------------------

    def find(
        self,
        question: str,
        top_documents: int,
        source: str | Sequence[str] | None = None,
        mode: SearchMode | None = None,
    ) -> list[str]:
        """Sources of the documents with the best passages for a question, best first."""
        if top_documents < 1:
            raise LlamoryError(f"An answer must be from at least 1 document, not {top_documents}.")
        passages = top_documents * _PASSAGES_PER_DOCUMENT
        search_options: dict[str, Any] = {} if mode is None else {"mode": mode}
        while True:
            hits = self.library.search(question, passages, source=source, **search_options)
            sources = list(dict.fromkeys(hit.source for hit in hits))
            if len(sources) >= top_documents or len(hits) < passages:
                return sources[:top_documents]
            passages *= _PASSAGES_PER_DOCUMENT

    def resolve_documents(self, names: Sequence[str]) -> list[str]:
        """Sources of documents by name: a source, the end of one, a file's name without suffix, or a pattern with `*`.

        Raises:
            LlamoryError: there is no such document, or a name without `*` or `?` fits several.
        """
        sources, resolved = self.library.sources(), dict[str, None]()
        for name in names:
            found = _match_name(name, sources)
            if not found or (len(found) > 1 and not _is_pattern(name)):
                listed = ", ".join((found or sources)[:_NAMES_SHOWN])
                num_hidden = len(found or sources) - _NAMES_SHOWN
                listed += f" and {num_hidden} more" if num_hidden > 0 else ""
                problem = f"{name} may be several documents" if found else f"There is no document {name} in the library"
                raise LlamoryError(f"{problem}; give one of these names: {listed}.")
            resolved |= dict.fromkeys(found)
        return list(resolved)

    # ---- their memories ----------------------------------------------------------------------------------------------

    def attach(self, sources: Iterable[str]) -> LoadedMemory:
        """One memory of all these documents, in this order; those that aren't in memory yet are read.

        Raises:
            LlamoryError: memory is short.
        """
        documents: dict[str, StoredDocument] = {}
        for document in self.documents(list(sources)):
            documents.setdefault(self.reader.key(document), document)
        banks = {key: self.reader.cached_memory(document) for key, document in documents.items()}
        missing = [document for key, document in documents.items() if banks[key] is None]
        tokens_read = 0
        for document, new_bank in self._read(missing):
            banks[self.reader.key(document)] = new_bank
            tokens_read += new_bank.length()
        memory = self.reader.model.new_memory()
        for key, document in documents.items():
            bank = banks[key]
            assert bank is not None
            memory.attach(bank, [SEGMENT])
            memory.rename(SEGMENT, document.source)
        return LoadedMemory(memory, list(documents.values()), tokens_read)

    def _read(self, documents: list[StoredDocument]) -> Iterator[tuple[StoredDocument, MemoryBank]]:
        """Read documents and keep their memories, where that is possible."""
        if not documents:
            return
        tokens = sum(len(self.reader.tokenize(document).ids) for document in documents)
        with (
            ram.translate_oom(OOM_ADVICE),
            ProgressBar("Reading", tokens, unit="tokens", shown=self.progress, speed=True) as bar,
        ):
            for document, bank in self.reader.read(documents, lambda name, read: bar.advance(read, description=name)):
                try:
                    stored = self.reader.store(document, bank)
                except OSError as error:
                    # The question can be answered all the same.
                    logger.warning("The memory of %s can't be kept: %s.", document.source, error)
                    stored = bank
                yield document, stored

    def documents(self, sources: Sequence[str]) -> list[StoredDocument]:
        """The documents of these sources, as the library has them now."""
        passages = self.library.passages_of(sources)
        return [StoredDocument(source, tuple(passages[source])) for source in sources if source in passages]

    # ---- answers -----------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: str,
        *,
        documents: Sequence[str] | None = None,
        top_documents: int = DEFAULT_TOP_DOCUMENTS,
        source: str | Sequence[str] | None = None,
        mode: SearchMode | None = None,
        citations: int = DEFAULT_CITATIONS,
        **kwargs: Any,
    ) -> CitedAnswer:
        """Ask a question; see `Library.ask`."""
        chat = LibraryChat(
            self, documents=documents, top_documents=top_documents, source=source, mode=mode, citations=citations
        )
        return chat.ask(question, **kwargs)

    def cite(
        self,
        recorder: AttentionRecorder,
        attached_documents: Sequence[StoredDocument],
        chat: Chat,
        baseline_tokens: int,
        answer: Answer,
        max_citations: int,
    ) -> list[Citation]:
        """The passages that drew the most attention.

        Args:
            recorder: what was noted of question and answer.
            attached_documents: the documents in memory.
            chat: which answered from them, or from pieces of them.
            baseline_tokens: tokens of the prompt that are the same for every question.
            answer: what was asked and answered.
            max_citations: so many at most.
        """
        if not max_citations:
            return []
        model = self.reader.model.model
        mass = recorder.mass(
            chat.memory,
            answer.evidence_documents,
            {layer: model.layers[layer].self_attn.scaling for layer in chat.memory.layers},
            baseline_tokens=baseline_tokens,
            question=answer.question_tokens,
            answer=answer.answer_tokens,
        )
        mass_by_document = {
            name: torch.zeros(2, chat.document_memory.length(segment=name), dtype=torch.float64)
            for name in answer.evidence_documents
        }
        # As in `chat.memory`: pieces of one document follow one another.
        evidence = [span for name in answer.evidence_documents for span in chat.evidence if span.segment == name]
        lengths = [span.stop - span.start for span in evidence]
        for (name, start, stop), tokens in zip(evidence, torch.stack(mass).split(lengths, dim=1), strict=True):
            mass_by_document[name][:, start:stop] = tokens
        cited_documents = [document for document in attached_documents if document.source in mass_by_document]
        masses = [
            sum_mass_by_chunk(mass_by_document[each.source], chat.document_memory.metadata(each.source)["starts"])
            for each in cited_documents
        ]
        return cite(
            [passage for document in cited_documents for passage in document.passages], torch.cat(masses), max_citations
        )


class LibraryChat:
    """A conversation with a library: what each question needs is mounted, and what was said stays in memory.

        chat = Library("notes.lib").chat()
        print(chat.ask("Who built the bridge?").text)
        print(chat.ask("And when?").text)

    Args:
        qa_session: the library's.
        documents: only these documents, mounted for the whole conversation; by default each question finds its own.
        top_documents: documents that a question finds.
        source: only documents of these sources, as for `Library.search`.
        mode: how documents are searched, as for `Library.search`.
        citations: how many passages an answer cites.
    """

    def __init__(
        self,
        qa_session: QASession,
        *,
        documents: Sequence[str] | None = None,
        top_documents: int = DEFAULT_TOP_DOCUMENTS,
        source: str | Sequence[str] | None = None,
        mode: SearchMode | None = None,
        citations: int = DEFAULT_CITATIONS,
    ):
        self._qa_session, self._top_documents, self._citations = qa_session, top_documents, citations
        self._source, self._mode = source, mode
        self._fixed_sources = None if documents is None else qa_session.resolve_documents(documents)
        self._attached: list[StoredDocument] = []
        self._recorder = AttentionRecorder()
        self._chat: Chat | None = None

    @property
    def turns(self) -> list[Answer]:
        """The answers so far."""
        return [] if self._chat is None else self._chat.turns

    def ask(self, question: str, **kwargs: Any) -> CitedAnswer:
        """Ask the next question.

        Args:
            question: what to ask.
            kwargs: fields of `llamory.qa.generation.GenerationSettings`, such as `max_new_tokens` and `on_text`.

        Raises:
            LlamoryError: the question is blank or too long, nothing was found, or memory is short.
        """
        settings = GenerationSettings(**kwargs)
        check_question(question)
        reader = self._qa_session.reader
        reader.generator.first_prompt(
            question, settings.max_question_tokens
        )  # says early what is wrong with the question
        started = time.perf_counter()
        sources = self._fixed_sources
        if sources is None:
            sources = self._qa_session.find(question, self._top_documents, self._source, self._mode)
        found_at = time.perf_counter()
        tokens_read = self._attach_documents(sources)
        ready_at = time.perf_counter()
        assert self._chat is not None
        self._recorder.clear()
        answer = self._chat.ask(question, **kwargs)
        baseline_tokens = reader.generator.num_baseline_tokens(question, first=len(self._chat.turns) == 1)
        cited = CitedAnswer(
            **vars(answer)
            | {
                "seconds_to_first_token": ready_at - started + answer.seconds_to_first_token,
                "seconds": ready_at - started + answer.seconds,
            },
            citations=self._qa_session.cite(
                self._recorder, self._attached, self._chat, baseline_tokens, answer, self._citations
            ),
            tokens_read=tokens_read,
            seconds_to_find=found_at - started,
            seconds_to_attach=ready_at - found_at,
        )
        self._chat.turns[-1] = cited
        return cited

    def save(self, path: Any) -> None:
        """Write a memory file of the mounted documents and of what was said, for `llamory ask --memory`."""
        if self._chat is None:
            raise LlamoryError("Nothing was said yet, so there is no memory to write.")
        self._chat.save(path)

    def _attach_documents(self, sources: Sequence[str]) -> int:
        """Mount what isn't there yet; gives the tokens that had to be read."""
        existing = {document.source for document in self._attached}
        new = [source for source in sources if source not in existing]
        if not new and self._chat is not None:
            return 0
        loaded = self._qa_session.attach(new)
        if self._chat is None:
            if not loaded.documents:
                raise LlamoryError("No document was found that fits; ask in other words, or of other sources.")
            self._chat = Chat(self._qa_session.reader.generator, loaded.memory, observer=self._recorder)
        else:
            self._chat.attach(loaded.memory, [document.source for document in loaded.documents])
        self._attached += loaded.documents
        return loaded.tokens_read


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _match_name(name: str, sources: Sequence[str]) -> list[str]:
    """Sources that a name may mean, by the first rule that fits any."""

    def is_path_suffix(source: str) -> bool:
        return source.replace("\\", "/").endswith(f"/{name}")

    def is_stem(source: str) -> bool:
        return PurePath(source).stem == name

    rules: list[Callable[[str], bool]] = [name.__eq__, is_path_suffix, is_stem]
    if _is_pattern(name):
        rules = [lambda source: fnmatch.fnmatchcase(source, name) or fnmatch.fnmatchcase(source, f"*/{name}")]
    for rule in rules:
        if found := [source for source in sources if rule(source)]:
            return found
    return []

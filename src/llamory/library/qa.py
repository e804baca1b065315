"""Questions to a library: documents are found, their memories mounted, and the answer says what it rests on."""

from __future__ import annotations

import fnmatch
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch

from llamory.common import ram
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.ingest.stored_documents import StoredDocument
from llamory.library.citations import Citation, cite, passage_masses
from llamory.library.paths import memory_folder
from llamory.library.reader import SEGMENT, Reader, ReaderSettings, is_noted
from llamory.memory import MemoryBank
from llamory.qa.attribution import AttentionRecorder
from llamory.qa.chat import Chat
from llamory.qa.generation import ADVICE, Answer, Manner, check_question

if TYPE_CHECKING:
    from llamory.library.readable import Readable
    from llamory.library.search import Mode

logger = logging.getLogger(__name__)

DEFAULT_DOCUMENTS = 5
DEFAULT_CITATIONS = 5
# Passages that are looked at per document that is wanted: the best ones are often of the same document.
_PASSAGES_PER_DOCUMENT = 4
_NAMES_SHOWN = 5


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
class Mounted:
    """Memories of documents as one.

    Attributes:
        memory: a segment per document, named by its source.
        documents: those in memory; of several with the same text the first.
        tokens_read: tokens that had to be read for it.
    """

    memory: MemoryBank
    documents: list[StoredDocument]
    tokens_read: int = 0


class Desk:
    """Where a library's memories are mounted and questions answered.

    Args:
        library: the library.
        settings: who reads, and how.
        device, bf16: where and how the reader computes.
        progress: show on standard error how far reading has come.
    """

    def __init__(
        self,
        library: Readable,
        settings: ReaderSettings,
        *,
        device: str | None = None,
        bf16: bool = False,
        progress: bool = True,
    ):
        self.library, self.progress = library, progress
        self._given, self._device, self._bf16 = settings, device, bf16
        self.folder = memory_folder(library.path)

    @cached_property
    def reader(self) -> Reader:
        """The reader, loaded when it is first needed."""
        settings = self._given.with_noted(self.folder)
        with ram.translate_oom(ADVICE):
            reader = Reader(settings, self.folder, device=self._device, bf16=self._bf16)
        self.note_reader(change=False)
        return reader

    def reader_maker(self) -> Callable[[], Reader]:
        """Makes this desk's reader in another process."""
        settings = self._given.with_noted(self.folder)
        return partial(Reader, settings, self.folder, device=self._device, bf16=self._bf16)

    def note_reader(self, *, change: bool) -> None:
        """Note the reader for those who open the library later, unless (with `change`: even if) another one is."""
        settings = self._given.with_noted(self.folder)
        try:
            if change or not is_noted(self.folder):
                settings.note(self.folder)
        except OSError as error:
            logger.warning("The library's reader can't be noted: %s.", error)

    # ---- which documents ---------------------------------------------------------------------------------------------

    def find(
        self, question: str, top: int, source: str | Sequence[str] | None = None, mode: Mode | None = None
    ) -> list[str]:
        """Sources of the documents with the best passages for a question, best first."""
        if top < 1:
            raise LlamoryError(f"An answer must be from at least 1 document, not {top}.")
        passages = top * _PASSAGES_PER_DOCUMENT
        how: dict[str, Any] = {} if mode is None else {"mode": mode}
        while True:
            hits = self.library.search(question, passages, source=source, **how)
            sources = list(dict.fromkeys(hit.source for hit in hits))
            if len(sources) >= top or len(hits) < passages:
                return sources[:top]
            passages *= _PASSAGES_PER_DOCUMENT

    def choose(self, names: Sequence[str]) -> list[str]:
        """Sources of documents by name: a source, the end of one, a file's name without suffix, or a pattern with `*`.

        Raises:
            LlamoryError: there is no such document, or a name without `*` or `?` fits several.
        """
        sources, chosen = self.library.sources(), dict[str, None]()
        for name in names:
            found = _named(name, sources)
            if not found or (len(found) > 1 and not _is_pattern(name)):
                shown = ", ".join((found or sources)[:_NAMES_SHOWN])
                more = len(found or sources) - _NAMES_SHOWN
                shown += f" and {more} more" if more > 0 else ""
                what = f"{name} may be several documents" if found else f"There is no document {name} in the library"
                raise LlamoryError(f"{what}; give one of these names: {shown}.")
            chosen |= dict.fromkeys(found)
        return list(chosen)

    # ---- their memories ----------------------------------------------------------------------------------------------

    def attach(self, sources: Iterable[str]) -> Mounted:
        """One memory of all these documents, in this order; those that aren't in memory yet are read.

        Raises:
            LlamoryError: memory is short.
        """
        documents: dict[str, StoredDocument] = {}
        for document in self.documents(list(sources)):
            documents.setdefault(self.reader.key(document), document)
        banks = {key: self.reader.known(document) for key, document in documents.items()}
        missing = [document for key, document in documents.items() if banks[key] is None]
        tokens_read = 0
        for document, fresh in self._read(missing):
            banks[self.reader.key(document)] = fresh
            tokens_read += fresh.length()
        memory = self.reader.model.new_memory()
        for key, document in documents.items():
            bank = banks[key]
            assert bank is not None
            memory.attach(bank, [SEGMENT])
            memory.rename(SEGMENT, document.source)
        return Mounted(memory, list(documents.values()), tokens_read)

    def _read(self, documents: list[StoredDocument]) -> Iterator[tuple[StoredDocument, MemoryBank]]:
        """Read documents and keep their memories, where that is possible."""
        if not documents:
            return
        tokens = sum(len(self.reader.tokenize(document).ids) for document in documents)
        with (
            ram.translate_oom(ADVICE),
            ProgressBar("Reading", tokens, unit="tokens", shown=self.progress, speed=True) as bar,
        ):
            for document, bank in self.reader.read(documents, lambda name, read: bar.advance(read, description=name)):
                try:
                    kept = self.reader.keep(document, bank)
                except OSError as error:
                    # The question can be answered all the same.
                    logger.warning("The memory of %s can't be kept: %s.", document.source, error)
                    kept = bank
                yield document, kept

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
        top: int = DEFAULT_DOCUMENTS,
        source: str | Sequence[str] | None = None,
        mode: Mode | None = None,
        citations: int = DEFAULT_CITATIONS,
        **manner: Any,
    ) -> CitedAnswer:
        """Ask a question; see `Library.ask`."""
        chat = LibraryChat(self, documents=documents, top=top, source=source, mode=mode, citations=citations)
        return chat.say(question, **manner)

    def cite(
        self,
        log: AttentionRecorder,
        mounted: Sequence[StoredDocument],
        chat: Chat,
        own: int,
        answer: Answer,
        most: int,
    ) -> list[Citation]:
        """The passages that drew the most attention.

        Args:
            log: what was noted of question and answer.
            mounted: the documents in memory.
            chat: which answered from them, or from pieces of them.
            own: tokens of the prompt that are the same for every question.
            answer: what was asked and answered.
            most: so many at most.
        """
        if not most:
            return []
        model = self.reader.model.model
        mass = log.mass(
            chat.memory,
            answer.used_documents,
            {layer: model.layers[layer].self_attn.scaling for layer in chat.memory.layers},
            baseline_tokens=own,
            question=answer.question_tokens,
            answer=answer.answer_tokens,
        )
        whole = {
            name: torch.zeros(2, chat.known.length(segment=name), dtype=torch.float64) for name in answer.used_documents
        }
        # As in `chat.memory`: pieces of one document follow one another.
        pieces = [piece for name in answer.used_documents for piece in chat.pieces if piece.segment == name]
        lengths = [piece.stop - piece.start for piece in pieces]
        for (name, start, stop), tokens in zip(pieces, torch.stack(mass).split(lengths, dim=1), strict=True):
            whole[name][:, start:stop] = tokens
        used = [document for document in mounted if document.source in whole]
        masses = [passage_masses(whole[each.source], chat.known.metadata(each.source)["starts"]) for each in used]
        return cite([passage for document in used for passage in document.passages], torch.cat(masses), most)


class LibraryChat:
    """A conversation with a library: what each question needs is mounted, and what was said stays in memory.

        chat = Library("notes.lib").chat()
        print(chat.say("Who built the bridge?").text)
        print(chat.say("And when?").text)

    Args:
        desk: the library's.
        documents: only these documents, mounted for the whole conversation; by default each question finds its own.
        top: documents that a question finds.
        source: only documents of these sources, as for `Library.search`.
        mode: how documents are searched, as for `Library.search`.
        citations: how many passages an answer cites.
    """

    def __init__(
        self,
        desk: Desk,
        *,
        documents: Sequence[str] | None = None,
        top: int = DEFAULT_DOCUMENTS,
        source: str | Sequence[str] | None = None,
        mode: Mode | None = None,
        citations: int = DEFAULT_CITATIONS,
    ):
        self._desk, self._top, self._citations = desk, top, citations
        self._source, self._mode = source, mode
        self._chosen = None if documents is None else desk.choose(documents)
        self._mounted: list[StoredDocument] = []
        self._log = AttentionRecorder()
        self._chat: Chat | None = None

    @property
    def turns(self) -> list[Answer]:
        """The answers so far."""
        return [] if self._chat is None else self._chat.turns

    def say(self, question: str, **manner: Any) -> CitedAnswer:
        """Ask the next question.

        Args:
            question: what to ask.
            manner: fields of `llamory.qa.generation.Manner`, such as `max_new_tokens` and `on_text`.

        Raises:
            LlamoryError: the question is blank or too long, nothing was found, or memory is short.
        """
        how = Manner(**manner)
        check_question(question)
        reader = self._desk.reader
        reader.speaker.first_prompt(question, how.max_question_tokens)  # says early what is wrong with the question
        started = time.perf_counter()
        sources = self._chosen
        if sources is None:
            sources = self._desk.find(question, self._top, self._source, self._mode)
        found = time.perf_counter()
        tokens_read = self._mount(sources)
        ready = time.perf_counter()
        assert self._chat is not None
        self._log.clear()
        answer = self._chat.say(question, **manner)
        own = reader.speaker.own_words(question, first=len(self._chat.turns) == 1)
        cited = CitedAnswer(
            **vars(answer)
            | {
                "seconds_to_first_token": ready - started + answer.seconds_to_first_token,
                "seconds": ready - started + answer.seconds,
            },
            citations=self._desk.cite(self._log, self._mounted, self._chat, own, answer, self._citations),
            tokens_read=tokens_read,
            seconds_to_find=found - started,
            seconds_to_attach=ready - found,
        )
        self._chat.turns[-1] = cited
        return cited

    def save(self, path: Any) -> None:
        """Write a memory file of the mounted documents and of what was said, for `llamory ask --memory`."""
        if self._chat is None:
            raise LlamoryError("Nothing was said yet, so there is no memory to write.")
        self._chat.save(path)

    def _mount(self, sources: Sequence[str]) -> int:
        """Mount what isn't there yet; gives the tokens that had to be read."""
        there = {document.source for document in self._mounted}
        new = [source for source in sources if source not in there]
        if not new and self._chat is not None:
            return 0
        mounted = self._desk.attach(new)
        if self._chat is None:
            if not mounted.documents:
                raise LlamoryError("No document was found that fits; ask in other words, or of other sources.")
            self._chat = Chat(self._desk.reader.speaker, mounted.memory, observer=self._log)
        else:
            self._chat.attach(mounted.memory, [document.source for document in mounted.documents])
        self._mounted += mounted.documents
        return mounted.tokens_read


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _named(name: str, sources: Sequence[str]) -> list[str]:
    """Sources that a name may mean, by the first rule that fits any."""

    def ends_so(source: str) -> bool:
        return source.replace("\\", "/").endswith(f"/{name}")

    def is_stem(source: str) -> bool:
        return PurePath(source).stem == name

    rules: list[Callable[[str], bool]] = [name.__eq__, ends_so, is_stem]
    if _is_pattern(name):
        rules = [lambda source: fnmatch.fnmatchcase(source, name) or fnmatch.fnmatchcase(source, f"*/{name}")]
    for rule in rules:
        if found := [source for source in sources if rule(source)]:
            return found
    return []

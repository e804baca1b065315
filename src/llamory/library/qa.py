"""Questions to a library: finds the documents of a question and loads their memories; `QASession` does the rest."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Protocol

from llamory.common import ram
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.ingest.documents import StoredDocument, TokenizedDocument
from llamory.library.memory_cache import memory_folder
from llamory.library.reader import SEGMENT, Reader, ReaderConfig
from llamory.qa.chat import LoadedMemory, QASession, not_one_document
from llamory.qa.generation import OOM_ADVICE, Generator

if TYPE_CHECKING:
    from llamory.documents import Chunk
    from llamory.library.search import Hit, SearchMode
    from llamory.memory import MemoryBank

logger = logging.getLogger(__name__)

DEFAULT_TOP_DOCUMENTS = 5
DEFAULT_CITATIONS = 5
SESSION_SETTINGS = frozenset({"documents", "top_documents", "source", "mode", "citations"})
_PASSAGES_PER_DOCUMENT = 4  # to search: the best ones are often of the same document


class DocumentStore(Protocol):
    """What questions need of a library; `Library` is one."""

    path: str

    def sources(self) -> list[str]:
        """The documents' sources, sorted."""

    def passages_of(self, sources: Iterable[str]) -> dict[str, list[Chunk]]:
        """The passages of several documents, by source; unknown sources are left out."""

    def search(
        self, query: str, top: int = 10, *, source: str | Iterable[str] | None = None, mode: SearchMode = "fused"
    ) -> list[Hit]:
        """The passages that answer a query, best first."""


class LibrarySource:
    """A library as a source of documents for `QASession`.

    Args:
        config, options: as for `llamory.library.reader.Reader`.
        progress: show a progress bar on standard error when documents are encoded.
    """

    def __init__(self, library: DocumentStore, config: ReaderConfig, *, progress: bool = True, **options: Any):
        self.library, self.progress, self.folder = library, progress, memory_folder(library.path)
        self._config, self._options = config, options

    @cached_property
    def reader(self) -> Reader:
        """The reader; it is loaded when it is first needed, and saved as the library's if that has none."""
        with ram.translate_oom(OOM_ADVICE):
            reader = self.reader_factory()()
        self.save_reader_config(change=False)
        return reader

    @property
    def generator(self) -> Generator:
        """The reader's generator."""
        return self.reader.generator

    def reader_factory(self) -> Callable[[], Reader]:
        """A picklable function that makes the reader, in another process too."""
        config = self._config.with_saved(self.folder)
        return partial(Reader, config, self.folder, **self._options)

    def save_reader_config(self, *, change: bool) -> None:
        """Save the reader's configuration with the library, if it has none or `change` is set."""
        config = self._config.with_saved(self.folder)
        try:
            if change or not ReaderConfig.is_saved(self.folder):
                config.save(self.folder)
        except OSError as error:
            logger.warning("The library's reader can't be saved: %s.", error)

    def session(
        self,
        *,
        documents: Sequence[str] | None = None,
        top_documents: int = DEFAULT_TOP_DOCUMENTS,
        source: str | Sequence[str] | None = None,
        mode: SearchMode | None = None,
        citations: int = DEFAULT_CITATIONS,
    ) -> QASession:
        """A session of questions; arguments and errors as for `Library.chat`."""
        if documents is not None:
            resolved = self.resolve_documents(documents)
            return QASession(self, lambda _: resolved, citations=citations)
        find = partial(self.find, top_documents=top_documents, source=source, mode=mode)
        return QASession(self, find, citations=citations)

    def find(
        self,
        question: str,
        top_documents: int = DEFAULT_TOP_DOCUMENTS,
        source: str | Sequence[str] | None = None,
        mode: SearchMode | None = None,
    ) -> list[str]:
        """Sources of the documents with the best passages for a question, best first."""
        if top_documents < 1:
            raise LlamoryError(f"top_documents must be at least 1 document, not {top_documents}.")
        passages = top_documents * _PASSAGES_PER_DOCUMENT
        while True:
            hits = self.library.search(question, passages, source=source, mode=mode or "fused")
            sources = list(dict.fromkeys(hit.source for hit in hits))
            if len(sources) >= top_documents or len(hits) < passages:
                return sources[:top_documents]
            passages *= _PASSAGES_PER_DOCUMENT

    def resolve_documents(self, names: Sequence[str]) -> list[str]:
        """Sources of documents by name: a source, the end of one, a file's name without suffix, or a pattern with `*`.

        Raises:
            LlamoryError: there is no such document, or a name without `*` or `?` matches several.
        """
        sources, resolved = self.library.sources(), dict[str, None]()
        for name in names:
            found = _match_name(name, sources)
            if not found or (len(found) > 1 and not _is_pattern(name)):
                raise not_one_document(name, found, sources, "in the library")
            resolved |= dict.fromkeys(found)
        return list(resolved)

    def load(self, sources: Sequence[str]) -> LoadedMemory:
        """The memory of documents, a segment each in this order; of documents with the same content only the first."""
        documents: dict[str, StoredDocument] = {}
        for document in self.documents(sources):
            documents.setdefault(self.reader.key(document), document)
        banks = {key: self.reader.cached_memory(key) for key in documents}
        missing = [self.reader.tokenize(document) for key, document in documents.items() if banks[key] is None]
        banks |= {self.reader.key(document): bank for document, bank in self._encode(missing)}
        memory = self.reader.model.new_memory()
        for key, document in documents.items():
            bank = banks[key]
            assert bank is not None
            part = bank.fork()
            part.rename(SEGMENT, document.source)
            memory.attach(part)
        chunks = {document.source: document.chunks for document in documents.values()}
        return LoadedMemory(memory, sum(len(document.ids) for document in missing), chunks)

    def _encode(self, documents: list[TokenizedDocument]) -> Iterator[tuple[TokenizedDocument, MemoryBank]]:
        """Encode documents and store their memories in the cache, if that is possible."""
        if not documents:
            return
        num_tokens = sum(len(document.ids) for document in documents)
        with ProgressBar("Reading", num_tokens, unit="tokens", shown=self.progress, speed=True) as bar:
            for document, bank in self.reader.read(
                documents, lambda name, tokens: bar.advance(tokens, description=name)
            ):
                try:
                    stored = self.reader.store(document, bank)
                except OSError as error:
                    # The question can be answered all the same.
                    logger.warning("The memory of %s can't be stored: %s.", document.source, error)
                    stored = bank
                yield document, stored

    def documents(self, sources: Sequence[str]) -> list[StoredDocument]:
        """The documents of these sources; unknown ones are left out."""
        chunks = self.library.passages_of(sources)
        return [StoredDocument(source, tuple(chunks[source])) for source in sources if source in chunks]


def _is_pattern(name: str) -> bool:
    return "*" in name or "?" in name


def _match_name(name: str, sources: Sequence[str]) -> list[str]:
    """Sources that a name matches, by the first rule that matches any."""
    if _is_pattern(name):
        return [each for each in sources if fnmatch.fnmatchcase(each, name) or fnmatch.fnmatchcase(each, f"*/{name}")]
    return (
        [each for each in sources if each == name]
        or [each for each in sources if each.replace("\\", "/").endswith(f"/{name}")]
        or [each for each in sources if PurePath(each).stem == name]
    )

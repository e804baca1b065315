"""What a library does with a reader: answers, conversations, memories ahead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llamory.library.paths import memory_folder

if TYPE_CHECKING:
    from llamory.documents import Chunk
    from llamory.library.prefill import MemoryReport
    from llamory.library.qa import CitedAnswer, LibraryChat, QASession
    from llamory.library.reader import ReaderSettings
    from llamory.library.search import Hit, SearchMode
    from llamory.library.store import PassageStore


class LibraryQAMixin:
    """The part of `Library` that reads; the other one indexes and searches."""

    path: str
    _store: PassageStore | None
    _reader_settings: ReaderSettings
    _device: str | None
    _bf16: bool
    _qa_session: QASession | None = None

    def sources(self) -> list[str]:
        """The documents' sources, sorted."""
        return [] if self._store is None else sorted(self._store.documents())

    def passages(self, source: str) -> list[Chunk]:
        """A document's passages, in order; none if there is no such document."""
        return self.passages_of([source]).get(source, [])

    def passages_of(self, sources: Iterable[str]) -> dict[str, list[Chunk]]:
        """The passages of several documents, by source; one that isn't there is left out."""
        return {} if self._store is None else self._store.passages(set(sources))

    # ---- asking ------------------------------------------------------------------------------------------------------

    def ask(self, question: str, *, progress: bool = False, **settings: Any) -> CitedAnswer:
        """Find documents, attach their memory, and answer from it.

        A document whose memory isn't there yet is read first; the next question has it. Nothing else of the documents
        is read.

            answer = Library("notes.lib").ask("Who built the bridge?")
            print(answer.text)
            for citation in answer.citations:
                print(citation.location, citation.share)

        Args:
            question: the question.
            progress: show on standard error how far reading documents has come.
            settings: `documents` (names, instead of finding them), `top` (documents to find, 5), `source` and
                `mode` (as for `search`), `citations` (the most passages to cite, 5), `max_new_tokens`, `temperature`,
                `seed`, `max_question_tokens`, `on_text` (called with each piece of the answer as it comes) and `evidence_ratio`
                (what in memory is left out, as for `llamory.qa.open_memory.OpenMemory.ask`).

        Raises:
            LlamoryError: the library is empty, nothing was found, the reader can't be used, or the question is blank.
        """
        return self.qa_session(progress=progress).ask(question, **settings)

    def chat(self, *, progress: bool = False, **settings: Any) -> LibraryChat:
        """A conversation: each question's documents are mounted, and what was said stays in memory.

        Args:
            progress: as for `ask`.
            settings: `documents`, `top`, `source`, `mode` and `citations`, as for `ask`.
        """
        from llamory.library.qa import LibraryChat

        return LibraryChat(self.qa_session(progress=progress), **settings)

    def precompute_memory(
        self, *, engine: str = "local", ray_address: str | None = None, progress: bool = True
    ) -> MemoryReport:
        """Read the documents that have no memory yet, as many as the budget has room for.

        Args:
            engine: `local` reads in this process, `ray` on the workers of a Ray cluster.
            ray_address: as for `Library.add`.
            progress: show a progress bar on standard error.

        Raises:
            LlamoryError: the library is empty, or the reader can't be used.
        """
        from llamory.library.prefill import precompute_memory

        return precompute_memory(self.qa_session(), progress=progress, engine=engine, ray_address=ray_address)

    def qa_session(self, *, progress: bool = False) -> QASession:
        """Where memories are mounted and questions answered.

        Args:
            progress: show on standard error how far reading has come.
        """
        from llamory.library.qa import QASession

        self._require_store()
        if self._qa_session is None:
            self._qa_session = QASession(self, self._reader_settings, device=self._device, bf16=self._bf16)
        self._qa_session.progress = progress
        return self._qa_session

    def memory_info(self) -> dict[str, Any]:
        """What memories take: their number, `bytes` and `reader` (None for the default); empty if there are none."""
        from llamory.library.memory_cache import MemoryCache
        from llamory.library.reader import saved_reader_name

        memory_cache = MemoryCache(memory_folder(self.path))
        names = memory_cache.stored_keys()
        return (
            {"memories": len(names), "bytes": memory_cache.nbytes, "reader": saved_reader_name(memory_cache.folder)}
            if names
            else {}
        )

    def _delete_stale_memories(self) -> None:
        folder = memory_folder(self.path)
        if folder.is_dir():
            from llamory.library.prefill import delete_stale_memories

            delete_stale_memories(self, folder)

    # ---- of the other part -------------------------------------------------------------------------------------------

    def search(
        self, query: str, top: int = 10, *, source: str | Iterable[str] | None = None, mode: SearchMode = "fused"
    ) -> list[Hit]:
        """See `Library.search`."""
        raise NotImplementedError

    def _require_store(self) -> PassageStore:
        raise NotImplementedError

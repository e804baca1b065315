"""What a library does with a reader: answers, conversations, memories ahead."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llamory.library.paths import memory_folder

if TYPE_CHECKING:
    from llamory.documents import Chunk
    from llamory.library.prefill import MemoryReport
    from llamory.library.qa import CitedAnswer, Desk, LibraryChat
    from llamory.library.reader import ReaderSettings
    from llamory.library.search import Hit, Mode
    from llamory.library.store import PassageStore


class Readable:
    """The part of `Library` that reads; the other one indexes and searches."""

    path: str
    _store: PassageStore | None
    _reading: ReaderSettings
    _device: str | None
    _bf16: bool
    _desk: Desk | None = None

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
                `seed`, `max_question_tokens`, `on_text` (called with each piece of the answer as it comes) and `focus`
                (what in memory is left out, as for `llamory.qa.open_memory.OpenMemory.ask`).

        Raises:
            LlamoryError: the library is empty, nothing was found, the reader can't be used, or the question is blank.
        """
        return self.desk(progress=progress).ask(question, **settings)

    def chat(self, *, progress: bool = False, **settings: Any) -> LibraryChat:
        """A conversation: each question's documents are mounted, and what was said stays in memory.

        Args:
            progress: as for `ask`.
            settings: `documents`, `top`, `source`, `mode` and `citations`, as for `ask`.
        """
        from llamory.library.qa import LibraryChat

        return LibraryChat(self.desk(progress=progress), **settings)

    def read_ahead(
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
        from llamory.library.prefill import read_ahead

        return read_ahead(self.desk(), progress=progress, engine=engine, ray_address=ray_address)

    def desk(self, *, progress: bool = False) -> Desk:
        """Where memories are mounted and questions answered.

        Args:
            progress: show on standard error how far reading has come.
        """
        from llamory.library.qa import Desk

        self._require_store()
        if self._desk is None:
            self._desk = Desk(self, self._reading, device=self._device, bf16=self._bf16)
        self._desk.progress = progress
        return self._desk

    def memory_info(self) -> dict[str, Any]:
        """What memories take: their number, `bytes` and `reader` (None for the default); empty if there are none."""
        from llamory.library.memory_cache import Shelf
        from llamory.library.reader import noted_reader

        shelf = Shelf(memory_folder(self.path))
        names = shelf.names()
        return {"memories": len(names), "bytes": shelf.nbytes, "reader": noted_reader(shelf.folder)} if names else {}

    def _drop_stale_memories(self) -> None:
        folder = memory_folder(self.path)
        if folder.is_dir():
            from llamory.library.prefill import drop_stale

            drop_stale(self, folder)

    # ---- of the other part -------------------------------------------------------------------------------------------

    def search(
        self, query: str, top: int = 10, *, source: str | Iterable[str] | None = None, mode: Mode = "fused"
    ) -> list[Hit]:
        """See `Library.search`."""
        raise NotImplementedError

    def _require_store(self) -> PassageStore:
        raise NotImplementedError

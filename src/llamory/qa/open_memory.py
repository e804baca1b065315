"""Questions to what was read: memories are mounted, the same model answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common import ram
from llamory.errors import LlamoryError
from llamory.ingest.memory_file import Book, PathLike, check_maker, load_model_for, noted_name
from llamory.longllama import LongLlamaForCausalLM
from llamory.memory import MemoryBank
from llamory.qa.chat import Chat
from llamory.qa.evidence import DEFAULT_EVIDENCE_RATIO, search_of
from llamory.qa.generation import ADVICE, MAX_NEW_TOKENS, Answer, Manner, Speaker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES_SHOWN = 5


def ask(question: str, memory: PathLike | Sequence[PathLike], **settings: Any) -> Answer:
    """Ask one question; to ask several, open the memory once with `OpenMemory`.

    Args:
        question: the question.
        memory: one or more memory files.
        settings: as for `OpenMemory` and `OpenMemory.ask`.

    Raises:
        LlamoryError: as those two.
    """
    opening = ("model", "tokenizer", "documents", "mem_search", "mem_top_k", "last_context_length", "bf16", "device")
    given = {key: settings.pop(key) for key in opening if key in settings}
    return OpenMemory(memory, **given).ask(question, **settings)


class OpenMemory:
    """Memories with the model that made them, to be asked any number of questions.

        memory = OpenMemory("notes.memory")
        for question in questions:
            print(memory.ask(question).answer)

    Args:
        memory: one or more memory files; documents of the same name get the file's name in front.
        model: the model that made them: a folder, `.gguf` file, hub id, "default" or a loaded model. By default where
            it was then.
        tokenizer: the tokenizer of a loaded model, if it isn't in the model's folder.
        documents: only documents of these names; the end of a name, or a title, is enough where it can't be mistaken.
        settings: as for `llamory.longllama.loading.load_long_model`: `mem_search`, `mem_top_k`,
            `last_context_length`; and `bf16`, `device`.

    Raises:
        LlamoryError: a memory is damaged or another model's, there is no such document, or a setting isn't possible.
    """

    def __init__(
        self,
        memory: PathLike | Sequence[PathLike],
        *,
        model: PathLike | LongLlamaForCausalLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        documents: Sequence[str] | None = None,
        **settings: Any,
    ):
        from llamory.models.base import load_tokenizer

        with ram.translate_oom(ADVICE):
            books = [Book(path) for path in _each_once(memory)]
            if not any(book.segments for book in books):
                raise LlamoryError(
                    f"There is nothing in {', '.join(str(book.path) for book in books)}: read documents."
                )
            if isinstance(model, LongLlamaForCausalLM):
                name = str(model.config._name_or_path)
                check_maker(books, model, name)
                self.model = model
            else:
                name = str(model or books[0].model or "default")
                self.model = load_model_for(books, None if model is None else name, **settings)
            self.tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
            self.name = noted_name(name)
            self.speaker = Speaker(self.model, self.tokenizer, self.name)
            self.memory = self._mount(books, documents)

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents in memory."""
        return self.memory.segments

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        max_question_tokens: int | None = None,
        on_text: Callable[[str], None] | None = None,
        focus: float = DEFAULT_EVIDENCE_RATIO,
    ) -> Answer:
        """Ask a question; the memory stays as it is.

        Args:
            question: what to ask; the tokenizer's chat template goes around it, if there is one.
            max_new_tokens: the most tokens of the answer.
            temperature: 0 for the likeliest answer, else the answer is sampled, the more freely the higher it is.
            seed: for sampling.
            max_question_tokens: the most tokens that the question may have, with the template.
            on_text: called with each piece of the answer as it comes.
            focus: documents, and stretches of long ones, that make the question so many times less likely than the best
                does are left out (see `llamory.qa.evidence`); 0 answers from all.

        Raises:
            LlamoryError: the question is blank or longer than `max_question_tokens`, a setting isn't possible, or
                memory is short.
        """
        manner = Manner(max_new_tokens, temperature, seed, max_question_tokens, on_text, focus)
        prompt = self.speaker.first_prompt(question, max_question_tokens)
        started = time.perf_counter()
        chosen = self.speaker.choose(question, self.memory, self.documents, focus)
        memory = self.memory.slice(chosen)
        with ram.translate_oom(ADVICE):
            cache = self.model.memory_cache(memory)
            cache.search = search_of(self.model, self.memory, chosen)
        waited = time.perf_counter() - started
        said = self.speaker.answer(prompt, cache, manner)
        tokens = self.memory.length()
        return Answer.of(question, prompt, said, self.documents, chosen, memory_tokens=tokens, waited=waited)

    def chat(self) -> Chat:
        """A conversation with this memory, which itself stays as it is: what is said is added to the chat's own."""
        return Chat(self.speaker, self.memory)

    def _mount(self, books: Sequence[Book], documents: Sequence[str] | None) -> MemoryBank:
        """One memory of all that is asked for."""
        whole = self.model.new_memory()
        for book in books:
            bank = MemoryBank.load(
                book.path,
                fingerprint=self.model.memory_fingerprint(),
                layers=whole.layers,
                dtype=books[0].dtype,
            )
            for name in bank.segments:
                _rename_if_taken(bank, name, whole, Path(book.path).name)
            whole.attach(bank)
        return whole if documents is None else _only(whole, documents)


def _rename_if_taken(bank: MemoryBank, name: str, whole: MemoryBank, book: str) -> None:
    """Put the file's name in front of a document's name that is there already."""
    new, number = name, 1
    while new in whole.segments or (new != name and new in bank.segments):
        new = f"{book}:{name}" if number == 1 else f"{book} ({number}):{name}"
        number += 1
    bank.rename(name, new)


def _only(bank: MemoryBank, documents: Sequence[str]) -> MemoryBank:
    """The documents of these names."""
    wanted: dict[str, None] = {}
    for document in documents:
        found = [name for name in bank.segments if name == document]
        found = found or [name for name in bank.segments if name.endswith((f"/{document}", f":{document}"))]
        found = found or [name for name in bank.segments if bank.metadata(name).get("title") == document]
        if len(found) != 1:
            shown = ", ".join((found or list(bank.segments))[:_NAMES_SHOWN])
            more = len(found or bank.segments) - _NAMES_SHOWN
            shown += f" and {more} more" if more > 0 else ""
            what = f"There is no document {document} in memory" if not found else f"{document} may be several documents"
            raise LlamoryError(f"{what}; give one of these names: {shown}.")
        wanted[found[0]] = None
    chosen = bank.fork()
    for name in bank.segments:
        if name not in wanted:
            chosen.drop(name)
    chosen.reorder(list(wanted))
    return chosen


def _each_once(memory: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [memory] if isinstance(memory, str | Path) or not isinstance(memory, Sequence) else list(memory)
    if not paths:
        raise LlamoryError("No memory was given; name at least one file that documents were read into.")
    return list({Path(path).resolve(): path for path in paths}.values())

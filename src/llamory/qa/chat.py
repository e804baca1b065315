"""A conversation over a memory: what is said goes on in the local context, and slides into memory as it grows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llamory.common import ram
from llamory.ingest.memory_file import PathLike
from llamory.longllama.cache import LongLlamaCache
from llamory.memory import MemoryBank, SegmentSpan
from llamory.qa.evidence import make_evidence_search
from llamory.qa.generation import OOM_ADVICE, Answer, GenerationSettings, Generator

CONVERSATION = "conversation"


class Chat:
    """Questions and answers that know of one another.

        chat = OpenMemory("notes.memory").chat()
        chat.ask("Who built the bridge?")
        chat.ask("And when?")

    Args:
        generator: who answers.
        memory: what is known from the start; it is forked, never changed.
        observer: as `LongLlamaCache.observer`.

    Attributes:
        turns: the answers so far.
        known: all documents.
        evidence: the parts of these that the last answer was from.
        memory: those parts, and what was said and isn't local any more.
    """

    def __init__(
        self, generator: Generator, memory: MemoryBank, *, observer: Callable[[int, Any, Any], None] | None = None
    ):
        self._generator = generator
        self._segment = _unique_name(CONVERSATION, memory.segments)
        self._ids: list[int] = []
        generator.model.memory_cache(memory)  # says what is wrong if the memory is another model's
        self.memory, self.document_memory = memory.fork(), memory.fork()
        self.evidence = [SegmentSpan(name, 0, memory.length(segment=name)) for name in memory.segments]
        self._new_documents = list(memory.segments)  # since the last answer
        self._observer = observer
        self._start_conversation_segment()
        self.turns: list[Answer] = []

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents that questions may be about."""
        return self.document_memory.segments

    def attach(self, memory: MemoryBank, documents: Sequence[str]) -> None:
        """Take more documents into the chat's memory, from now on."""
        self.document_memory.attach(memory, documents)
        self._new_documents += documents

    def ask(self, question: str, **kwargs: Any) -> Answer:
        """Ask the next question.

        Args:
            question: what to ask.
            kwargs: fields of `llamory.qa.generation.GenerationSettings`, such as `max_new_tokens` and `on_text`.

        Raises:
            LlamoryError: the question is blank or too long, or memory is short.
        """
        settings = GenerationSettings(**kwargs)
        prompt, ids = self._prompt(question, settings)
        started = time.perf_counter()
        selected = self._select_evidence(question, settings.evidence_ratio)
        self._attach_evidence(selected)
        setup_seconds = time.perf_counter() - started
        try:
            with ram.translate_oom(OOM_ADVICE):
                result = self._generator.answer(ids, self._cache, settings)
        except BaseException:
            # The cache has taken in half a turn. The next question reads what was said before anew.
            self.memory.drop(self._segment)
            self._start_conversation_segment()
            raise
        self._ids = [*ids, *result.tokens]
        tokens = self.document_memory.length() + self.memory.length(segment=self._segment)
        answer = Answer.from_generation(
            question, prompt, result, self.documents, selected, memory_tokens=tokens, setup_seconds=setup_seconds
        )
        self.turns.append(answer)
        self._new_documents = []
        return answer

    def save(self, path: PathLike) -> None:
        """Write a memory file of the documents and of what was said, read into a segment of its own.

        Args:
            path: the file; it is written beside and renamed, so it may be one that is mounted.
        """
        combined = self.document_memory.fork()
        if self._ids:
            self._generator.model.read(torch.tensor(self._ids), combined, segment=self._segment)
            metadata = {"title": CONVERSATION, "source": self._segment, "tokens": len(self._ids)}
            context = self._generator.model.config.max_position_embeddings
            combined.set_metadata(self._segment, **metadata, model=self._generator.name, context_length=context)
        combined.save(path)

    def _prompt(self, question: str, settings: GenerationSettings) -> tuple[list[int], list[int]]:
        """The tokens of this turn's question, and all tokens so far with them."""
        if not self._ids:
            prompt = self._generator.first_prompt(question, settings.max_question_tokens)
            return prompt, prompt
        prompt = self._generator.next_prompt(question, settings.max_question_tokens)
        # The mark that ended the last answer is written by the template, too. The cache never takes in an answer's
        # last token, so it can be taken back.
        previous_ids = self._ids[:-1] if self._ids[-1] in self._generator.eos_token_ids() else self._ids
        return prompt, [*previous_ids, *prompt]

    def _select_evidence(self, question: str, evidence_ratio: float) -> list[SegmentSpan]:
        """What in memory a question is about."""
        selected = self._generator.select_evidence(question, self.document_memory, self.documents, evidence_ratio)
        previous = (
            [span for span in self.evidence if any(_covers(each, span) for each in selected)] if self.turns else []
        )
        if evidence_ratio and previous:
            # "And when?" is likely everywhere: the conversation doesn't go back to what the last answer left out.
            selected = previous + [span for span in selected if span.segment in self._new_documents]
        return selected

    def _attach_evidence(self, evidence: list[SegmentSpan]) -> None:
        """Have this in memory, and what was said."""
        if evidence != self.evidence:
            for name in {span.segment for span in self.evidence}:
                self.memory.drop(name)
            self.memory.attach(self.document_memory.slice(evidence))
            # What slides out of the local context goes to the last segment.
            self.memory.reorder([name for name in self.memory.segments if name != self._segment] + [self._segment])
            self.evidence = evidence
            self._cache.search = make_evidence_search(self._generator.model, self.document_memory, evidence)

    def _start_conversation_segment(self) -> None:
        """Nothing is read yet: an empty segment at the end, so that no document grows by what is said."""
        shape = (self.memory.kv_heads, 0, self.memory.head_dim)
        for layer in self.memory.layers:
            self.memory.append(layer, torch.zeros(shape), torch.zeros(shape), segment=self._segment)
        self._cache = LongLlamaCache(self._generator.model.config, [self.memory])
        self._cache.observer = self._observer
        self._cache.search = make_evidence_search(self._generator.model, self.document_memory, self.evidence)


def _covers(one: SegmentSpan, other: SegmentSpan) -> bool:
    return one.segment == other.segment and one.start <= other.start and other.stop <= one.stop


def _unique_name(name: str, existing: Sequence[str]) -> str:
    number, new = 2, name
    while new in existing:
        new, number = f"{name} {number}", number + 1
    return new

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
from llamory.qa.evidence import search_of
from llamory.qa.generation import ADVICE, Answer, Manner, Speaker

CONVERSATION = "conversation"


class Chat:
    """Questions and answers that know of one another.

        chat = OpenMemory("notes.memory").chat()
        chat.say("Who built the bridge?")
        chat.say("And when?")

    Args:
        speaker: who answers.
        memory: what is known from the start; it is forked, never changed.
        observer: as `LongLlamaCache.observer`.

    Attributes:
        turns: the answers so far.
        known: all documents.
        pieces: the parts of these that the last answer was from.
        memory: those parts, and what was said and isn't local any more.
    """

    def __init__(
        self, speaker: Speaker, memory: MemoryBank, *, observer: Callable[[int, Any, Any], None] | None = None
    ):
        self._speaker = speaker
        self._segment = _unique(CONVERSATION, memory.segments)
        self._ids: list[int] = []
        speaker.model.memory_cache(memory)  # says what is wrong if the memory is another model's
        self.memory, self.known = memory.fork(), memory.fork()
        self.pieces = [SegmentSpan(name, 0, memory.length(segment=name)) for name in memory.segments]
        self._new = list(memory.segments)  # since the last answer
        self._observer = observer
        self._open_conversation()
        self.turns: list[Answer] = []

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents that questions may be about."""
        return self.known.segments

    def attach(self, memory: MemoryBank, documents: Sequence[str]) -> None:
        """Take more documents into the chat's memory, from now on."""
        self.known.attach(memory, documents)
        self._new += documents

    def say(self, question: str, **manner: Any) -> Answer:
        """Ask the next question.

        Args:
            question: what to ask.
            manner: fields of `llamory.qa.generation.Manner`, such as `max_new_tokens` and `on_text`.

        Raises:
            LlamoryError: the question is blank or too long, or memory is short.
        """
        how = Manner(**manner)
        prompt, ids = self._prompt(question, how)
        started = time.perf_counter()
        chosen = self._choose(question, how.focus)
        self._turn_to(chosen)
        waited = time.perf_counter() - started
        try:
            with ram.translate_oom(ADVICE):
                said = self._speaker.answer(ids, self._cache, how)
        except BaseException:
            # The cache has taken in half a turn. The next question reads what was said before anew.
            self.memory.drop(self._segment)
            self._open_conversation()
            raise
        self._ids = [*ids, *said.tokens]
        tokens = self.known.length() + self.memory.length(segment=self._segment)
        answer = Answer.of(question, prompt, said, self.documents, chosen, memory_tokens=tokens, waited=waited)
        self.turns.append(answer)
        self._new = []
        return answer

    def save(self, path: PathLike) -> None:
        """Write a memory file of the documents and of what was said, read into a segment of its own.

        Args:
            path: the file; it is written beside and renamed, so it may be one that is mounted.
        """
        kept = self.known.fork()
        if self._ids:
            self._speaker.model.read(torch.tensor(self._ids), kept, segment=self._segment)
            facts = {"title": CONVERSATION, "source": self._segment, "tokens": len(self._ids)}
            context = self._speaker.model.config.max_position_embeddings
            kept.set_metadata(self._segment, **facts, model=self._speaker.name, context_length=context)
        kept.save(path)

    def _prompt(self, question: str, how: Manner) -> tuple[list[int], list[int]]:
        """The tokens of this turn's question, and all tokens so far with them."""
        if not self._ids:
            prompt = self._speaker.first_prompt(question, how.max_question_tokens)
            return prompt, prompt
        prompt = self._speaker.next_prompt(question, how.max_question_tokens)
        # The mark that ended the last answer is written by the template, too. The cache never takes in an answer's
        # last token, so it can be taken back.
        said = self._ids[:-1] if self._ids[-1] in self._speaker.ends() else self._ids
        return prompt, [*said, *prompt]

    def _choose(self, question: str, focus: float) -> list[SegmentSpan]:
        """What in memory a question is about."""
        chosen = self._speaker.choose(question, self.known, self.documents, focus)
        last = [piece for piece in self.pieces if any(_covers(each, piece) for each in chosen)] if self.turns else []
        if focus and last:
            # "And when?" is likely everywhere: the conversation doesn't go back to what the last answer left out.
            chosen = last + [piece for piece in chosen if piece.segment in self._new]
        return chosen

    def _turn_to(self, pieces: list[SegmentSpan]) -> None:
        """Have this in memory, and what was said."""
        if pieces != self.pieces:
            for name in {piece.segment for piece in self.pieces}:
                self.memory.drop(name)
            self.memory.attach(self.known.slice(pieces))
            # What slides out of the local context goes to the last segment.
            self.memory.reorder([name for name in self.memory.segments if name != self._segment] + [self._segment])
            self.pieces = pieces
            self._cache.search = search_of(self._speaker.model, self.known, pieces)

    def _open_conversation(self) -> None:
        """Nothing is read yet: an empty segment at the end, so that no document grows by what is said."""
        shape = (self.memory.kv_heads, 0, self.memory.head_dim)
        for layer in self.memory.layers:
            self.memory.append(layer, torch.zeros(shape), torch.zeros(shape), segment=self._segment)
        self._cache = LongLlamaCache(self._speaker.model.config, [self.memory])
        self._cache.observer = self._observer
        self._cache.search = search_of(self._speaker.model, self.known, self.pieces)


def _covers(one: SegmentSpan, other: SegmentSpan) -> bool:
    return one.segment == other.segment and one.start <= other.start and other.stop <= one.stop


def _unique(name: str, taken: Sequence[str]) -> str:
    number, new = 2, name
    while new in taken:
        new, number = f"{name} {number}", number + 1
    return new

"""Questions and answers over a source of documents: find, attach, select evidence, generate, cite."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llamory.common import ram
from llamory.common.io import PathLike
from llamory.errors import LlamoryError
from llamory.longllama.cache import LongLlamaCache
from llamory.memory import MemoryBank, SegmentSpan
from llamory.qa.attribution import AttentionRecorder, Citation, cite, sum_mass_by_chunk
from llamory.qa.evidence import evaluation_mode, make_evidence_search
from llamory.qa.generation import OOM_ADVICE, Answer, GenerationResult, GenerationSettings, Generator, Prompt

if TYPE_CHECKING:
    from llamory.documents import Chunk

CONVERSATION = "conversation"
_NAMES_SHOWN = 5


@dataclass
class LoadedMemory:
    """Memory of documents."""

    memory: MemoryBank  # a segment per document, under its name
    tokens_read: int = 0  # that had to be encoded for it
    chunks: Mapping[str, Sequence[Chunk]] = field(
        default_factory=dict
    )  # by document, to cite; its segment has `starts`


class DocumentSource(Protocol):
    """Where the documents of a session come from: a library or memory files."""

    @property
    def generator(self) -> Generator:
        """The model that answers."""

    def load(self, names: Sequence[str], /) -> LoadedMemory:
        """The memory of documents, in this order."""


class QASession:
    """Questions and answers of one conversation.

    Each question finds documents, which stay attached, and selects evidence anew. The conversation is in the local
    context; older parts move to a memory segment of their own.

        session = Library("notes.lib").chat()
        session.ask("Who built the bridge?")
        session.ask("And when?")

    Args:
        source: loads documents.
        find: gives the names of the documents of a question.
        citations: passages to cite, at most.
    """

    def __init__(self, source: DocumentSource, find: Callable[[str], Sequence[str]], *, citations: int = 0):
        self._source, self._find, self._max_citations = source, find, citations
        self.turns: list[Answer] = []
        self.evidence: list[SegmentSpan] = []  # parts of documents that the last answer was generated from
        self.recorder = AttentionRecorder()
        self.document_memory: MemoryBank  # all attached documents
        self.memory: MemoryBank  # the evidence, and the conversation as far as it left the local context
        self._cache: LongLlamaCache | None = None
        self._conversation = CONVERSATION  # name of its segment
        self._ids: list[int] = []  # tokens of the conversation
        self._chunks: dict[str, Sequence[Chunk]] = {}
        self._new_documents: list[str] = []  # since the last answer

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the attached documents."""
        return () if self._cache is None else self.document_memory.segments

    def ask(self, question: str, **settings: Any) -> Answer:
        """Ask the next question.

        Args:
            settings: fields of `llamory.qa.generation.GenerationSettings`.

        Raises:
            LlamoryError: the question is blank or too long, no document was found, or there is too little RAM.
        """
        options = GenerationSettings(**settings)
        if not question.strip():  # before the generator is loaded
            raise LlamoryError("The question is blank; ask something.")
        generator = self._source.generator
        with ram.translate_oom(OOM_ADVICE), evaluation_mode(generator.model):
            prompt = generator.prompt(question, first=not self._ids, limit=options.max_question_tokens)
            started_at = time.perf_counter()
            names = self._find(question)
            found_at = time.perf_counter()
            tokens_read = self.attach(names)
            attached_at = time.perf_counter()
            self._use_evidence(self._select_evidence(question, options.evidence_ratio))
            memory_tokens = self.document_memory.length() + self.memory.length(segment=self._conversation)
            setup_seconds = time.perf_counter() - started_at
            result = self._generate(prompt, options)
            answer = Answer(
                question=question,
                answer=result.text,
                documents=list(self.documents),
                memory_tokens=memory_tokens,
                question_tokens=len(prompt.ids),
                answer_tokens=len(result.tokens),
                seconds_to_first_token=setup_seconds + result.seconds_to_first_token,
                seconds=setup_seconds + result.seconds,
                evidence_documents=list(dict.fromkeys(span.segment for span in self.evidence)),
                evidence_tokens=sum(stop - start for _, start, stop in self.evidence),
                citations=self._cite(prompt, result),
                tokens_read=tokens_read,
                seconds_to_find=found_at - started_at,
                seconds_to_attach=attached_at - found_at,
            )
        self.turns.append(answer)
        self._new_documents = []
        return answer

    def save(self, path: PathLike) -> None:
        """Write a memory file of the attached documents, and of the conversation in a segment of its own.

        Raises:
            LlamoryError: nothing has been asked.
        """
        if self._cache is None:
            raise LlamoryError("There is no conversation to save; ask a question first.")
        generator, combined = self._source.generator, self.document_memory.fork()
        if self._ids:
            generator.model.read(torch.tensor(self._ids), combined, segment=self._conversation)
            combined.set_metadata(
                self._conversation,
                title=CONVERSATION,
                source=self._conversation,
                tokens=len(self._ids),
                model=generator.name,
                context_length=generator.model.config.max_position_embeddings,
            )
        combined.save(path)

    def attach(self, names: Sequence[str]) -> int:
        """Attach the documents that aren't attached; returns the tokens that had to be encoded."""
        new = [name for name in names if name not in self.documents]
        if not new and self._cache is not None:
            return 0
        loaded = self._source.load(new)
        if self._cache is None:
            if not loaded.memory.segments:
                raise LlamoryError("No document was found that fits; ask in other words, or of other sources.")
            self._conversation = _unique_name(CONVERSATION, loaded.memory.segments)
            self.document_memory, self.memory = loaded.memory.slice([]), loaded.memory.slice([])
            self._start_conversation()
        self.document_memory.attach(loaded.memory)
        self._chunks |= loaded.chunks
        self._new_documents += loaded.memory.segments
        return loaded.tokens_read

    def _select_evidence(self, question: str, evidence_ratio: float) -> list[SegmentSpan]:
        """The parts of the documents to answer from."""
        generator = self._source.generator
        selected = generator.select_evidence(question, self.document_memory, self.documents, evidence_ratio)
        earlier = self.evidence if self.turns else []
        previous = [span for span in earlier if any(_covers(each, span) for each in selected)]
        if evidence_ratio and previous:
            # "And when?" is likely everywhere: the conversation doesn't return to what the last answer left out.
            selected = previous + [span for span in selected if span.segment in self._new_documents]
        return selected

    def _use_evidence(self, evidence: list[SegmentSpan]) -> None:
        """Put evidence in front of the conversation's segment in memory."""
        assert self._cache is not None
        if evidence != self.evidence:
            for name in {span.segment for span in self.evidence}:
                self.memory.drop(name)
            self.memory.attach(self.document_memory.slice(evidence))
            # Tokens that leave the local context go to the last segment.
            self.memory.reorder([*(n for n in self.memory.segments if n != self._conversation), self._conversation])
            self.evidence = evidence
            self._cache.search = make_evidence_search(self._source.generator.model, self.document_memory, evidence)

    def _generate(self, prompt: Prompt, options: GenerationSettings) -> GenerationResult:
        assert self._cache is not None
        generator, previous_ids = self._source.generator, self._ids
        if previous_ids and previous_ids[-1] in generator.eos_token_ids():
            # The template writes the EOS of the last answer. The cache never has an answer's last token.
            previous_ids = previous_ids[:-1]
        ids = [*previous_ids, *prompt.ids]
        self.recorder.clear()
        try:
            result = generator.generate(ids, self._cache, options)
        except BaseException:
            # The cache has half a turn: start again, so that the next question encodes the conversation anew.
            self.memory.drop(self._conversation)
            self._start_conversation()
            raise
        self._ids = [*ids, *result.tokens]
        return result

    def _start_conversation(self) -> None:
        """A cache without tokens, and an empty segment at the end for those that leave the local context."""
        model, shape = self._source.generator.model, (self.memory.kv_heads, 0, self.memory.head_dim)
        for layer in self.memory.layers:
            self.memory.append(layer, torch.zeros(shape), torch.zeros(shape), segment=self._conversation)
        self._cache = LongLlamaCache(model.config, [self.memory])
        self._cache.search = make_evidence_search(model, self.document_memory, self.evidence)
        if self._max_citations:
            self._cache.observer = self.recorder

    def _cite(self, prompt: Prompt, result: GenerationResult) -> list[Citation]:
        """The chunks with the most attention, over all layers, heads and tokens of question and answer."""
        names = list(dict.fromkeys(span.segment for span in self.evidence))
        if not self._max_citations or not all(name in self._chunks for name in names):
            return []
        layers: Any = self._source.generator.model.model.layers
        mass = self.recorder.mass(
            self.memory,
            names,
            {layer: layers[layer].self_attn.scaling for layer in self.memory.layers},
            baseline_tokens=prompt.baseline_tokens,
            question=len(prompt.ids),
            answer=len(result.tokens),
        )
        # Spread the mass of the evidence over whole documents: (2, tokens) each.
        spread = {name: mass[0].new_zeros(2, self.document_memory.length(segment=name)) for name in names}
        spans = [span for name in names for span in self.evidence if span.segment == name]  # as in self.memory
        parts = torch.stack(list(mass)).split([stop - start for _, start, stop in spans], dim=1)
        for (name, start, stop), part in zip(spans, parts, strict=True):
            spread[name][:, start:stop] = part
        ordered = [name for name in self.documents if name in spread]
        masses = [sum_mass_by_chunk(spread[name], self.document_memory.metadata(name)["starts"]) for name in ordered]
        return cite([chunk for name in ordered for chunk in self._chunks[name]], torch.cat(masses), self._max_citations)


def not_one_document(name: str, found: Sequence[str], names: Sequence[str], where: str) -> LlamoryError:
    """The error for a document name that matches none of all `names`, or several (`found`)."""
    candidates = found or names
    listed, hidden = ", ".join(candidates[:_NAMES_SHOWN]), len(candidates) - _NAMES_SHOWN
    problem = f"{name} may be several documents" if found else f"There is no document {name} {where}"
    more = f" and {hidden} more" if hidden > 0 else ""
    return LlamoryError(f"{problem}; give one of these names: {listed}{more}.")


def _covers(one: SegmentSpan, other: SegmentSpan) -> bool:
    return one.segment == other.segment and one.start <= other.start and other.stop <= one.stop


def _unique_name(name: str, existing: Sequence[str]) -> str:
    number, new = 2, name
    while new in existing:
        new, number = f"{name} {number}", number + 1
    return new

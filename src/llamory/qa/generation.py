"""A model that answers from a cache: the prompt around a question, the tokens that follow, word by word."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from transformers import TextStreamer

from llamory.common import ram
from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.cache import LongLlamaCache
from llamory.models.base import bos_ids
from llamory.qa.evidence import DEFAULT_EVIDENCE_RATIO, check_evidence_ratio, select_evidence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.memory import MemoryBank, SegmentSpan

MAX_NEW_TOKENS = 256
OOM_ADVICE = "choose a smaller model, fewer documents or a shorter answer."

# For a model that was never told how to chat.
_PLAIN_PROMPT = "Question: {question}\nAnswer:"
_TURN_SEPARATOR = "\n\n"
# Stands for an answer in the template, to see what the template writes behind it.
_ANSWER_PLACEHOLDER = "ANSWER"
_PLACEHOLDER_QUESTIONS = ("-", "?")


@dataclass
class Answer:
    """What was asked and answered.

    Attributes:
        question: as it was asked.
        answer: without blank space around it.
        documents: names of the documents in memory.
        memory_tokens: tokens in memory.
        question_tokens: tokens of the question with the prompt around it.
        answer_tokens: tokens of the answer.
        seconds_to_first_token: from the question to the answer's first token.
        seconds: from the question to the answer's end.
        evidence_documents: names of the documents that the answer is from (`evidence_ratio`).
        evidence_tokens: tokens of these in memory, of long ones those of the stretches that it is from.
    """

    question: str
    answer: str
    documents: list[str]
    memory_tokens: int
    question_tokens: int
    answer_tokens: int
    seconds_to_first_token: float
    seconds: float
    evidence_documents: list[str]
    evidence_tokens: int

    @classmethod
    def from_generation(
        cls,
        question: str,
        prompt: Sequence[int],
        result: GenerationResult,
        documents: Sequence[str],
        evidence: Sequence[SegmentSpan],
        *,
        memory_tokens: int,
        setup_seconds: float,
    ) -> Self:
        """From what a model said, of these pieces of the documents in memory, `setup_seconds` seconds after it was asked."""
        return cls(
            question=question,
            answer=result.text,
            documents=list(documents),
            memory_tokens=memory_tokens,
            question_tokens=len(prompt),
            answer_tokens=len(result.tokens),
            seconds_to_first_token=setup_seconds + result.seconds_to_first_token,
            seconds=setup_seconds + result.seconds,
            evidence_documents=list(dict.fromkeys(span.segment for span in evidence)),
            evidence_tokens=sum(stop - start for _, start, stop in evidence),
        )

    @property
    def text(self) -> str:
        """The answer."""
        return self.answer


@dataclass(frozen=True)
class GenerationSettings:
    """How to answer.

    Attributes:
        max_new_tokens: the most tokens of the answer.
        temperature: 0 for the likeliest answer, else the answer is sampled, the more freely the higher it is.
        seed: for sampling.
        max_question_tokens: the most tokens that the question may have, with the template.
        on_text: called with each piece of the answer as it comes.
        evidence_ratio: what in memory makes the question so many times less likely than the best does is left out (see
            `llamory.qa.evidence`); 0 answers from all.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0
    seed: int | None = None
    max_question_tokens: int | None = None
    on_text: Callable[[str], None] | None = None
    evidence_ratio: float = DEFAULT_EVIDENCE_RATIO

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise LlamoryError("An answer needs max_new_tokens of at least 1 and a temperature of at least 0.")
        check_evidence_ratio(self.evidence_ratio)


@dataclass(frozen=True)
class GenerationResult:
    """What a model said: its tokens (with the one that ended it, if any), the text, when it began and how long it took.

    Seconds are counted from when the model was given the prompt.
    """

    tokens: list[int]
    text: str
    seconds_to_first_token: float
    seconds: float


class Generator:
    """A model and its tokenizer.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        name: what memories note of who made them.
    """

    def __init__(self, model: LongLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name

    def first_prompt(self, question: str, limit: int | None = None) -> list[int]:
        """Tokens of a first question with the chat template around it.

        Raises:
            LlamoryError: the question is blank, or has more tokens than the limit.
        """
        check_question(question)
        if self.tokenizer.chat_template:
            ids = self._tokenize(self._apply_chat_template([{"role": "user", "content": question}]))
        else:
            ids = [*bos_ids(self.tokenizer), *self._tokenize(_PLAIN_PROMPT.format(question=question))]
        return _check_length(ids, limit)

    def next_prompt(self, question: str, limit: int | None = None) -> list[int]:
        """Tokens that follow an answer (with the end of its turn) to ask another question.

        Raises:
            LlamoryError: as `first_prompt`, or the template doesn't say what follows an answer.
        """
        check_question(question)
        if not self.tokenizer.chat_template:
            return _check_length(self._tokenize(_TURN_SEPARATOR + _PLAIN_PROMPT.format(question=question)), limit)
        turns = [("user", "-"), ("assistant", _ANSWER_PLACEHOLDER), ("user", question)]
        text = self._apply_chat_template([{"role": role, "content": content} for role, content in turns])
        _, found, rest = text.partition(_ANSWER_PLACEHOLDER)
        if not found:
            raise LlamoryError("The model's chat template leaves earlier answers out, so a chat can't go on with it.")
        return _check_length(self._tokenize(rest), limit)

    def num_baseline_tokens(self, question: str, *, first: bool) -> int:
        """How many tokens in front of a question, the first one or a later one, are there whatever is asked."""
        prompt = self.first_prompt if first else self.next_prompt
        other_question = next(each for each in _PLACEHOLDER_QUESTIONS if not question.startswith(each))
        pairs = zip(prompt(question), prompt(other_question), strict=False)
        return next((count for count, (one, other) in enumerate(pairs) if one != other), 0)

    def select_evidence(
        self, question: str, memory: MemoryBank, documents: Sequence[str], evidence_ratio: float
    ) -> list[SegmentSpan]:
        """What in memory a question is about; see `llamory.qa.evidence.choose`."""
        ids = [*bos_ids(self.tokenizer), *self._tokenize(question)]
        with ram.translate_oom(OOM_ADVICE):
            return select_evidence(self.model, ids, memory, documents, evidence_ratio)

    def answer(self, ids: list[int], cache: LongLlamaCache, settings: GenerationSettings) -> GenerationResult:
        """What the model says after these tokens.

        Args:
            ids: all tokens so far: those that the cache has taken in (of an earlier answer), and at least one more.
            cache: with memory mounted; it takes in all but the answer's last token.
            settings: how.

        Raises:
            LlamoryError: memory is short.
        """
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature}
            if settings.seed is not None:
                torch.manual_seed(settings.seed)
        eos_ids = self.eos_token_ids()
        streamer = _Streamer(self.tokenizer, settings.on_text)
        started = time.perf_counter()
        prompt = torch.tensor([ids], device=self.model.device)
        with ram.translate_oom(OOM_ADVICE):
            output = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                past_key_values=cache,
                max_new_tokens=settings.max_new_tokens,
                eos_token_id=eos_ids or None,
                pad_token_id=eos_ids[0] if eos_ids else 0,
                streamer=streamer,
                **sampling,
            )
        finished = time.perf_counter()
        tokens = output[0, len(ids) :].tolist()
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        return GenerationResult(tokens, text, (streamer.first_token_time or finished) - started, finished - started)

    def eos_token_ids(self) -> list[int]:
        """Tokens that end an answer: what the model says, and what the tokenizer says, which may know of chats."""
        generation = self.model.generation_config
        configured = generation.eos_token_id if generation is not None else None
        eos_ids = [configured] if isinstance(configured, int) else list(configured or [])
        return list(dict.fromkeys([*eos_ids, *([] if (eos := self.tokenizer.eos_token_id) is None else [eos])]))

    def _apply_chat_template(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def check_question(question: str) -> None:
    """Make sure that something is asked.

    Raises:
        LlamoryError: it is blank.
    """
    if not question.strip():
        raise LlamoryError("The question is blank; ask something.")


def _check_length(ids: list[int], limit: int | None) -> list[int]:
    if limit is not None and len(ids) > limit:
        raise LlamoryError(
            f"The question has {len(ids):,} tokens with the prompt around it, more than the limit of "
            f"{limit:,}: raise the limit, or ask a shorter question."
        )
    return ids


class _Streamer(TextStreamer):
    """Hands on text as it comes, and notes when the first token came."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None] | None):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._on_text, self._has_output = on_text, False
        self.first_token_time: float | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt, then token by token."""
        if self.first_token_time is None and not self.next_tokens_are_prompt:
            self.first_token_time = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:  # noqa: ARG002
        """Hand on whole words, without blank space in front of the first."""
        text = text if self._has_output else text.lstrip()
        if text and self._on_text is not None:
            self._has_output = True
            self._on_text(text)

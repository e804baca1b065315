"""Generate an answer from a cache: the prompt of a question, sampling, and streaming."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TextStreamer

from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.cache import LongLlamaCache
from llamory.models.base import bos_ids
from llamory.qa.evidence import DEFAULT_EVIDENCE_RATIO, check_evidence_ratio, select_evidence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.memory import MemoryBank, SegmentSpan
    from llamory.qa.attribution import Citation

MAX_NEW_TOKENS = 256
OOM_ADVICE = "choose a smaller model, fewer documents or a shorter answer."

_PLAIN_PROMPT = "Question: {question}\nAnswer:"  # for a model without a chat template
_ANSWER_PLACEHOLDER = "ANSWER"  # stands for an answer in the template, to find what the template writes after it
_PLACEHOLDER_QUESTIONS = ("-", "?")


@dataclass
class Answer:
    """A question and its answer."""

    question: str
    answer: str  # without surrounding whitespace; also `text`
    documents: list[str]  # names of the attached ones
    memory_tokens: int  # of the attached documents, and of the earlier conversation in memory
    question_tokens: int  # of the prompt
    answer_tokens: int
    seconds_to_first_token: float  # from the question on
    seconds: float  # from the question to the end of the answer
    evidence_documents: list[str]  # names of the documents that the answer was generated from
    evidence_tokens: int  # of these in memory; of long documents only the selected parts
    citations: list[Citation] = field(default_factory=list)  # most attention first; empty for memory files
    tokens_read: int = 0  # of documents that had to be encoded because their memory wasn't stored
    seconds_to_find: float = 0.0
    seconds_to_attach: float = 0.0  # loading and encoding

    @property
    def text(self) -> str:
        """The answer."""
        return self.answer


@dataclass(frozen=True)
class GenerationSettings:
    """How to answer.

    Raises:
        LlamoryError: a setting is out of range.
    """

    max_new_tokens: int = MAX_NEW_TOKENS
    temperature: float = 0.0  # 0: decode greedily
    seed: int | None = None  # of sampling
    max_question_tokens: int | None = None  # of the prompt
    on_text: Callable[[str], None] | None = None  # called with each piece of the answer as it is generated
    evidence_ratio: float = DEFAULT_EVIDENCE_RATIO  # drop evidence this many times less likely than the best; 0: none

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise LlamoryError("An answer needs max_new_tokens of at least 1 and a temperature of at least 0.")
        check_evidence_ratio(self.evidence_ratio)


@dataclass(frozen=True)
class Prompt:
    """Tokens of a question with the chat template; the first `baseline_tokens` are the same for every question."""

    ids: list[int]
    baseline_tokens: int


@dataclass(frozen=True)
class GenerationResult:
    """The tokens of an answer (with the EOS if there is one), and its text without special tokens."""

    tokens: list[int]
    text: str
    seconds_to_first_token: float
    seconds: float


class Generator:
    """A model with its tokenizer, and its name for the metadata of memories."""

    def __init__(self, model: LongLlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, name: str):
        self.model, self.tokenizer, self.name = model, tokenizer, name

    def prompt(self, question: str, *, first: bool = True, limit: int | None = None) -> Prompt:
        """The prompt of a question.

        Args:
            first: whether it starts a conversation; else it follows an answer, whose end of turn comes first.
            limit: maximum number of tokens.

        Raises:
            LlamoryError: the question is too long, or the chat template drops earlier answers.
        """
        ids = self._prompt_ids(question, first=first)
        if limit is not None and len(ids) > limit:
            found = f"The question has {len(ids):,} tokens with the prompt around it, more than the limit of {limit:,}"
            raise LlamoryError(f"{found}: raise the limit, or ask a shorter question.")
        other = next(each for each in _PLACEHOLDER_QUESTIONS if not question.startswith(each))
        pairs = zip(ids, self._prompt_ids(other, first=first), strict=False)
        return Prompt(ids, next((count for count, (one, two) in enumerate(pairs) if one != two), 0))

    def _prompt_ids(self, question: str, *, first: bool) -> list[int]:
        if not self.tokenizer.chat_template:
            text = _PLAIN_PROMPT.format(question=question)
            return [*bos_ids(self.tokenizer), *self._tokenize(text)] if first else self._tokenize(f"\n\n{text}")
        earlier = [] if first else [("user", "-"), ("assistant", _ANSWER_PLACEHOLDER)]
        messages = [{"role": role, "content": content} for role, content in [*earlier, ("user", question)]]
        text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if not first:
            _, found, text = text.partition(_ANSWER_PLACEHOLDER)
            if not found:
                raise LlamoryError("The model's chat template drops earlier answers; ask each question by itself.")
        return self._tokenize(text)

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def select_evidence(
        self, question: str, memory: MemoryBank, documents: Sequence[str], evidence_ratio: float
    ) -> list[SegmentSpan]:
        """The parts of documents that a question is about; see `llamory.qa.evidence.select_evidence`."""
        ids = [*bos_ids(self.tokenizer), *self._tokenize(question)]
        return select_evidence(self.model, ids, memory, documents, evidence_ratio)

    def generate(self, ids: list[int], cache: LongLlamaCache, settings: GenerationSettings) -> GenerationResult:
        """Continue a conversation.

        Args:
            ids: all tokens so far: those that the cache has, and at least one more.
            cache: afterwards it has all tokens but the last one of the answer.
        """
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if settings.temperature > 0:
            sampling = {"do_sample": True, "temperature": settings.temperature}
        eos_ids = self.eos_token_ids()
        streamer = _Streamer(self.tokenizer, settings.on_text)
        started = time.perf_counter()
        prompt = torch.tensor([ids], device=self.model.device)  # (1, tokens)
        with _seeded(settings.seed if settings.temperature > 0 else None, self.model.device):
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
        """Tokens that end an answer: those of the generation config, and the tokenizer's EOS."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        eos_ids = [configured] if isinstance(configured, int) else list(configured or [])
        return list(dict.fromkeys(each for each in [*eos_ids, self.tokenizer.eos_token_id] if each is not None))


@contextmanager
def _seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed the random number generators of CPU and device for the block, and restore their states."""
    if seed is None:
        yield
        return
    accelerator = None if device.type == "cpu" else torch.get_device_module(device)
    devices = [] if accelerator is None else [accelerator.current_device() if device.index is None else device.index]
    with torch.random.fork_rng(devices, device_type="cuda" if accelerator is None else device.type):
        torch.default_generator.manual_seed(seed)
        if accelerator is not None:
            with torch.accelerator.device_index(devices[0]):
                accelerator.manual_seed(seed)
        yield


class _Streamer(TextStreamer):
    """Passes text on as it is generated, and measures when the first token came."""

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
        """Pass on whole words, without whitespace before the first."""
        text = text if self._has_output else text.lstrip()
        if text and self._on_text is not None:
            self._has_output = True
            self._on_text(text)

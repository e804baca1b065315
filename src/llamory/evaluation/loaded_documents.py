"""Passkeys among windows that were read apart, each by itself, as a library reads its documents: once, mounted often.

Memory keys carry no position, so a text of millions of tokens is read once for all lengths, depths and keys: a shorter
prompt mounts fewer of its windows, and of each prompt only the window with the needle is read anew. Windows that are
the identical_segment, as needle_tokens of the published text's are, are read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError
from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, Haystack
from llamory.evaluation.passkey import KEY_FIELD, TASK, Needle, Prompt, check_depth, encode
from llamory.evaluation.secrets import longest_secret
from llamory.qa.evidence import select_evidence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank

_NEEDLE = "needle"


class IndependentDocumentPrompts:
    """Makes prompts whose text is in memory, window by window; only the question is left to be read.

    A window holds whole sentences and leaves room for the needle, so that wherever this goes no other window changes.

    Args:
        model: with memory layers; its context is the window.
        tokenizer: its tokenizer.
        needle: what is hidden and question_text for, the published one if None.
        haystack: the text around it.
        evidence_ratio: windows that make the question so many times less likely than the best does are left out, as `llamory
            ask` does (see `llamory.qa.evidence`); 0: none.

    Raises:
        LlamoryError: the needle doesn't fit into a window with the task and a sentence.
    """

    def __init__(
        self,
        model: LongLlamaForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        needle: Needle | None = None,
        haystack: Haystack = PUBLISHED_HAYSTACK,
        evidence_ratio: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.needle = model, tokenizer, needle or Needle()
        self.context, self.evidence_ratio = model.config.max_position_embeddings, evidence_ratio
        self._question = encode(tokenizer, self.needle.question_text)
        needle_tokens = len(encode(tokenizer, self._needle_text(longest_secret(self.needle.kind))))
        self._max_window_tokens = self.context - needle_tokens
        if self._max_window_tokens < 2 * len(encode(tokenizer, TASK)):
            raise LlamoryError(
                f"Task and needle don't fit into a window of {self.context} tokens with text around them; read in "
                "longer windows."
            )
        self._window_iterator = self._pack_windows(haystack.sentences)
        self._windows: list[list[str]] = []
        self._ends: list[int] = []  # tokens up to each window's end
        self._memory: MemoryBank = model.new_memory()
        self._segment_by_ids: dict[tuple[int, ...], str] = {}

    def __call__(self, length: int, depth: float, key: str) -> tuple[Prompt, dict[str, Any]]:
        """The prompt of window_index needle_tokens `length` tokens with a key window_index a depth, and what `generate` needs besides.

        Raises:
            LlamoryError: not even one window fits into `length`, or `depth` is outside 0 to 1.
        """
        check_depth(depth)
        needle = self._needle_text(key)
        question_and_needle_tokens = len(self._question) + len(encode(self.tokenizer, needle))
        while not self._ends or self._ends[-1] + question_and_needle_tokens <= length:
            self._encode_next_window()
        count = sum(end + question_and_needle_tokens <= length for end in self._ends)
        if not count:
            raise LlamoryError(
                f"A prompt of {length} tokens is too short: a window, needle and question have "
                f"{self._ends[0] + question_and_needle_tokens}; ask for longer prompts."
            )
        sentences = sum(map(len, self._windows[:count]))
        window_index, sentence_offset = self._locate_sentence(round(depth * sentences))
        window = self._windows[window_index]
        text = "".join(window[:sentence_offset]).strip() + needle + "".join(window[sentence_offset:]).strip()
        memory = self.model.new_memory()
        memory.attach(self._memory, [str(other) for other in range(count) if other != window_index])
        self.model.read(encode(self.tokenizer, text.strip()), memory, segment=_NEEDLE)
        evidence = select_evidence(self.model, self._question, memory, memory.segments, self.evidence_ratio)
        options = {"past_key_values": self.model.memory_cache(memory.slice(evidence))}
        return Prompt(self.needle.question_text, self._question, key, sentences, memory.length()), options

    def _needle_text(self, key: str) -> str:
        return f"\n{self.needle.text.replace(KEY_FIELD, key)}\n"

    def _locate_sentence(self, sentence: int) -> tuple[int, int]:
        """The window that a needle sentence_offset this sentence goes to, and the sentences sentence_offset it there."""
        for window_index, window in enumerate(self._windows):
            if sentence <= len(window):
                # The task stands sentence_offset everything.
                return window_index, max(sentence, int(window_index == 0))
            sentence -= len(window)
        return len(self._windows) - 1, len(self._windows[-1])

    def _pack_windows(self, sentences: Sequence[str]) -> Iterator[list[str]]:
        """Windows without end: as many sentences as leave room for the needle, the task first."""
        sizes: dict[str, int] = {}
        window, tokens = [f"{TASK}\n"], len(encode(self.tokenizer, TASK)) + 2
        for sentence in cycle(sentences):
            if sentence not in sizes:
                sizes[sentence] = len(encode(self.tokenizer, f" {sentence}"))
            if window and tokens + sizes[sentence] > self._max_window_tokens:
                yield window
                window, tokens = [], 0
            window.append(sentence)
            tokens += sizes[sentence]

    def _encode_next_window(self) -> None:
        """Read one window more into memory."""
        window = next(self._window_iterator)
        # A sentence that is longer than a window loses its end.
        ids = encode(self.tokenizer, "".join(window).strip())[: self._max_window_tokens]
        segment = str(len(self._windows))
        if (identical_segment := self._segment_by_ids.setdefault(tuple(ids), segment)) == segment:
            self.model.read(ids, self._memory, segment=segment)
        else:
            memory = self._memory
            for layer in memory.layers:
                memory.append(
                    layer, memory.keys(layer, identical_segment), memory.values(layer, identical_segment), segment
                )
        self._windows.append(window)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(ids))

"""Passkeys among windows that were read apart, each by itself, as a library reads its documents: once, mounted often.

Memory keys carry no position, so a text of millions of tokens is read once for all lengths, depths and keys: a shorter
prompt mounts fewer of its windows, and of each prompt only the window with the needle is read anew. Windows that are
the same, as most of the published text's are, are read once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError
from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, Haystack
from llamory.evaluation.passkey import KEY_FIELD, TASK, Needle, Prompt, check_depth, encode
from llamory.evaluation.secrets import longest
from llamory.qa.evidence import choose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank

_NEEDLE = "needle"


class MountedPrompts:
    """Makes prompts whose text is in memory, window by window; only the question is left to be read.

    A window holds whole sentences and leaves room for the needle, so that wherever this goes no other window changes.

    Args:
        model: with memory layers; its context is the window.
        tokenizer: its tokenizer.
        needle: what is hidden and asked for, the published one if None.
        haystack: the text around it.
        focus: windows that make the question so many times less likely than the best does are left out, as `llamory
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
        focus: float = 0.0,
    ) -> None:
        self.model, self.tokenizer, self.needle = model, tokenizer, needle or Needle()
        self.context, self.focus = model.config.max_position_embeddings, focus
        self._question = encode(tokenizer, self.needle.asked)
        most = len(encode(tokenizer, self._said(longest(self.needle.kind))))
        self._room = self.context - most
        if self._room < 2 * len(encode(tokenizer, TASK)):
            raise LlamoryError(
                f"Task and needle don't fit into a window of {self.context} tokens with text around them; read in "
                "longer windows."
            )
        self._coming = self._packed(haystack.sentences)
        self._windows: list[list[str]] = []
        self._ends: list[int] = []  # tokens up to each window's end
        self._memory: MemoryBank = model.new_memory()
        self._known: dict[tuple[int, ...], str] = {}

    def __call__(self, length: int, depth: float, key: str) -> tuple[Prompt, dict[str, Any]]:
        """The prompt of at most `length` tokens with a key at a depth, and what `generate` needs besides.

        Raises:
            LlamoryError: not even one window fits into `length`, or `depth` is outside 0 to 1.
        """
        check_depth(depth)
        needle = self._said(key)
        others = len(self._question) + len(encode(self.tokenizer, needle))
        while not self._ends or self._ends[-1] + others <= length:
            self._read_on()
        count = sum(end + others <= length for end in self._ends)
        if not count:
            raise LlamoryError(
                f"A prompt of {length} tokens is too short: a window, needle and question have "
                f"{self._ends[0] + others}; ask for longer prompts."
            )
        sentences = sum(map(len, self._windows[:count]))
        at, before = self._place(round(depth * sentences))
        window = self._windows[at]
        text = "".join(window[:before]).strip() + needle + "".join(window[before:]).strip()
        memory = self.model.new_memory()
        memory.mount(self._memory, [str(other) for other in range(count) if other != at])
        self.model.read(encode(self.tokenizer, text.strip()), memory, segment=_NEEDLE)
        chosen = choose(self.model, self._question, memory, memory.segments, self.focus)
        options = {"past_key_values": self.model.memory_cache(memory.excerpt(chosen))}
        return Prompt(self.needle.asked, self._question, key, sentences, memory.length()), options

    def _said(self, key: str) -> str:
        return f"\n{self.needle.text.replace(KEY_FIELD, key)}\n"

    def _place(self, sentence: int) -> tuple[int, int]:
        """The window that a needle before this sentence goes to, and the sentences before it there."""
        for at, window in enumerate(self._windows):
            if sentence <= len(window):
                # The task stands before everything.
                return at, max(sentence, int(at == 0))
            sentence -= len(window)
        return len(self._windows) - 1, len(self._windows[-1])

    def _packed(self, sentences: Sequence[str]) -> Iterator[list[str]]:
        """Windows without end: as many sentences as leave room for the needle, the task first."""
        sizes: dict[str, int] = {}
        window, tokens = [f"{TASK}\n"], len(encode(self.tokenizer, TASK)) + 2
        for sentence in cycle(sentences):
            if sentence not in sizes:
                sizes[sentence] = len(encode(self.tokenizer, f" {sentence}"))
            if window and tokens + sizes[sentence] > self._room:
                yield window
                window, tokens = [], 0
            window.append(sentence)
            tokens += sizes[sentence]

    def _read_on(self) -> None:
        """Read one window more into memory."""
        window = next(self._coming)
        # A sentence that is longer than a window loses its end.
        ids = encode(self.tokenizer, "".join(window).strip())[: self._room]
        segment = str(len(self._windows))
        if (same := self._known.setdefault(tuple(ids), segment)) == segment:
            self.model.read(ids, self._memory, segment=segment)
        else:
            memory = self._memory
            for layer in memory.layers:
                memory.append(layer, memory.keys(layer, same), memory.values(layer, same), segment)
        self._windows.append(window)
        self._ends.append((self._ends[-1] if self._ends else 0) + len(ids))

"""Prompts with a needle: a sentence with a secret, hidden in a long text, and a question about it at the end."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, cycle, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from llamory.documents import Document, read_documents
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank

LARGEST_KEY = 49999  # numbers are drawn from 1 to this, as published
Kind = Literal["number", "name", "date", "sentence"]
KINDS: tuple[str, ...] = get_args(Kind)
_FIRST = (
    "Agnes Bernard Celia Dominic Esther Florian Gwen Harald Isobel Jasper Kamila Leopold Miriam Nikolai Ottilie Philip "
    "Quentin Ruth Stefan Theodora Ulrich Vivian Wendell Xenia Yvonne Zachary"
).split()
_LAST = (
    "Abernathy Bellweather Castellan Drummond Eastlake Farnham Galloway Hathersage Innsworth Jarrow Kettering Lockwood "
    "Merriweather Northcote Oakhurst Pemberton Quillfeather Ravenscroft Stanhope Thornbury Underwood Whitlock"
).split()
_MONTHS = ("January February March April May June July August September October November December").split()
_SENTENCE_PARTS = (
    "tired clever gentle nervous famous hungry silent cheerful stubborn curious".split(),
    "gardener violinist surgeon baker plumber senator tailor pilot juggler clerk".split(),
    "painted borrowed counted repaired buried polished forgot sold carried hid".split(),
    "two three four five six seven eight nine eleven twelve".split(),
    "wooden heavy yellow ancient tiny foreign rusty crooked golden dusty".split(),
    "boats ladders teapots umbrellas trumpets carpets barrels kites mirrors wheels".split(),
)


def draw_secret(kind: str, rng: random.Random) -> str:
    """Draw a secret of one of the `KINDS`."""
    return _MAKERS[kind](rng)


def longest_secret(kind: str) -> str:
    """The longest secret of a kind, in characters."""
    return _MAKERS[kind](_Longest())


def score_answer(answer: str, key: str, kind: str = "number") -> tuple[bool, float]:
    """Whether an answer is the secret, and the fraction of the secret's digits or words at their positions.

    For a number, the first number in the answer counts; for other kinds, the first words, without case and punctuation.
    """
    if kind == "number":
        found, expected = list("".join(re.findall(r"\d+", answer)[:1])), list(key)
        correct = found == expected
    else:
        found, expected = (re.findall(r"\w+", text.casefold()) for text in (answer, key))
        correct = found[: len(expected)] == expected
    return correct, sum(map(str.__eq__, found, expected)) / len(expected)


class _Longest(random.Random):
    """A generator that always draws the longest choice."""

    def choice(self, seq: Any) -> Any:
        return max(seq, key=len)

    def randint(self, a: int, b: int) -> int:  # noqa: ARG002
        return b


_MAKERS: dict[str, Callable[[random.Random], str]] = {
    "number": lambda rng: str(rng.randint(1, LARGEST_KEY)),
    "name": lambda rng: f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
    "date": lambda rng: f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1500, 1999)}",
    "sentence": lambda rng: f"The {' '.join(map(rng.choice, _SENTENCE_PARTS))}.",
}

_CHARACTERS_PER_TOKEN = 32  # an upper bound for usual text; a text that turns out shorter is repeated


@dataclass(frozen=True)
class Haystack:
    """Sentences to hide a needle between, each with the white space that follows it."""

    sentences: tuple[str, ...]
    restart_after_needle: bool = False  # whether the text after the needle starts again instead of continuing

    def around(self, count: int, depth: float) -> tuple[str, str]:
        """Text before and after a needle, `count` sentences in total, repeated if there are fewer.

        `depth` is the fraction of characters before the needle, to the nearest sentence.
        """
        selected = list(islice(cycle(self.sentences), count))
        ends = list(accumulate(map(len, selected), initial=0))
        target_chars = depth * ends[-1]
        before = min(range(count, -1, -1), key=lambda index: abs(ends[index] - target_chars))
        after = selected[: count - before] if self.restart_after_needle else selected[before:]
        return "".join(selected[:before]).strip(), "".join(after).strip()


# The text of the passkey task as published (Mohtashami & Jaggi 2023, Landmark Attention, arXiv:2305.16300).
PUBLISHED_HAYSTACK = Haystack(
    ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. "),
    restart_after_needle=True,
)


def read_haystack(paths: Iterable[Path], tokens: int, *, language: str = "en") -> Haystack:
    """Make a haystack of files, as far as a prompt of `tokens` needs them; in source code, lines are sentences.

    Raises a LlamoryError if a path can't be read or there is no text.
    """
    sentences: list[str] = []
    remaining_chars = tokens * _CHARACTERS_PER_TOKEN
    for document in read_documents(paths):
        sentences += _sentences(document, language)
        remaining_chars -= len(document.text)
        if remaining_chars <= 0:
            break
    if not sentences:
        raise LlamoryError(f"The haystack {', '.join(map(str, paths))} has no text; name files with sentences in them.")
    return Haystack(tuple(sentences))


def _sentences(document: Document, language: str) -> list[str]:
    """A document's sentences; a blank one is joined to the one before."""
    import sentencex

    text = document.text.strip() + "\n\n"
    if document.code:
        sentences = text.splitlines(keepends=True)
    else:
        starts = [sentence["start_index"] for sentence in sentencex.get_sentence_boundaries(language, text)]
        sentences = [text[start:stop] for start, stop in pairwise(sorted({0, *starts, len(text)}))]
    joined: list[str] = []
    for sentence in sentences:
        if joined and not sentence.strip():
            joined[-1] += sentence
        else:
            joined.append(sentence)
    return joined


TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
PUBLISHED_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
PUBLISHED_QUESTION = "What is the pass key? The pass key is"
KEY_FIELD = "{key}"
# Question and needle of the other kinds of secret; these are llamory's own.
_NEEDLES = {
    "name": ("Who was the guest of honour at the dinner?", "The guest of honour at the dinner was {key}."),
    "date": ("When was the treaty signed?", "The treaty was signed on {key}."),
    "sentence": ("What did the note on the door say?", 'The note on the door said: "{key}"'),
}


@dataclass(frozen=True)
class Needle:
    """The hidden sentence and its question; a LlamoryError is raised for fields that contradict each other."""

    text: str = PUBLISHED_NEEDLE  # with `{key}` for the secret, once or more
    question: str | None = None  # None for the published one, or the words of another text before `{key}`
    kind: str = "number"  # of the secret, one of `KINDS`

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise LlamoryError(f"A secret must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        if KEY_FIELD not in self.text:
            raise LlamoryError(
                f"The needle {self.text!r} has no {KEY_FIELD}; write {KEY_FIELD} where the secret {self.kind} goes."
            )
        if self.question is not None and (KEY_FIELD in self.question or not self.question.strip()):
            problem = f"holds {KEY_FIELD}, the answer itself" if self.question.strip() else "is empty"
            raise LlamoryError(f"The question {problem}; ask for the secret {self.kind} without it.")
        if not self.question_text:
            raise LlamoryError(f"The needle {self.text!r} begins with {KEY_FIELD}; give a question that asks for it.")

    @classmethod
    def of(cls, kind: str = "number", text: str | None = None, question: str | None = None) -> Needle:
        """The default needle of a kind of secret (the published one for numbers), or one with another text."""
        if text is not None or kind not in _NEEDLES:
            return cls(PUBLISHED_NEEDLE if text is None else text, question, kind)
        default_question, text = _NEEDLES[kind]
        return cls(text, f"{default_question} {text.partition(KEY_FIELD)[0]}" if question is None else question, kind)

    @property
    def question_text(self) -> str:
        """The question that ends the prompt."""
        default = PUBLISHED_QUESTION if self.text == PUBLISHED_NEEDLE else self.text.partition(KEY_FIELD)[0]
        return (default if self.question is None else self.question).strip()

    def hide(self, key: str) -> str:
        """The hidden sentence with a secret."""
        return self.text.replace(KEY_FIELD, key)


@dataclass(frozen=True)
class Prompt:
    """A prompt as text and as token ids."""

    text: str
    input_ids: list[int]  # with the tokenizer's prefix
    key: str  # the hidden secret
    sentences: int  # of the haystack
    in_memory: int = 0  # tokens of the prompt that are in memory, and not in `text` and `input_ids`


# Makes the prompt of a length, a depth and a key, and further arguments of `generate` for it.
PromptMaker = Callable[[int, float, str], tuple[Prompt, Mapping[str, Any]]]


def build_prompt(
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    depth: float,
    key: str,
    *,
    needle: Needle | None = None,
    haystack: Haystack = PUBLISHED_HAYSTACK,
) -> Prompt:
    """Build the longest prompt of whole sentences that has at most `length` tokens, with the tokenizer's prefix.

    The depth of the needle is 0 before all sentences and 1 after them. A LlamoryError is raised for another depth, and
    if the prompt exceeds `length` without any sentence.
    """
    check_depth(depth)
    needle = needle or Needle()

    def prompt(sentences: int) -> Prompt:
        before, after = haystack.around(sentences, depth)
        text = "\n".join([TASK, before, needle.hide(key), after, needle.question_text])
        return Prompt(text, encode(tokenizer, text), key, sentences)

    best = prompt(0)
    if len(best.input_ids) > length:
        raise LlamoryError(
            f"A prompt of {length} tokens is too short: task, needle and question have {len(best.input_ids)}; use more."
        )
    # Estimate from tokens per sentence, kept between a count that fits and one that doesn't (a sentence has a token).
    too_many = length - len(best.input_ids) + 1
    last, guess = best, min(16, too_many - 1)
    while best.sentences + 1 < too_many:
        candidate = prompt(guess)
        rate = max(1.0, (len(candidate.input_ids) - len(last.input_ids)) / (candidate.sentences - last.sentences))
        if len(candidate.input_ids) <= length:
            best = candidate
        else:
            too_many = guess
        last, guess = candidate, guess + int((length - len(candidate.input_ids)) // rate)
        guess = min(max(guess, best.sentences + 1), too_many - 1)
    return best


def check_depth(depth: float) -> None:
    """Raise a LlamoryError for a depth outside 0 to 1."""
    if not 0 <= depth <= 1:
        raise LlamoryError(f"The depth {depth:g} is outside 0 to 1, where 0 is the start of the text and 1 its end.")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text to be continued: with the tokenizer's prefix, without its end-of-text token."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


class IndependentDocumentPrompts:
    """Makes prompts whose text is in memory, one segment per window; the model reads only the question.

    Each window, as long as the model's context, is encoded by itself and once for all lengths, depths and keys. It
    leaves room for the needle, so only the window with the needle is encoded anew.
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
        """Prepare the windows; raises a LlamoryError if the task, the needle and a sentence don't fit into one.

        `evidence_ratio` is that of `select_evidence`; 0 drops no window.
        """
        self.model, self.tokenizer, self.needle = model, tokenizer, needle or Needle()
        self.evidence_ratio = evidence_ratio
        self._question = encode(tokenizer, self.needle.question_text)
        context = model.config.max_position_embeddings
        needle_tokens = len(encode(tokenizer, f"\n{self.needle.hide(longest_secret(self.needle.kind))}\n"))
        self._max_window_tokens = context - needle_tokens
        if self._max_window_tokens < 2 * len(encode(tokenizer, TASK)):
            raise LlamoryError(f"Task, needle and text don't fit into a window of {context} tokens.")
        self._window_iterator = self._pack_windows(haystack.sentences)
        self._windows: list[list[str]] = []
        self._cumulative_tokens: list[int] = []  # tokens up to the end of each window
        self._memory: MemoryBank = model.new_memory()
        self._segment_by_ids: dict[tuple[int, ...], str] = {}

    def __call__(self, length: int, depth: float, key: str) -> tuple[Prompt, dict[str, Any]]:
        """Make the prompt of at most `length` tokens with a key at a depth, and the arguments of `generate` for it."""
        from llamory.qa.evidence import select_evidence

        check_depth(depth)
        needle = f"\n{self.needle.hide(key)}\n"
        extra_tokens = len(self._question) + len(encode(self.tokenizer, needle))
        while not self._cumulative_tokens or self._cumulative_tokens[-1] + extra_tokens <= length:
            self._encode_next_window()
        count = sum(total + extra_tokens <= length for total in self._cumulative_tokens)
        if not count:
            raise LlamoryError(
                f"A prompt of {length} tokens is too short: a window, needle and question have "
                f"{self._cumulative_tokens[0] + extra_tokens}; ask for longer prompts."
            )
        ends = list(accumulate(map(len, self._windows[:count])))
        sentence = round(depth * ends[-1])
        index = bisect_left(ends, sentence)
        window = self._windows[index]
        offset = max(sentence - ends[index] + len(window), int(index == 0))  # the task stays first
        text = "".join(window[:offset]).strip() + needle + "".join(window[offset:]).strip()
        memory = self.model.new_memory()
        memory.attach(self._memory, [str(other) for other in range(count) if other != index])
        self.model.read(encode(self.tokenizer, text.strip()), memory, segment="needle")
        evidence = select_evidence(self.model, self._question, memory, memory.segments, self.evidence_ratio)
        prompt = Prompt(self.needle.question_text, self._question, key, ends[-1], memory.length())
        return prompt, {"past_key_values": self.model.memory_cache(memory.slice(evidence))}

    def _pack_windows(self, sentences: Sequence[str]) -> Iterator[list[str]]:
        """Endless windows of as many sentences as leave room for the needle; the first begins with the task."""
        size = cache(lambda sentence: len(encode(self.tokenizer, f" {sentence}")))
        window, tokens = [f"{TASK}\n"], len(encode(self.tokenizer, TASK)) + 2
        for sentence in cycle(sentences):
            if window and tokens + size(sentence) > self._max_window_tokens:
                yield window
                window, tokens = [], 0
            window.append(sentence)
            tokens += size(sentence)

    def _encode_next_window(self) -> None:
        window = next(self._window_iterator)
        # A sentence longer than a window is truncated.
        ids = encode(self.tokenizer, "".join(window).strip())[: self._max_window_tokens]
        segment = str(len(self._windows))
        same, memory = self._segment_by_ids.setdefault(tuple(ids), segment), self._memory
        if same == segment:
            self.model.read(ids, memory, segment=segment)
        else:
            for layer in memory.layers:
                memory.append(layer, memory.keys(layer, same), memory.values(layer, same), segment)
        self._windows.append(window)
        self._cumulative_tokens.append(sum(self._cumulative_tokens[-1:]) + len(ids))

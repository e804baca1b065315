"""The passkey task: a number, or another secret, stands in a long text, and the model is question_text for it at the end.

Published by Mohtashami & Jaggi 2023 (Landmark Attention, arXiv:2305.16300) and used for LongLLaMA (Tworkowski et al.
2023, arXiv:2307.03170, section 4.2); the default texts are theirs, to the letter.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from llamory.errors import LlamoryError
from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, Haystack
from llamory.evaluation.secrets import KINDS, draw_secret, score_answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
PUBLISHED_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
PUBLISHED_QUESTION = "What is the pass key? The pass key is"
KEY_FIELD = "{key}"
# What is hidden and question_text for where the secret isn't a number: these are llamory's own.
_NEEDLES = {
    "name": (
        "The guest of honour at the dinner was {key}.",
        "Who was the guest of honour at the dinner? The guest of honour at the dinner was",
    ),
    "date": ("The treaty was signed on {key}.", "When was the treaty signed? The treaty was signed on"),
    "sentence": (
        'The note on the door said: "{key}"',
        'What did the note on the door say? The note on the door said: "',
    ),
}
# Tokens that an answer may have besides the key: enough to see the number end, or for words around it where the
# question is a whole sentence.
_EXTRA_TOKENS, _EXTRA_TOKENS_OF_SENTENCE = 3, 16


@dataclass(frozen=True)
class Needle:
    """What is hidden, and how it is question_text for.

    Attributes:
        text: the hidden sentence, with `{key}` where the secret goes (as often as wanted).
        question: ends the prompt. None for the published question, or for another text its first words up to the
            key, which the model then completes.
        kind: what the secret is, one of `llamory.evaluation.secrets.KINDS`.

    Raises:
        LlamoryError: the text has no `{key}`, the question gives it away, no question can be made of the text, or there
            is no such kind.
    """

    text: str = PUBLISHED_NEEDLE
    question: str | None = None
    kind: str = "number"

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
        """The default_text needle of a kind of secret, the published one for numbers, or one with a text of its own."""
        if text is not None or kind not in _NEEDLES:
            return cls(PUBLISHED_NEEDLE if text is None else text, question, kind)
        default_text, question_text = _NEEDLES[kind]
        return cls(default_text, question_text if question is None else question, kind)

    @property
    def question_text(self) -> str:
        """The question that ends the prompt."""
        if self.question is not None:
            return self.question.strip()
        if self.text == PUBLISHED_NEEDLE:
            return PUBLISHED_QUESTION
        return self.text.partition(KEY_FIELD)[0].strip()


@dataclass(frozen=True)
class Prompt:
    """A prompt, as text and as the tokenizer's ids.

    Attributes:
        text: the prompt.
        input_ids: its tokens, with those that the tokenizer puts in front.
        key: the secret to be found.
        sentences: how many sentences of the haystack it has.
        in_memory: tokens of it that are in memory already, and not in `text` and `input_ids`.
    """

    text: str
    input_ids: list[int]
    key: str
    sentences: int
    in_memory: int = 0


# Makes the prompt of a length, a depth and a key, and what `generate` needs for it besides.
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
    """Build the longest prompt of whole sentences that has at most `length` tokens.

    Args:
        tokenizer: the model's; what it puts before a text counts.
        length: tokens.
        depth: where the needle stands, from 0 (before all filler) to 1 (after it).
        key: the secret to hide.
        needle: what is hidden and question_text for, the published one if None.
        haystack: the text around it.

    Raises:
        LlamoryError: the prompt has more tokens than `length` without any filler, or `depth` is outside 0 to 1.
    """
    check_depth(depth)
    needle = needle or Needle()

    def prompt(sentences: int) -> Prompt:
        before, after = haystack.around(sentences, depth)
        text = "\n".join([TASK, before, needle.text.replace(KEY_FIELD, key), after, needle.question_text])
        return Prompt(text, encode(tokenizer, text), key, sentences)

    best = prompt(0)
    if len(best.input_ids) > length:
        raise LlamoryError(
            f"A prompt of {length} tokens is too short: task, needle and question alone have {len(best.input_ids)}; "
            "ask for longer prompts."
        )
    # Guesses by tokens per sentence, kept between a count that fits and one that doesn't (a sentence has a token).
    too_many = length - len(best.input_ids) + 1
    last, guess = best, min(16, too_many - 1)
    while best.sentences + 1 < too_many:
        candidate = prompt(guess)
        rate = max(1.0, (len(candidate.input_ids) - len(last.input_ids)) / (candidate.sentences - last.sentences))
        if len(candidate.input_ids) <= length:
            best = candidate
        else:
            too_many = guess
        last = candidate
        guess += int((length - len(candidate.input_ids)) // rate)
        guess = min(max(guess, best.sentences + 1), too_many - 1)
    return best


def check_depth(depth: float) -> None:
    """Refuse a depth that isn't from 0 to 1 with a LlamoryError."""
    if not 0 <= depth <= 1:
        raise LlamoryError(f"The depth {depth:g} is outside 0 to 1, where 0 is the start of the text and 1 its end.")


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text that goes on: with what the tokenizer puts before it, without what it puts behind."""
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    # Some tokenizers close every text; an open question must stay open.
    return ids[:-1] if ids[-1] == tokenizer.eos_token_id and len(ids) > 1 else ids


# ---- answers ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One prompt and its answer.

    Attributes:
        key: the secret that was hidden.
        answer: what the model wrote.
        correct: whether the answer has it, see `llamory.evaluation.secrets.score_answer`.
        digits: share of the key's digits (of a text: of its words) that stand in their places.
        tokens: of the prompt.
        seconds: that `generate` took.
    """

    key: str
    answer: str
    correct: bool
    digits: float
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Cell:
    """The trials of one length and depth."""

    length: int
    depth: float
    trials: tuple[Trial, ...]

    @property
    def accuracy(self) -> float:
        """Share of the trials that found the whole key."""
        return self._mean(trial.correct for trial in self.trials)

    @property
    def digits(self) -> float:
        """Share of the keys' digits found, the mean over the trials."""
        return self._mean(trial.digits for trial in self.trials)

    @property
    def seconds(self) -> float:
        """Seconds per prompt."""
        return self._mean(trial.seconds for trial in self.trials)

    @property
    def tokens(self) -> int:
        """Tokens of the longest prompt."""
        return max(trial.tokens for trial in self.trials)

    def _mean(self, values: Iterable[float]) -> float:
        return sum(values) / len(self.trials)


@dataclass
class PasskeyResult:
    """What a model found, one cell per length and depth, in their order."""

    cells: list[Cell] = field(default_factory=list)

    def cell(self, length: int, depth: float) -> Cell | None:
        """The cell of a length and depth, None if it wasn't run."""
        return next((cell for cell in self.cells if (cell.length, cell.depth) == (length, depth)), None)

    @property
    def lengths(self) -> list[int]:
        """All lengths that were run, shortest first."""
        return sorted({cell.length for cell in self.cells})

    @property
    def depths(self) -> list[float]:
        """All depths that were run, from the start of the text to its end."""
        return sorted({cell.depth for cell in self.cells})

    @property
    def accuracy(self) -> float:
        """The mean over all cells."""
        return sum(cell.accuracy for cell in self.cells) / len(self.cells)

    def lengths_beyond_context(self, context: int | None) -> list[int]:
        """The lengths whose prompts have more tokens than a context; none if there is no context."""
        return sorted({cell.length for cell in self.cells if context is not None and cell.tokens > context})

    def add(self, cell: Cell) -> None:
        """Put a cell in its cell_key."""
        self.cells = sorted([*self.cells, cell], key=lambda each: (each.length, each.depth))


# ---- running ---------------------------------------------------------------------------------------------------------


def run_passkey(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    trials: int = 3,
    seed: int = 0,
    needle: Needle | None = None,
    haystack: Haystack = PUBLISHED_HAYSTACK,
    prompts: PromptMaker | None = None,
    result: PasskeyResult | None = None,
    on_cell: Callable[[Cell], None] | None = None,
    title: str | None = None,
    generate: Mapping[str, Any] | None = None,
) -> PasskeyResult:
    """Ask a model for passkeys hidden at some depths of prompts of some lengths; the shortest prompts come first.

    A key depends on the seed, the length, the depth and the trial's number only, so that two models get the same
    prompts, and a cell is the same whatever else is run.

    Args:
        model: anything with `generate` and `device`; it is question_text greedily, one prompt at a time, without template.
        tokenizer: its tokenizer.
        lengths: of the prompts, in tokens.
        depths: where the needle stands, from 0 (start) to 1 (end).
        trials: prompts per length and depth.
        seed: of the keys.
        needle: what is hidden and question_text for, the published one if None.
        haystack: the text around it.
        prompts: makes the prompts, of this needle, instead of `build_prompt`.
        result: what a run before has found; its cells are kept and not run again.
        on_cell: called after every cell, which is then in `result`.
        title: what the progress on standard error is called; None for no progress.
        generate: further arguments for `model.generate`.

    Raises:
        LlamoryError: a depth or a length is impossible (as `build_prompt` does), or there is nothing to run.
    """
    from llamory.evaluation.progress import CellProgress

    if trials < 1 or not lengths or not depths:
        raise LlamoryError("There is nothing to run: give at least one length, one depth and one trial.")
    for depth in depths:
        check_depth(depth)
    result = PasskeyResult() if result is None else result
    needle = needle or Needle()
    pending = [(length, depth) for length in sorted(set(lengths)) for depth in sorted(set(depths))]
    pending = [cell_key for cell_key in pending if result.cell(*cell_key) is None]
    with CellProgress(title, [length for length, _ in pending], trials) as progress:
        for length, depth in pending:
            done = []
            for number in range(trials):
                key = draw_secret(needle.kind, random.Random(f"{seed}/{length}/{depth}/{number}"))
                if prompts is None:
                    prompt = build_prompt(tokenizer, length, depth, key, needle=needle, haystack=haystack)
                    options: Mapping[str, Any] = {}
                else:
                    prompt, options = prompts(length, depth, key)
                done.append(_run_trial(model, tokenizer, prompt, needle.kind, {**(generate or {}), **options}))
                progress.advance(length)
            cell = Cell(length, depth, tuple(done))
            result.add(cell)
            progress.report(cell)
            if on_cell is not None:
                on_cell(cell)
    return result


def _run_trial(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, kind: str, options: Mapping[str, Any]
) -> Trial:
    input_ids = torch.tensor([prompt.input_ids], device=model.device)
    key_tokens = len(tokenizer(f" {prompt.key}", add_special_tokens=False)["input_ids"])
    extra_tokens = _EXTRA_TOKENS_OF_SENTENCE if prompt.text.endswith((".", "?", "!", ":")) else _EXTRA_TOKENS
    started = time.perf_counter()
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=key_tokens + extra_tokens,
        do_sample=False,
        **options,
    )
    new = output[0, input_ids.shape[1] :].tolist()
    seconds = time.perf_counter() - started
    answer = tokenizer.decode(new, skip_special_tokens=True)
    correct, digits = score_answer(answer, prompt.key, kind)
    return Trial(prompt.key, answer, correct, digits, len(prompt.input_ids) + prompt.in_memory, seconds)

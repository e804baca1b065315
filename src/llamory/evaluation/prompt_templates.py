"""Demonstrations and questions of a classification task: read, drawn, and packed into prompts of some lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.documents import read_json_lines
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEXT_FIELD, LABEL_FIELD = "{text}", "{label}"
TEMPLATE = "{text}\n{label}\n\n"


@dataclass(frozen=True)
class Example:
    """A text and its label."""

    text: str
    label: str


def read_examples(path: Path, *, text_field: str = "text", label_field: str = "label") -> list[Example]:
    """Read labelled texts from a JSON lines file; white space around both is dropped, numbers are labels too.

    Raises:
        LlamoryError: there is no such file, or a line lacks a field (file and line are told), or there is no line.
    """
    if not path.is_file():
        raise LlamoryError(f"There is no file {path}; give a JSON lines file of labelled texts.")

    def parse(entry: dict[str, Any]) -> Example:
        return Example(_entry(entry, text_field), _entry(entry, label_field))

    examples = [example for _, example in read_json_lines(path, parse)]
    if not examples:
        raise LlamoryError(f"{path} has no examples; it should have one a line, with {text_field} and {label_field}.")
    return examples


def _entry(entry: dict[str, Any], field: str) -> str:
    value = entry.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if field not in entry:
        raise LlamoryError(f"the object has no {field!r} (it has {', '.join(map(repr, entry)) or 'nothing'})")
    if not isinstance(value, str) or not value.strip():
        raise LlamoryError(f"{field!r} should be a text that isn't empty, not {value!r}")
    return value.strip()


def label_set(*parts: Sequence[Example] | None) -> list[str]:
    """All labels, sorted.

    Raises:
        LlamoryError: there are fewer than 2.
    """
    labels = sorted({example.label for part in parts for example in part or ()})
    if len(labels) < 2:
        raise LlamoryError(f"The examples have only the label {labels[0]!r}; classification needs at least 2 labels.")
    return labels


# ---- prompts ---------------------------------------------------------------------------------------------------------


class PromptTemplate:
    """How demonstrations and questions are worded, as tokens.

    A demonstration's text, its label and what follows are tokenised each by itself, so a label has the same tokens
    in a demonstration and as an answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE) -> None:
        """Take a template, such as `{text}\\n{label}\\n\\n`.

        Raises:
            LlamoryError: the template doesn't have the text once and then the label once.
        """
        question, found, after = template.partition(LABEL_FIELD)
        if not found or LABEL_FIELD in after or question.count(TEXT_FIELD) != 1 or TEXT_FIELD in after:
            raise LlamoryError(
                f"The template {template!r} doesn't have {TEXT_FIELD} once and after it {LABEL_FIELD} once."
            )
        # Most tokenizers join a space to the word behind it.
        self._question_template = question.rstrip(" ")
        self._label_prefix = question[len(self._question_template) :]
        self._tokenizer = tokenizer
        self._suffix_ids = self._ids(after)
        with_special: list[int] = tokenizer("a", verbose=False)["input_ids"]
        first = tokenizer.bos_token_id
        #: What the tokenizer puts before every text.
        self.start: list[int] = with_special[:1] if first is not None and with_special[:1] == [first] else []

    def question(self, text: str) -> list[int]:
        """The tokens of a text up to its label."""
        return self._ids(self._question_template.replace(TEXT_FIELD, text))

    def label(self, label: str) -> list[int]:
        """The tokens of a label, at least one."""
        return self._ids(self._label_prefix + label)

    def demonstration(self, example: Example) -> list[int]:
        """The tokens of a text with its label."""
        return [*self.question(example.text), *self.label(example.label), *self._suffix_ids]

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


@dataclass(frozen=True)
class ManyshotPrompt:
    """One length with one seed: what is demonstration_pool and what is sampled_questions.

    Attributes:
        length: the most tokens that may be demonstration_pool.
        seed: of the draw.
        input_ids: the demonstrations' tokens, at most `length`.
        demonstrations: how many they are.
        questions: sampled_questions one by one; the same for all lengths of a seed.
    """

    length: int
    seed: int
    input_ids: tuple[int, ...]
    demonstrations: int
    questions: tuple[Example, ...]


def build_manyshot_prompts(
    prompt_template: PromptTemplate,
    train: Sequence[Example],
    lengths: Sequence[int],
    seeds: Sequence[int],
    *,
    test: Sequence[Example] | None = None,
    questions: int = 100,
) -> list[ManyshotPrompt]:
    """Draw demonstrations and questions, for every length and seed.

    Demonstrations are taken in the order drawn until the next one doesn't fit, so a longer prompt begins with all of a
    shorter one's.

    Args:
        prompt_template: of the prompts.
        train: what demonstrations are drawn from.
        lengths: the most tokens of demonstrations; 0 for none at all.
        seeds: of the draws.
        test: what questions are drawn from; None: from `train`, which then shows the others only.
        questions: how many are sampled_questions; all of `test` if it has fewer.

    Raises:
        LlamoryError: a length is too small for one demonstration, or larger than all of them; or there are too few
            examples.
    """
    if min(lengths) < 0:
        raise LlamoryError(f"A length of {min(lengths)} tokens isn't possible; give 0 or more.")
    if test is None and len(train) <= questions:
        raise LlamoryError(
            f"The {len(train)} examples are too few to ask {questions} of them and show others; "
            "ask fewer questions, or give more examples."
        )
    prompts = []
    for seed in sorted(set(seeds)):
        demonstration_pool, sampled_questions = _sample(train, test, seed, questions)
        for length in sorted(set(lengths)):
            ids, count = _pack_demonstrations(prompt_template, demonstration_pool, length)
            prompts.append(ManyshotPrompt(length, seed, tuple(ids), count, tuple(sampled_questions)))
    return sorted(prompts, key=lambda prompt: (prompt.length, prompt.seed))


def _sample(
    train: Sequence[Example], test: Sequence[Example] | None, seed: int, questions: int
) -> tuple[list[Example], list[Example]]:
    """Demonstrations in their order, and questions."""
    shuffled = random.Random(f"{seed}/demonstrations").sample(train, len(train))
    if test is None:
        return shuffled[questions:], shuffled[:questions]
    return shuffled, random.Random(f"{seed}/questions").sample(test, min(questions, len(test)))


def _pack_demonstrations(
    prompt_template: PromptTemplate, demonstration_pool: Sequence[Example], length: int
) -> tuple[list[int], int]:
    """The tokens of as many demonstrations as fit, and how many they are."""
    if length == 0:
        return [], 0
    ids = list(prompt_template.start)
    for count, example in enumerate(demonstration_pool):
        more = prompt_template.demonstration(example)
        if len(ids) + len(more) > length:
            if count == 0:
                raise LlamoryError(
                    f"A length of {length} tokens is too small for one demonstration, which has "
                    f"{len(ids) + len(more)}; give longer --lengths."
                )
            return ids, count
        ids += more
    if len(ids) < length:
        raise LlamoryError(
            f"All {len(demonstration_pool)} demonstrations have {len(ids):,} tokens, less than {length:,}; "
            "give shorter --lengths or more examples."
        )
    return ids, len(demonstration_pool)

"""Classification with demonstrations in memory (Tworkowski et al. 2023, arXiv:2307.03170, in-context learning)."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Literal

import torch

from llamory.common.progress import ProgressBar
from llamory.documents import read_json_lines
from llamory.errors import LlamoryError
from llamory.evaluation.plots import draw_curves
from llamory.evaluation.results import CurveResultsFile, file_identity, run_models, run_pending

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank

ScoreType = Literal["mean", "sum"]
TEXT_FIELD, LABEL_FIELD = "{text}", "{label}"
TEMPLATE = "{text}\n{label}\n\n"


@dataclass(frozen=True)
class Example:
    """A text and its label."""

    text: str
    label: str


def read_examples(path: Path, *, text_field: str = "text", label_field: str = "label") -> list[Example]:
    """Read labelled texts from a JSON lines file; white space around them is dropped, and labels may be numbers.

    Raises a LlamoryError if the file doesn't exist, a line lacks a field, or there is no line.
    """
    if not path.is_file():
        raise LlamoryError(f"There is no file {path}; give a JSON lines file of labelled texts.")

    def parse(entry: dict[str, Any]) -> Example:
        return Example(_entry(entry, text_field), _entry(entry, label_field))

    examples = [example for _, example in read_json_lines(path, parse)]
    if not examples:
        raise LlamoryError(f"{path} has no examples; it should have one per line, with {text_field} and {label_field}.")
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


def label_set(*examples: Sequence[Example] | None) -> list[str]:
    """All labels of some lists of examples, sorted; fewer than 2 are an error."""
    labels = sorted({example.label for part in examples for example in part or ()})
    if len(labels) < 2:
        raise LlamoryError(f"The examples have only the label {labels[0]!r}; classification needs at least 2 labels.")
    return labels


class PromptTemplate:
    """Token ids of demonstrations and questions; a label has the same tokens in a demonstration as in an answer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE) -> None:
        """Parse a template with `{text}` once and after it `{label}` once, such as `{text}\\n{label}\\n\\n`."""
        question, found, after = template.partition(LABEL_FIELD)
        if not found or LABEL_FIELD in after or question.count(TEXT_FIELD) != 1 or TEXT_FIELD in after:
            raise LlamoryError(f"The template {template!r} doesn't have {{text}} once and after it {{label}} once.")
        # Most tokenizers join a space to the following word.
        self._question_template = question.rstrip(" ")
        self._label_prefix = question[len(self._question_template) :]
        self._tokenizer = tokenizer
        self._suffix_ids = self._ids(after)
        with_special: list[int] = tokenizer("a", verbose=False)["input_ids"]
        first = tokenizer.bos_token_id
        self.start: list[int] = with_special[:1] if first is not None and with_special[:1] == [first] else []

    def question(self, text: str) -> list[int]:
        """Token ids of a text up to its label."""
        return self._ids(self._question_template.replace(TEXT_FIELD, text))

    def label(self, label: str) -> list[int]:
        """Token ids of a label, at least one."""
        return self._ids(self._label_prefix + label)

    def demonstration(self, example: Example) -> list[int]:
        """Token ids of a text with its label."""
        return [*self.question(example.text), *self.label(example.label), *self._suffix_ids]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


@dataclass(frozen=True)
class ManyshotPrompt:
    """Demonstrations with the tokens `input_ids`, at most `length`, and the questions, the same for all lengths."""

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
    """Draw demonstrations and questions for every length and seed; a longer prompt begins with a shorter one.

    Raises a LlamoryError if a length is too small for one demonstration or too large for all, or examples are too few.

    Args:
        lengths: maximum numbers of tokens of demonstrations; 0 for no demonstration.
        test: the examples for questions; None takes them out of `train`.
        questions: number of questions; all of `test` if it has fewer.
    """
    if min(lengths) < 0:
        raise LlamoryError(f"A length of {min(lengths)} tokens isn't possible; give 0 or more.")
    if test is None and len(train) <= questions:
        raise LlamoryError(f"The {len(train)} examples are too few to ask {questions} of them and show others.")
    prompts = []
    for seed in sorted(set(seeds)):
        pool = random.Random(f"{seed}/demonstrations").sample(train, len(train))
        if test is None:
            sampled, pool = pool[:questions], pool[questions:]
        else:
            sampled = random.Random(f"{seed}/questions").sample(test, min(questions, len(test)))
        for length in sorted(set(lengths)):
            ids, count = _fill_prompt(prompt_template, pool, length)
            prompts.append(ManyshotPrompt(length, seed, tuple(ids), count, tuple(sampled)))
    return sorted(prompts, key=lambda prompt: (prompt.length, prompt.seed))


def _fill_prompt(prompt_template: PromptTemplate, pool: Sequence[Example], length: int) -> tuple[list[int], int]:
    if length == 0:
        return [], 0
    ids = list(prompt_template.start)
    for count, example in enumerate(pool):
        more = prompt_template.demonstration(example)
        if len(ids) + len(more) > length:
            if count == 0:
                raise LlamoryError(
                    f"A length of {length} tokens is too small for one demonstration, which has {len(ids) + len(more)}."
                )
            return ids, count
        ids += more
    if len(ids) < length:
        raise LlamoryError(f"All {len(pool)} demonstrations have {len(ids):,} tokens, less than {length:,}.")
    return ids, len(pool)


@torch.no_grad()
def label_scores(
    model: LongLlamaForCausalLM,
    memory: MemoryBank | None,
    question: Sequence[int],
    labels: Sequence[Sequence[int]],
    score_type: ScoreType = "mean",
) -> list[float]:
    """The mean or the sum of the log-probabilities of each label's tokens after a question, in nats.

    The mean favours labels of many tokens: after demonstrations only the first token is uncertain. `question` and
    `labels` are token ids; the memory isn't changed.
    """
    ids = torch.tensor([question], device=model.device)
    cache = None if memory is None else model.memory_cache(memory)
    context = model.config.max_position_embeddings
    output = model(ids, past_key_values=cache, use_cache=True, last_context_length=context, logits_to_keep=1)
    first = output.logits[0, -1].float().log_softmax(-1).cpu()
    totals = [float(first[label[0]]) for label in labels]
    multi_token = [index for index, label in enumerate(labels) if len(label) > 1]
    if multi_token:
        cache = output.past_key_values
        cache.batch_repeat_interleave(len(multi_token))
        predictions = [torch.tensor(labels[index][:-1]) for index in multi_token]
        rows = torch.nn.utils.rnn.pad_sequence(predictions, batch_first=True)  # (labels, tokens - 1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in predictions], batch_first=True)
        rows, mask = rows.to(model.device), mask.to(model.device)
        logits = model(input_ids=rows, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        for row, index in enumerate(multi_token):
            target_ids = torch.tensor(labels[index][1:])
            log_probs = logits[row, : len(target_ids)].float().log_softmax(-1).cpu()
            totals[index] += float(log_probs[torch.arange(len(target_ids)), target_ids].sum())
    return totals if score_type == "sum" else [total / len(label) for total, label in zip(totals, labels, strict=True)]


@dataclass(frozen=True)
class Trial:
    """The answers of one length and seed."""

    length: int  # maximum number of tokens of demonstrations
    seed: int
    demonstrations: int
    tokens: int  # of the demonstrations
    accuracy: float
    answers: Sequence[str]  # predicted label of each question
    labels: Sequence[str]  # correct label of each question
    seconds: float


@dataclass(frozen=True)
class ManyshotPoint:
    """Means over seeds at one length."""

    length: int
    seeds: int
    accuracy: float
    deviation: float | None  # standard deviation of the accuracy; None for a single seed
    demonstrations: float
    tokens: float


def run_manyshot(
    model: LongLlamaForCausalLM,
    prompt_template: PromptTemplate,
    prompts: Sequence[ManyshotPrompt],
    labels: Sequence[str],
    *,
    score_type: ScoreType = "mean",
    trials: list[Trial] | None = None,
    on_trial: Callable[[Trial], Any] | None = None,
    title: str | None = None,
) -> list[Trial]:
    """Answer the questions of each prompt with the labels that have the highest `label_scores`.

    The demonstrations of each prompt are encoded once. `trials`, `on_trial` and `title` are as `scores`, `on_score` and
    `title` of `run_perplexity`.
    """
    trials = [] if trials is None else trials
    done = {(trial.length, trial.seed) for trial in trials}
    pending = [prompt for prompt in prompts if (prompt.length, prompt.seed) not in done]
    label_ids = [prompt_template.label(label) for label in labels]

    def run(prompt: ManyshotPrompt, bar: ProgressBar) -> tuple[Trial, str]:
        started = time.perf_counter()
        memory = model.read(prompt.input_ids) if prompt.input_ids else None
        start = prompt_template.start if memory is None else []
        answers = []
        for example in prompt.questions:
            question = [*start, *prompt_template.question(example.text)]
            scores = label_scores(model, memory, question, label_ids, score_type)
            answers.append(labels[scores.index(max(scores))])
        correct = [example.label for example in prompt.questions]
        accuracy = sum(map(str.__eq__, answers, correct)) / len(correct)
        seconds, count, tokens = time.perf_counter() - started, prompt.demonstrations, len(prompt.input_ids)
        bar.advance(prompt.length + 1)
        line = f"{prompt.length:,} tokens, {count} demonstrations, seed {prompt.seed}: {accuracy:.1%} right"
        trial = Trial(prompt.length, prompt.seed, count, tokens, accuracy, answers, correct, seconds)
        return trial, f"{line} ({seconds:.1f} s)"

    total = sum(prompt.length + 1 for prompt in pending)
    run_pending(pending, run, tokens=total, add=trials.append, on_score=on_trial, title=title)
    return trials


def manyshot_curve(trials: Sequence[Trial]) -> list[ManyshotPoint]:
    """The means over seeds, the shortest length first, without lengths that lack the trials of some seeds."""
    by_length: dict[int, list[Trial]] = {}
    for trial in trials:
        by_length.setdefault(trial.length, []).append(trial)
    seeds = max(map(len, by_length.values()), default=0)
    points = []
    for length, found in sorted(by_length.items()):
        if len(found) == seeds:
            names = ("accuracy", "demonstrations", "tokens")
            accuracy, demonstrations, tokens = (fmean(getattr(trial, name) for trial in found) for name in names)
            deviation = stdev(trial.accuracy for trial in found) if seeds > 1 else None
            points.append(ManyshotPoint(length, seeds, accuracy, deviation, demonstrations, tokens))
    return points


class ManyshotResultsFile(CurveResultsFile[Trial]):
    """Many-shot results of one or more models on the same examples."""

    evaluation = "manyshot"
    score_class = Trial
    make_curve = staticmethod(manyshot_curve)


def evaluate(
    names: Sequence[str],
    train: Path,
    lengths: Sequence[int],
    output: Path,
    *,
    test: Path | None = None,
    seeds: int = 3,
    questions: int = 100,
    text_field: str = "text",
    label_field: str = "label",
    template: str = TEMPLATE,
    score_type: ScoreType = "mean",
    model_kwargs: Mapping[str, Any] | None = None,
) -> ManyshotResultsFile:
    """Run the task for some models, and write `manyshot.json` and `manyshot.png`; existing results are resumed.

    `train` and `test` are JSON lines files as for `read_examples`, `seeds` is the number of draws, and `model_kwargs`
    are for `load_long_model`; `build_manyshot_prompts`, `PromptTemplate` and `label_scores` describe the rest. Raises a
    LlamoryError if a file is broken, a length is impossible, or the output has other results.
    """
    from llamory.models.base import load_tokenizer

    fields = {"text_field": text_field, "label_field": label_field}
    train_examples = read_examples(train, **fields)
    test_examples = None if test is None else read_examples(test, **fields)
    labels = label_set(train_examples, test_examples)
    templates = {name: PromptTemplate(load_tokenizer(name), template) for name in names}
    prompts = {  # before a model is loaded, since they may be impossible
        name: build_manyshot_prompts(
            each, train_examples, lengths, range(seeds), test=test_examples, questions=questions
        )
        for name, each in templates.items()
    }
    test_identity = None if test is None else file_identity([test])
    settings: dict[str, Any] = {"train": file_identity([train]), "test": test_identity, **fields}
    settings |= {"labels": labels, "questions": questions, "template": template, "score_type": score_type}
    results = ManyshotResultsFile(output / "manyshot.json", settings)

    def run(name: str, model: LongLlamaForCausalLM, trials: list[Trial], title: str) -> None:
        options: dict[str, Any] = {"score_type": score_type, "on_trial": lambda _: results.write(), "title": title}
        run_manyshot(model, templates[name], prompts[name], labels, trials=trials, **options)

    run_models(results, names, run, model_kwargs)
    lines = results.lines("length", "accuracy", error="deviation")
    title = f"{train.stem}: answers with demonstrations in memory"
    style: dict[str, Any] = {"x_label": "Tokens of demonstrations", "y_label": "Correct answers", "percent": True}
    style["reference_line"] = (f"chance: one of {len(labels)} labels", 1 / len(labels))
    draw_curves(output / "manyshot.png", title, lines, **style)
    return results

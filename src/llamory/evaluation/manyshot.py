"""Classification with as many demonstrations in memory as fit some lengths.

As the Focused Transformer paper does with TREC (Tworkowski et al. 2023, arXiv:2307.03170, the section on in-context
learning): more demonstrations should give better answers, also far beyond the model's context.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from llamory.common.progress import ProgressBar
from llamory.documents import read_json_lines
from llamory.errors import LlamoryError
from llamory.evaluation.plots import Line, draw_curves
from llamory.evaluation.results import CurveResultsFile, display_names, file_identity, model_metadata

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
    """Read labelled texts from a JSON lines file. White space around both is dropped; labels may be numbers.

    Raises:
        LlamoryError: the file doesn't exist, a line lacks a field, or there is no line.
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
    """All labels of some lists of examples, sorted.

    Raises:
        LlamoryError: there are fewer than 2.
    """
    labels = sorted({example.label for part in examples for example in part or ()})
    if len(labels) < 2:
        raise LlamoryError(f"The examples have only the label {labels[0]!r}; classification needs at least 2 labels.")
    return labels


# ---- prompts ---------------------------------------------------------------------------------------------------------


class PromptTemplate:
    """Makes token ids of demonstrations and questions.

    A demonstration's text, its label and the rest are tokenized separately, so a label has the same tokens in a
    demonstration and as an answer.

    Attributes:
        start: the tokenizer's prefix of a text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = TEMPLATE) -> None:
        """Parse a template, such as `{text}\\n{label}\\n\\n`.

        Raises:
            LlamoryError: the template doesn't have `{text}` once and then `{label}` once.
        """
        question, found, after = template.partition(LABEL_FIELD)
        if not found or LABEL_FIELD in after or question.count(TEXT_FIELD) != 1 or TEXT_FIELD in after:
            raise LlamoryError(
                f"The template {template!r} doesn't have {TEXT_FIELD} once and after it {LABEL_FIELD} once."
            )
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
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


@dataclass(frozen=True)
class ManyshotPrompt:
    """Demonstrations and questions of one length and seed.

    Attributes:
        length: the maximum number of tokens of demonstrations.
        seed: of the draw.
        input_ids: the demonstrations' tokens, at most `length`.
        demonstrations: number of demonstrations.
        questions: the same for all lengths of a seed.
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
    """Draw demonstrations and questions for every length and seed.

    Demonstrations are added in the order drawn until the next one doesn't fit, so a longer prompt begins with a shorter
    one.

    Args:
        prompt_template: of the prompts.
        train: the examples for demonstrations.
        lengths: maximum numbers of tokens of demonstrations; 0 for no demonstration.
        seeds: of the draws.
        test: the examples for questions. None draws them from `train`; these aren't shown as demonstrations.
        questions: number of questions; all of `test` if it has fewer.

    Raises:
        LlamoryError: a length is too small for one demonstration or too large for all, or there are too few examples.
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
        pool, sampled_questions = _sample(train, test, seed, questions)
        for length in sorted(set(lengths)):
            ids, count = _fill_prompt(prompt_template, pool, length)
            prompts.append(ManyshotPrompt(length, seed, tuple(ids), count, tuple(sampled_questions)))
    return sorted(prompts, key=lambda prompt: (prompt.length, prompt.seed))


def _sample(
    train: Sequence[Example], test: Sequence[Example] | None, seed: int, questions: int
) -> tuple[list[Example], list[Example]]:
    """Demonstrations in the order drawn, and questions."""
    shuffled = random.Random(f"{seed}/demonstrations").sample(train, len(train))
    if test is None:
        return shuffled[questions:], shuffled[:questions]
    return shuffled, random.Random(f"{seed}/questions").sample(test, min(questions, len(test)))


def _fill_prompt(prompt_template: PromptTemplate, pool: Sequence[Example], length: int) -> tuple[list[int], int]:
    """Token ids of as many demonstrations as fit, and their number."""
    if length == 0:
        return [], 0
    ids = list(prompt_template.start)
    for count, example in enumerate(pool):
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
            f"All {len(pool)} demonstrations have {len(ids):,} tokens, less than {length:,}; "
            "give shorter --lengths or more examples."
        )
    return ids, len(pool)


# ---- answers ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def label_scores(
    model: LongLlamaForCausalLM,
    memory: MemoryBank | None,
    question: Sequence[int],
    labels: Sequence[Sequence[int]],
    score_type: ScoreType = "mean",
) -> list[float]:
    """The mean or the sum of the log-probabilities of each label's tokens after a question.

    The question is encoded once into the local context; the labels continue from it as rows of one batch.

    Args:
        model: in evaluation mode.
        memory: of the demonstrations; it isn't changed. None for no memory.
        question: token ids of the text up to the label.
        labels: token ids of each label.
        score_type: "mean", or "sum" for the log-probability of the whole label. The mean favours labels of many tokens:
            after demonstrations only a label's first token is uncertain.

    Returns:
        One score per label, in nats, computed in float32.
    """
    output = model(
        input_ids=torch.tensor([question], device=model.device),
        past_key_values=None if memory is None else model.memory_cache(memory),
        use_cache=True,
        last_context_length=model.config.max_position_embeddings,
        logits_to_keep=1,
    )
    first = output.logits[0, -1].float().log_softmax(-1).cpu()
    totals = [float(first[label[0]]) for label in labels]
    multi_token = [index for index, label in enumerate(labels) if len(label) > 1]
    if multi_token:
        cache = output.past_key_values
        cache.batch_repeat_interleave(len(multi_token))
        predictions = [torch.tensor(labels[index][:-1]) for index in multi_token]
        rows = torch.nn.utils.rnn.pad_sequence(predictions, batch_first=True)  # (labels, tokens - 1)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in predictions], batch_first=True)
        logits = model(
            input_ids=rows.to(model.device),
            attention_mask=mask.to(model.device),
            past_key_values=cache,
            use_cache=True,
        ).logits
        for row, index in enumerate(multi_token):
            target_ids = torch.tensor(labels[index][1:])
            log_probs = logits[row, : len(target_ids)].float().log_softmax(-1).cpu()
            totals[index] += float(log_probs[torch.arange(len(target_ids)), target_ids].sum())
    if score_type == "sum":
        return totals
    return [total / len(label) for total, label in zip(totals, labels, strict=True)]


@dataclass(frozen=True)
class Trial:
    """The answers of one length and seed.

    Attributes:
        length: the maximum number of tokens of demonstrations.
        seed: of the draw.
        demonstrations: number of demonstrations.
        tokens: of the demonstrations.
        accuracy: fraction of correct answers.
        answers: the predicted label of each question.
        labels: the correct label of each question.
        seconds: of encoding and answering.
    """

    length: int
    seed: int
    demonstrations: int
    tokens: int
    accuracy: float
    answers: Sequence[str]
    labels: Sequence[str]
    seconds: float


@dataclass(frozen=True)
class ManyshotPoint:
    """The mean over seeds at one length.

    Attributes:
        length: the maximum number of tokens of demonstrations.
        seeds: number of seeds.
        accuracy: the mean.
        deviation: standard deviation of the accuracy between seeds; None for a single seed.
        demonstrations: the mean number of demonstrations.
        tokens: the mean number of their tokens.
    """

    length: int
    seeds: int
    accuracy: float
    deviation: float | None
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
    on_trial: Callable[[Trial], None] | None = None,
    title: str | None = None,
) -> list[Trial]:
    """Answer all questions of all prompts; a prompt's demonstrations are encoded into memory once for all questions.

    The answer is the label with the highest score of `label_scores`.

    Args:
        model: a model with memory, in evaluation mode.
        prompt_template: of its tokenizer.
        prompts: from `build_manyshot_prompts`.
        labels: the possible answers.
        score_type: as for `label_scores`.
        trials: those of an earlier run; they are kept and not run again.
        on_trial: called after every trial, when it is in `trials`.
        title: of the progress on standard error; None for no progress.
    """
    trials = [] if trials is None else trials
    done = {(trial.length, trial.seed) for trial in trials}
    pending = [prompt for prompt in prompts if (prompt.length, prompt.seed) not in done]
    answers = [prompt_template.label(label) for label in labels]
    total = sum(prompt.length + 1 for prompt in pending)
    with ProgressBar(title or "", total, unit="tokens", shown=title is not None) as bar:
        for number, prompt in enumerate(pending, 1):
            trial = _run_trial(model, prompt_template, prompt, labels, answers, score_type)
            trials.append(trial)
            bar.advance(prompt.length + 1)
            bar.print(
                f"{title} {number}/{len(pending)}: {prompt.length:,} tokens, {prompt.demonstrations} demonstrations, "
                f"seed {prompt.seed}: {trial.accuracy:.1%} right ({trial.seconds:.1f} s)"
            )
            if on_trial is not None:
                on_trial(trial)
    return trials


def _run_trial(
    model: LongLlamaForCausalLM,
    prompt_template: PromptTemplate,
    prompt: ManyshotPrompt,
    labels: Sequence[str],
    answers: Sequence[Sequence[int]],
    score_type: ScoreType,
) -> Trial:
    started = time.perf_counter()
    memory = model.read(prompt.input_ids) if prompt.input_ids else None
    predictions = []
    for example in prompt.questions:
        question = prompt_template.question(example.text)
        if memory is None:
            question = [*prompt_template.start, *question]
        scores = label_scores(model, memory, question, answers, score_type)
        predictions.append(labels[scores.index(max(scores))])
    right = [example.label for example in prompt.questions]
    accuracy = sum(map(str.__eq__, predictions, right)) / len(right)
    seconds = time.perf_counter() - started
    return Trial(
        prompt.length, prompt.seed, prompt.demonstrations, len(prompt.input_ids), accuracy, predictions, right, seconds
    )


def manyshot_curve(trials: Sequence[Trial]) -> list[ManyshotPoint]:
    """The means over seeds, the shortest length first; lengths that an interrupted run left incomplete are left out."""
    by_length: dict[int, list[Trial]] = {}
    for trial in trials:
        by_length.setdefault(trial.length, []).append(trial)
    max_seeds = max(map(len, by_length.values()), default=0)
    return [_point(length, found) for length, found in sorted(by_length.items()) if len(found) == max_seeds]


def _point(length: int, trials: Sequence[Trial]) -> ManyshotPoint:
    accuracies = [trial.accuracy for trial in trials]
    return ManyshotPoint(
        length,
        len(trials),
        statistics.fmean(accuracies),
        statistics.stdev(accuracies) if len(accuracies) > 1 else None,
        statistics.fmean(trial.demonstrations for trial in trials),
        statistics.fmean(trial.tokens for trial in trials),
    )


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

    Args:
        names: of models, as for `load_long_model`.
        train: JSON lines file with the examples for demonstrations.
        lengths: maximum numbers of tokens of demonstrations.
        output: a folder; it is created if it does not exist.
        test: JSON lines file with the examples for questions; None draws them from `train`.
        seeds: number of draws.
        questions: per length and seed.
        text_field, label_field: keys of a line's text and label.
        template: of a demonstration.
        score_type: as for `label_scores`.
        model_kwargs: passed to `load_long_model`.

    Raises:
        LlamoryError: a file is broken, a length is impossible, or the output has other results.
    """
    from llamory.models.base import load_tokenizer

    fields = {"text_field": text_field, "label_field": label_field}
    train_examples = read_examples(train, **fields)
    test_examples = None if test is None else read_examples(test, **fields)
    labels = label_set(train_examples, test_examples)
    templates = {name: PromptTemplate(load_tokenizer(name), template) for name in names}
    # Fail on impossible prompts before a model is loaded.
    prompts = {
        name: build_manyshot_prompts(
            each, train_examples, lengths, range(seeds), test=test_examples, questions=questions
        )
        for name, each in templates.items()
    }
    settings = {
        "train": file_identity([train]),
        "test": None if test is None else file_identity([test]),
        **fields,
        "labels": labels,
        "questions": questions,
        "template": template,
        "score_type": score_type,
    }
    from llamory.longllama.loading import load_long_model  # after the checks: it takes a second

    results = ManyshotResultsFile(output / "manyshot.json", settings)
    shown = display_names(names)
    for name in names:
        model = load_long_model(name, **(model_kwargs or {}))
        run_manyshot(
            model,
            templates[name],
            prompts[name],
            labels,
            score_type=score_type,
            trials=results.run(name, model_metadata(model)),
            on_trial=lambda _: results.write(),
            title=shown[name],
        )
        del model  # two models at once may not fit
    results.write()
    shown = display_names(results.scores)
    lines = []
    for name in results.scores:
        curve = results.curve(name)
        error_bars = None if curve[0].deviation is None else [point.deviation for point in curve]
        accuracies = [point.accuracy for point in curve]
        lines.append(Line(shown[name], [point.length for point in curve], accuracies, error_bars))
    draw_curves(
        output / "manyshot.png",
        f"{train.stem}: answers with demonstrations in memory",
        lines,
        x_label="Tokens of demonstrations",
        y_label="Correct answers",
        percent=True,
        reference_line=(f"chance: one of {len(labels)} labels", 1 / len(labels)),
    )
    return results

"""Classification with as many demonstrations in memory as fit some lengths.

As the Focused Transformer paper does with TREC (Tworkowski et al. 2023, arXiv:2307.03170, the section on in-context
learning): more demonstrations should make better answers, also far beyond the model's context.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from llamory.evaluation.prompt_templates import ManyshotPrompt, PromptTemplate
from llamory.evaluation.steps import StepProgress

if TYPE_CHECKING:
    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank

ScoreType = Literal["mean", "sum"]


@torch.no_grad()
def label_scores(
    model: LongLlamaForCausalLM,
    memory: MemoryBank | None,
    question: Sequence[int],
    labels: Sequence[Sequence[int]],
    score_type: ScoreType = "mean",
) -> list[float]:
    """The mean, or the sum, of the log-probabilities of each label's tokens after a question.

    The question is read once, into the local context; the labels go on from there side by side.

    Args:
        model: in evaluation mode.
        memory: what the demonstrations were read into; it isn't changed. None for no memory.
        question: tokens of the text up to the label.
        labels: tokens per label.
        score_type: "mean", or "sum", which is the log-probability of the label as a whole. Where labels have different
            numbers of tokens, the mean favours long ones: once demonstrations are known, only a label's first token is
            in doubt, and the others, all but certain, halve what that doubt costs.

    Returns:
        In nats, computed in float32, one per label.
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
        rows = torch.nn.utils.rnn.pad_sequence(predictions, batch_first=True)
        real = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in predictions], batch_first=True)
        logits = model(
            input_ids=rows.to(model.device),
            attention_mask=real.to(model.device),
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
        length: the max_seeds tokens that were shown.
        seed: of the draw.
        demonstrations: how many were shown.
        tokens: that they have.
        accuracy: share of right answers.
        answers: what was answered, question by question.
        labels: what would have been right.
        seconds: that reading and answering took.
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
    """What a model answered at one length: means over seeds.

    Attributes:
        length: the max_seeds tokens of demonstrations.
        seeds: how many there were.
        accuracy: their mean.
        deviation: standard deviation of the accuracy between seeds; None for a single seed.
        demonstrations: shown, the mean.
        tokens: that they have, the mean.
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
    """Answer all questions of all prompts; demonstrations are read into memory once, and mounted for every question.

    The answer is the label with the highest score of `label_scores`.

    Args:
        model: a model with memory, in evaluation mode.
        prompt_template: of its tokenizer.
        prompts: from `build_manyshot_prompts`.
        labels: the answers to choose from.
        score_type: of labels, as for `label_scores`.
        trials: what a run before has found; it is kept, not done again, and filled.
        on_trial: called after every trial, which is then in `trials`.
        title: what the progress on standard error is called; None for no progress.
    """
    trials = [] if trials is None else trials
    done = {(trial.length, trial.seed) for trial in trials}
    pending = [prompt for prompt in prompts if (prompt.length, prompt.seed) not in done]
    answers = [prompt_template.label(label) for label in labels]
    with StepProgress(title, [prompt.length + 1 for prompt in pending], 1) as progress:
        for prompt in pending:
            trial = _run_trial(model, prompt_template, prompt, labels, answers, score_type)
            trials.append(trial)
            progress.step(
                prompt.length + 1,
                f"{prompt.length:,} tokens, {prompt.demonstrations} demonstrations, seed {prompt.seed}: "
                f"{trial.accuracy:.1%} right ({trial.seconds:.1f} s)",
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
    """The means over seeds, the shortest length first.

    A length that fewer seeds were run with than with others, as a stopped run leaves it, is left out.
    """
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

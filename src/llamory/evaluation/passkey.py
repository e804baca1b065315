"""The passkey task: a secret is hidden in a long text, and the model is asked for it at the end.

Published by Mohtashami & Jaggi 2023 (arXiv:2305.16300) and used for LongLLaMA (arXiv:2307.03170, section 4.2).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.evaluation.haystack import (
    PUBLISHED_HAYSTACK,
    Haystack,
    IndependentDocumentPrompts,
    Needle,
    Prompt,
    PromptMaker,
    build_prompt,
    check_depth,
    draw_secret,
    longest_secret,
    read_haystack,
    score_answer,
)
from llamory.evaluation.plots import Panel, draw_heat_map
from llamory.evaluation.results import ResultsFile, display_names, file_identity, model_metadata, run_pending

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TITLES = {"memory": "With memory", "baseline": "Plain model, full cache"}
# Tokens of an answer beyond the key's: to see a number end, or for words around it if the question is a sentence.
_EXTRA_TOKENS, _EXTRA_TOKENS_OF_SENTENCE = 3, 16


@dataclass(frozen=True)
class Trial:
    """One prompt and its answer."""

    key: str
    answer: str
    correct: bool
    digits: float  # fraction of the key's digits (of a text: words) at their positions
    tokens: int  # of the prompt
    seconds: float  # of `generate`


@dataclass(frozen=True)
class Cell:
    """The trials of one length and depth."""

    length: int
    depth: float
    trials: tuple[Trial, ...]

    @property
    def accuracy(self) -> float:
        """Fraction of the trials that found the key."""
        return self._mean("correct")

    @property
    def digits(self) -> float:
        """Fraction of the key's digits found, the mean over the trials."""
        return self._mean("digits")

    @property
    def seconds(self) -> float:
        """Seconds per prompt."""
        return self._mean("seconds")

    @property
    def tokens(self) -> int:
        """Tokens of the longest prompt."""
        return max(trial.tokens for trial in self.trials)

    def _mean(self, name: str) -> float:
        return sum(getattr(trial, name) for trial in self.trials) / len(self.trials)


@dataclass
class PasskeyResult:
    """The cells of a model, sorted by length and depth."""

    cells: list[Cell] = field(default_factory=list)

    def cell(self, length: int, depth: float) -> Cell | None:
        """The cell of a length and depth, None if it wasn't run."""
        return next((cell for cell in self.cells if (cell.length, cell.depth) == (length, depth)), None)

    @property
    def lengths(self) -> list[int]:
        """All lengths that were run, in ascending order."""
        return sorted({cell.length for cell in self.cells})

    @property
    def depths(self) -> list[float]:
        """All depths that were run, in ascending order."""
        return sorted({cell.depth for cell in self.cells})

    @property
    def accuracy(self) -> float:
        """The mean over all cells."""
        return sum(cell.accuracy for cell in self.cells) / len(self.cells)

    def lengths_beyond_context(self, context: int | None) -> list[int]:
        """The lengths whose prompts have more tokens than a context; none without a context."""
        return sorted({cell.length for cell in self.cells if context is not None and cell.tokens > context})

    def panel(self, title: str, context: int | None = None) -> Panel:
        """The cells as a panel of a heat map."""
        accuracies = {(cell.length, cell.depth): cell.accuracy for cell in self.cells}
        return Panel(title, accuracies, context, next(iter(self.lengths_beyond_context(context)), None))

    def add(self, cell: Cell) -> None:
        """Insert a cell."""
        self.cells.append(cell)
        self.cells.sort(key=lambda each: (each.length, each.depth))


class PasskeyResultsFile(ResultsFile[Cell]):
    """Passkey results of a model with memory ("memory") and of the plain model ("baseline") on the same prompts."""

    evaluation = "passkey"
    score_class = Cell
    scores_key = "cells"

    @property
    def results(self) -> dict[str, PasskeyResult]:
        """The cells of each model; cells added to them are in the file's scores."""
        return {name: PasskeyResult(scores) for name, scores in self.scores.items()}

    def _encode(self, score: Cell, metadata: Mapping[str, Any]) -> dict[str, Any]:
        context = metadata.get("context_length")
        return {
            **{name: getattr(score, name) for name in ("length", "depth", "accuracy", "digits", "tokens", "seconds")},
            "beyond_context": context is not None and score.tokens > context,
            "trials": [asdict(trial) for trial in score.trials],
        }

    def _decode(self, entry: Mapping[str, Any]) -> Cell:
        return Cell(entry["length"], entry["depth"], tuple(Trial(**trial) for trial in entry["trials"]))


def evaluate(
    name: str,
    lengths: Sequence[int],
    depths: Sequence[float],
    output: Path,
    *,
    trials: int = 3,
    seed: int = 0,
    needle: Needle | None = None,
    haystack: Sequence[Path] | None = None,
    independent_documents: bool = False,
    evidence_ratio: float = 0.0,
    last_context_length: int | None = None,
    baseline: bool = False,
    model_kwargs: Mapping[str, Any] | None = None,
) -> PasskeyResultsFile:
    """Run the task for a model, and write `passkey.json` and `passkey.png`; existing results are resumed.

    The other arguments are those of `run_passkey`. Raises a LlamoryError if a depth or a length is impossible, options
    contradict each other, or the output has other results.

    Args:
        haystack: files and folders with the text around the needle; None for the published text.
        independent_documents, evidence_ratio: encode each window by itself, see `IndependentDocumentPrompts`.
        last_context_length: tokens of the prompt's end that are never put into memory.
        baseline: also ask the plain model, without memory, even beyond its context.
    """
    from llamory.models.base import load_model, load_tokenizer
    from llamory.qa.evidence import check_evidence_ratio

    if independent_documents and baseline:
        raise LlamoryError("The plain model has no memory to attach windows to; leave out --baseline.")
    if independent_documents and last_context_length is not None:
        raise LlamoryError(
            "With --independent-documents only the question isn't in memory; leave out --last-context-length."
        )
    check_evidence_ratio(evidence_ratio)
    if evidence_ratio and not independent_documents:
        raise LlamoryError("--evidence-ratio needs windows that are read by themselves; add --independent-documents.")
    for depth in depths:
        check_depth(depth)
    needle = needle or Needle()
    text = read_haystack(haystack, max(lengths)) if haystack else PUBLISHED_HAYSTACK
    tokenizer = load_tokenizer(name)
    # Fail on too short a prompt before the model is loaded.
    build_prompt(tokenizer, min(lengths), depths[0], longest_secret(needle.kind), needle=needle, haystack=text)
    settings = {"model": name, "needle": needle.text, "question": needle.question_text, "trials": trials, "seed": seed}
    settings |= {"key": needle.kind} if needle.kind != "number" else {}
    settings |= {"windows": "independent"} if independent_documents else {}
    settings |= {"evidence_ratio": evidence_ratio} if evidence_ratio else {}
    settings["haystack"] = file_identity(haystack) if haystack else "published"
    results = PasskeyResultsFile(output / "passkey.json", settings)

    from llamory.longllama.loading import load_long_model  # after the checks: it takes a second

    common: dict[str, Any] = {"trials": trials, "seed": seed, "needle": needle, "haystack": text}

    def run(kind: str, model: PreTrainedModel, metadata: dict[str, Any], **arguments: Any) -> None:
        results.run(kind, metadata)
        arguments |= {"result": results.results[kind], "on_cell": lambda _: results.write(), "title": TITLES[kind]}
        run_passkey(model, tokenizer, lengths, depths, **common, **arguments)

    model = load_long_model(name, **(model_kwargs or {}))
    device, dtype = model.device, model.dtype
    prompts = None
    if independent_documents:
        options: dict[str, Any] = {"needle": needle, "haystack": text, "evidence_ratio": evidence_ratio}
        prompts = IndependentDocumentPrompts(model, tokenizer, **options)
    generate = {} if last_context_length is None else {"last_context_length": last_context_length}
    run("memory", model, model_metadata(model) | generate, prompts=prompts, generate=generate)
    if baseline:
        del model, prompts  # both models at once may not fit
        plain = load_model(name, dtype=dtype).to(device)
        context = plain.config.max_position_embeddings
        run("baseline", plain, {"context_length": context, "dtype": str(dtype).removeprefix("torch.")})
    results.write()
    panels = [
        result.panel(TITLES.get(kind, kind), results.metadata[kind].get("context_length"))
        for kind, result in results.results.items()
    ]
    draw_heat_map(output / "passkey.png", f"Passkeys found by {display_names([name])[name]}", panels)
    return results


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
    """Ask a model for passkeys at some depths, 0 to 1, of prompts of some lengths in tokens, the shortest first.

    A key depends only on the seed, the length, the depth and the trial's number. Raises a LlamoryError if a depth or a
    length is impossible (see `build_prompt`), or there is nothing to run.

    Args:
        model: anything with `generate` and `device`; it decodes greedily, without a chat template.
        prompts: makes the prompts with this needle, instead of `build_prompt`.
        result, on_cell, title: as `scores`, `on_score` and `title` of `run_perplexity`.
        generate: further arguments for `model.generate`.
    """
    if trials < 1 or not lengths or not depths:
        raise LlamoryError("There is nothing to run: give at least one length, one depth and one trial.")
    for depth in depths:
        check_depth(depth)
    result = PasskeyResult() if result is None else result
    needle = needle or Needle()
    pending = [(length, depth) for length in sorted(set(lengths)) for depth in sorted(set(depths))]
    pending = [(length, depth) for length, depth in pending if result.cell(length, depth) is None]

    def run(item: tuple[int, float], bar: ProgressBar) -> tuple[Cell, str]:
        (length, depth), done = item, []
        for trial in range(trials):
            key = draw_secret(needle.kind, random.Random(f"{seed}/{length}/{depth}/{trial}"))
            options: Mapping[str, Any] = {}
            if prompts is None:
                prompt = build_prompt(tokenizer, length, depth, key, needle=needle, haystack=haystack)
            else:
                prompt, options = prompts(length, depth, key)
            done.append(_run_trial(model, tokenizer, prompt, needle.kind, {**(generate or {}), **options}))
            bar.advance(length)
        cell = Cell(length, depth, tuple(done))
        line = f"{length:,} tokens, depth {depth:.0%}: found {cell.accuracy:.0%} ({cell.seconds:.1f} s a prompt)"
        return cell, line

    total = trials * sum(length for length, _ in pending)
    run_pending(pending, run, tokens=total, add=result.add, on_score=on_cell, title=title)
    return result


def _run_trial(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, kind: str, options: Mapping[str, Any]
) -> Trial:
    ids = torch.tensor([prompt.input_ids], device=model.device)
    key_tokens = len(tokenizer(f" {prompt.key}", add_special_tokens=False)["input_ids"])
    extra_tokens = _EXTRA_TOKENS_OF_SENTENCE if prompt.text.endswith((".", "?", "!", ":")) else _EXTRA_TOKENS
    options = {"max_new_tokens": key_tokens + extra_tokens, "do_sample": False, **options}
    started = time.perf_counter()
    output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    new = output[0, ids.shape[1] :].tolist()
    seconds, tokens = time.perf_counter() - started, len(prompt.input_ids) + prompt.in_memory
    answer = tokenizer.decode(new, skip_special_tokens=True)
    return Trial(prompt.key, answer, *score_answer(answer, prompt.key, kind), tokens, seconds)

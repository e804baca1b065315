"""The dictionary look-up task (Tworkowski et al. 2023, section 4.1): accuracy as memory fills with other documents.

A document is a made-up dictionary: its first half defines keys, the second asks for their values. A model whose local
context is half a document must find the definitions in memory, among those of all other documents.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.evaluation.plots import draw_curves
from llamory.evaluation.results import CurveResultsFile, run_models
from llamory.longllama import LongLlamaCache, LongLlamaConfig, LongLlamaForCausalLM
from llamory.longllama.losses import IGNORE_INDEX
from llamory.memory import MemoryBank

EOS, BOS, DEFINE, VALUE, ASK, ANSWER = range(6)
FIRST_SYMBOL = 6
CONFIG_KEY = "lookup"
ENCODE_BATCH_SIZE, QUERY_BATCH_SIZE = 64, 8  # documents of a forward pass


@dataclass(frozen=True)
class Dictionaries:
    """Keys and values of some documents, as symbols."""

    keys: Tensor  # (documents, lines, key_length)
    values: Tensor  # (documents, lines, value_length)

    def __getitem__(self, rows: slice) -> Dictionaries:
        """The documents of a slice."""
        return Dictionaries(self.keys[rows], self.values[rows])


@dataclass(frozen=True)
class LookupTask:
    """The shape of the documents; the defaults are the paper's.

    Half a document is BOS, as many lines as fit, and EOS as padding. A line is a marker, a key, a marker and a value.
    """

    vocabulary: int = 64  # number of symbols and the six markers
    key_length: int = 4
    value_length: int = 4
    half: int = 256  # tokens of half a document, which is one row and the local context

    def __post_init__(self) -> None:
        if self.vocabulary < FIRST_SYMBOL + 2 or min(self.key_length, self.value_length) < 1 or self.lines < 1:
            raise LlamoryError(
                f"A dictionary needs a vocabulary of at least {FIRST_SYMBOL + 2} tokens, keys and values of at least "
                f"one, and rows of at least {self.line + 1}."
            )

    @property
    def line(self) -> int:
        """Tokens of a line."""
        return self.key_length + self.value_length + 2

    @property
    def lines(self) -> int:
        """Lines of half a document."""
        return (self.half - 1) // self.line

    @property
    def all_keys(self) -> int:
        """Number of possible keys."""
        return (self.vocabulary - FIRST_SYMBOL) ** self.key_length

    def with_lines(self, lines: int) -> LookupTask:
        """The same task with this number of lines per half."""
        return replace(self, half=1 + lines * self.line)

    @cached_property
    def value_positions(self) -> Tensor:
        """Positions of the values' tokens in a row, (lines * value_length,)."""
        first = 1 + torch.arange(self.lines)[:, None] * self.line + self.key_length + 2
        return (first + torch.arange(self.value_length)).flatten()

    def draw(self, documents: int, generator: torch.Generator) -> Dictionaries:
        """Draw random keys and values; two documents may define the same key."""
        keys = self._draw_symbols(documents, self.key_length, generator)
        return Dictionaries(keys, self._draw_symbols(documents, self.value_length, generator))

    def _draw_symbols(self, documents: int, length: int, generator: torch.Generator) -> Tensor:
        return torch.randint(FIRST_SYMBOL, self.vocabulary, (documents, self.lines, length), generator=generator)

    def draw_confusable(self, documents: int, generator: torch.Generator) -> Dictionaries:
        """Draw keys, each once, from so few symbols that they are half of all possible keys, with near neighbours."""
        count, symbols = documents * self.lines, 1
        while symbols**self.key_length < 2 * count:
            symbols += 1
        symbols = min(symbols, self.vocabulary - FIRST_SYMBOL)
        if symbols**self.key_length < count:
            raise LlamoryError(f"{count:,} different keys can't be made; take longer keys or fewer documents.")
        used = torch.randperm(self.vocabulary - FIRST_SYMBOL, generator=generator)[:symbols] + FIRST_SYMBOL
        indices = torch.randperm(symbols**self.key_length, generator=generator)[:count]
        return Dictionaries(self._keys_from_indices(indices, used), self.draw(documents, generator).values)

    def draw_distinct(self, documents: int, generator: torch.Generator) -> Dictionaries:
        """Draw random keys, each once, and values; with one seed, more documents begin with the same as fewer."""
        count = documents * self.lines
        if count > self.all_keys // 2:
            raise LlamoryError(f"{documents} documents need {count:,} different keys; take longer keys or less memory.")
        value_generator = torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=generator)))
        samples = torch.randint(self.all_keys, (2 * count + 64,), generator=generator)
        unique, inverse = samples.unique(return_inverse=True)  # the first occurrence of each is kept, in order
        first = torch.full((len(unique),), len(samples))
        first = first.scatter_reduce_(0, inverse, torch.arange(len(samples)), "amin")
        indices = samples[first.sort().values[:count]]
        keys = self._keys_from_indices(indices, torch.arange(FIRST_SYMBOL, self.vocabulary))
        return Dictionaries(keys, self._draw_symbols(documents, self.value_length, value_generator))

    def _keys_from_indices(self, indices: Tensor, symbols: Tensor) -> Tensor:
        """Keys (documents, lines, key_length) whose symbols are the digits of the indices."""
        digit_weights = len(symbols) ** torch.arange(self.key_length)
        return symbols[indices[:, None] // digit_weights % len(symbols)].view(-1, self.lines, self.key_length)

    def definitions(self, dictionaries: Dictionaries) -> Tensor:
        """Token ids of the first halves, (documents, half)."""
        return self._half(dictionaries.keys, dictionaries.values, DEFINE, VALUE)

    def questions(self, dictionaries: Dictionaries, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The second halves, every line in random order: token ids and targets (or -100), both (documents, half)."""
        order = torch.rand(dictionaries.keys.shape[:2], generator=generator).argsort(1)[..., None]
        keys, values = (
            each.gather(1, order.expand(-1, -1, each.shape[2])) for each in (dictionaries.keys, dictionaries.values)
        )
        rows = self._half(keys, values, ASK, ANSWER)
        targets = torch.full_like(rows, IGNORE_INDEX)
        targets[:, self.value_positions - 1] = rows[:, self.value_positions]
        return rows, targets

    def _half(self, keys: Tensor, values: Tensor, before_key: int, before_value: int) -> Tensor:
        ones = torch.ones_like(keys[..., :1])
        lines = torch.cat([ones * before_key, keys, ones * before_value, values], -1).flatten(1)
        rows = torch.full((len(keys), self.half), EOS)
        rows[:, 0] = BOS
        rows[:, 1 : 1 + lines.shape[1]] = lines
        return rows


def save_task(config: LongLlamaConfig, task: LookupTask) -> None:
    """Store the task in a model's configuration."""
    setattr(config, CONFIG_KEY, asdict(task))


def load_task(config: LongLlamaConfig) -> LookupTask:
    """The task that a model was trained for, from its configuration."""
    saved = getattr(config, CONFIG_KEY, None)
    if not isinstance(saved, dict):
        raise LlamoryError("This model wasn't trained for dictionary look-up; train one with `llamory train lookup`.")
    return LookupTask(**saved)


@dataclass(frozen=True)
class LookupCell:
    """The result with `tokens` tokens in memory."""

    tokens: int
    accuracy: float  # fraction of the values' tokens that are the model's first choice, with teacher forcing
    value_accuracy: float  # fraction of the values whose tokens are all correct
    num_values: int
    encode_seconds: float  # since the size before
    query_seconds: float  # with the construction of an index
    peak_bytes: int  # of the process so far


@torch.no_grad()
def run_lookup(
    model: LongLlamaForCausalLM,
    lengths: Sequence[int],
    *,
    task: LookupTask,
    documents: int = 16,
    seed: int = 0,
    on_cell: Callable[[LookupCell], None] | None = None,
    on_read: Callable[[int], None] | None = None,
) -> list[LookupCell]:
    """Ask about the same documents at several memory sizes; no key is defined twice.

    Raises a LlamoryError if the model has no memory layers, or a size holds fewer documents than are asked about.

    Args:
        lengths: tokens in memory, rounded down to whole documents, each encoded by itself as in training.
        documents: number of documents asked about; memory holds them at every size.
        on_cell, on_read: called with the result of each size, and with the tokens of each encoded batch.
    """
    if not model.config.mem_layers:
        raise LlamoryError("This model has no memory layers, so it can't look anything up.")
    counts = sorted({length // task.half for length in lengths})
    if not counts or counts[0] < documents:
        raise LlamoryError(
            f"Memory holds fewer than the {documents} documents asked about; give at least "
            f"{documents * task.half:,} tokens."
        )
    dictionaries = task.draw_distinct(counts[-1], torch.Generator().manual_seed(seed))
    questions, targets = task.questions(dictionaries[:documents], torch.Generator().manual_seed(seed))
    bank, cells = model.new_memory(), []
    for before, count in pairwise([0, *counts]):
        start = time.perf_counter()
        for first in range(before, count, ENCODE_BATCH_SIZE):
            rows = task.definitions(dictionaries[first : min(first + ENCODE_BATCH_SIZE, count)])
            cache, rows = LongLlamaCache(model.config), rows.to(model.device)
            options: dict[str, Any] = {"use_cache": False, "last_context_length": task.half, "logits_to_keep": None}
            model.model(rows, past_key_values=cache, **options)
            for layer in bank.layers:
                for row in cache.memory:
                    bank.append(layer, row.keys(layer), row.values(layer), segment="dictionaries")
            if on_read is not None:
                on_read(rows.numel())
        encoded = time.perf_counter()
        correct = _answers(model, questions, targets, bank)
        values = correct.view(-1, task.value_length)
        accuracies = correct.float().mean().item(), values.all(1).float().mean().item()
        seconds = encoded - start, time.perf_counter() - encoded
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        cell = LookupCell(count * task.half, *accuracies, len(values), *seconds, peak)
        cells.append(cell)
        if on_cell is not None:
            on_cell(cell)
    return cells


def _answers(model: LongLlamaForCausalLM, questions: Tensor, targets: Tensor, bank: MemoryBank) -> Tensor:
    """Whether each token of the values is the first choice, in the order of the questions."""
    correct = []
    for ids, target_ids in zip(questions.split(QUERY_BATCH_SIZE), targets.split(QUERY_BATCH_SIZE), strict=True):
        cache, rows = model.memory_cache(bank), ids.to(model.device)
        predictions = model(rows, past_key_values=cache, last_context_length=ids.shape[1]).logits.argmax(-1).cpu()
        correct.append((predictions == target_ids)[target_ids != IGNORE_INDEX])
    return torch.cat(correct)


class LookupResultsFile(CurveResultsFile[LookupCell]):
    """Look-up results of one or more models on the same documents."""

    evaluation = "lookup"
    score_class = LookupCell
    make_curve = list


def evaluate(
    names: Sequence[str],
    lengths: Sequence[int],
    output: Path,
    *,
    documents: int = 16,
    seed: int = 0,
    model_kwargs: Mapping[str, Any] | None = None,
) -> LookupResultsFile:
    """Run the task for some models, and write `lookup.json` and `lookup.png`; existing results are resumed.

    As in the paper, a query attends to its best neighbours per head and to nothing else. The arguments are those of
    `run_lookup`, with `model_kwargs` for `load_long_model`. Raises a LlamoryError if a model wasn't trained for the
    task, or the output has other results.
    """
    results = LookupResultsFile(output / "lookup.json", {"documents": documents, "seed": seed})

    def run(_: str, model: LongLlamaForCausalLM, cells: list[LookupCell], title: str) -> None:
        task = load_task(model.config)
        done = {cell.tokens for cell in cells}
        remaining = [length for length in lengths if length // task.half * task.half not in done]
        if not remaining:
            return
        # Memory grows from size to size, so the largest is all that is encoded.
        with ProgressBar(title, max(remaining), unit="tokens") as bar:

            def add_cell(cell: LookupCell) -> None:
                cells.append(cell)
                cells.sort(key=lambda each: each.tokens)
                results.write()
                bar.print(
                    f"{title}: {cell.tokens:,} tokens: {cell.accuracy:.1%} of tokens, {cell.value_accuracy:.1%} of "
                    f"values correct ({cell.query_seconds:.0f} s, {cell.peak_bytes / 2**30:.1f} GiB)"
                )

            options: dict[str, Any] = {"documents": documents, "seed": seed, "on_cell": add_cell}
            run_lookup(model, remaining, task=task, on_read=bar.advance, **options)

    run_models(results, names, run, {**(model_kwargs or {}), "mem_top_k_attention": True})
    lines = results.lines("tokens", "accuracy")
    labels: dict[str, Any] = {"x_label": "Tokens in memory", "y_label": "Accuracy of the values' tokens"}
    draw_curves(output / "lookup.png", "Dictionary look-up", lines, **labels, percent=True)
    return results

"""Batches of instruction examples whose first part is in memory: whole examples, or questions on frozen contexts."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from llamory.errors import LlamoryError
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.corpus import check_same_settings
from llamory.training.fot.contexts import check_negative_weight, log_interpolate


@dataclass(frozen=True)
class MemorySplit:
    """How much of an example is in memory.

    The published code pads an example to `total_length` columns, of which the last `last_context_length` are local and
    those before them in memory; where the padding stands decides what is where. Here no padding is read, only the cut
    is kept.

    Attributes:
        row_length: the most tokens of a row, that is of a window that goes into memory; the model's context.
        last_context_length: the most tokens of the last row.
        total_length: the most tokens of an example.
        mode: "random", the number of padding columns in front is drawn anew each time (published `random_pad`);
            "memory", none are in front, so that as much as possible is in memory (`always_pad` without it); "last",
            the last `last_context_length` tokens are local, as when the model reads a prompt (neither).

    Raises:
        LlamoryError: lengths that aren't positive, or a last row that is longer than a row.
    """

    row_length: int
    last_context_length: int
    total_length: int
    mode: Literal["random", "memory", "last"] = "random"

    def __post_init__(self) -> None:
        for name in ("row_length", "last_context_length", "total_length"):
            if getattr(self, name) < 1:
                raise LlamoryError(f"{name} must be at least 1, not {getattr(self, name)}.")
        if self.last_context_length > self.row_length:
            raise LlamoryError(
                f"The last row of an example can't have {self.last_context_length} tokens where a row has "
                f"{self.row_length}; choose a last_context_length of at most row_length."
            )

    @property
    def max_rows(self) -> int:
        """Rows that one example takes at most."""
        return -(-max(0, self.total_length - self.last_context_length) // self.row_length) + 1

    def num_memory_tokens(self, length: int, rng: random.Random) -> int:
        """How many of an example's first tokens go into memory."""
        columns = self.total_length if self.mode != "last" else length
        padding = rng.randint(0, columns - length) if self.mode == "random" else 0
        return min(max(columns - self.last_context_length - padding, 0), length)

    def split_rows(self, length: int, rng: random.Random) -> list[tuple[int, int]]:
        """Where the rows of an example begin and end; each row sees the rows before it as memory."""
        memory = self.num_memory_tokens(length, rng)
        rows = [(start, min(start + self.row_length, memory)) for start in range(0, memory, self.row_length)]
        return rows + [(memory, length)] * (memory < length)


@dataclass(frozen=True)
class SplitExample:
    """An example and where its rows begin and end."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    rows: Sequence[tuple[int, int]]
    source: str = ""


def collate(
    examples: Sequence[SplitExample],
    pad_token_id: int | None,
    *,
    negatives: int = 0,
    negative_weight: tuple[float, float] = (1, 1),
    rng: random.Random | None = None,
) -> dict[str, Any]:
    """Make one batch of whole examples, padded on the right.

    Args:
        examples: the examples.
        pad_token_id: fills up rows.
        negatives: rows of other examples that a row with answers sees as well, where there are so many. Only rows in
            front of all answers of their example are taken: they see nothing but such rows, so none is told its own
            answers in a circle.
        negative_weight: how many of its kind a negative counts as in the softmax, the least and the most; each row draws one
            number, evenly on a logarithmic scale, so that a few rows stand for memories of all sizes.
        rng: draws negatives and negative_weight; without, the first ones are taken, and the least.

    Returns:
        `input_ids`, `attention_mask`, `shift_labels`: (rows, longest row) long; `shift_labels` is the label of the
        example's next token, be it the first of its next row, and -100 where none is asked for; `contexts`: per row,
        the earlier rows of its example, nearest first, then negatives; `context_weights`, with negative_weight: what each of
        these counts as; `sources`: per example, where it is from.
    """
    tokens: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    contexts: list[list[int]] = []
    example_indices: list[int] = []
    for number, example in enumerate(examples):
        ids = torch.as_tensor(example.input_ids, dtype=torch.long)
        next_labels = torch.as_tensor([*example.labels[1:], IGNORE_INDEX], dtype=torch.long)
        first = len(tokens)
        for start, stop in example.rows:
            contexts.append(list(range(len(tokens) - 1, first - 1, -1)))
            example_indices.append(number)
            tokens.append(ids[start:stop])
            targets.append(next_labels[start:stop])
    more: dict[str, Any] = {}
    if negatives:
        weights = _add_negatives(contexts, example_indices, targets, negatives, negative_weight, rng)
        more = {"context_weights": weights} if negative_weight != (1, 1) else {}
    return {
        "input_ids": pad_sequence(tokens, batch_first=True, padding_value=pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in tokens], batch_first=True),
        "shift_labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
        "contexts": contexts,
        **more,
        "sources": [example.source for example in examples],
    }


def _add_negatives(
    contexts: list[list[int]],
    example_indices: Sequence[int],
    targets: Sequence[torch.Tensor],
    negatives: int,
    negative_weight: tuple[float, float],
    rng: random.Random | None,
) -> list[list[float]]:
    """Add negatives to the contexts; gives the weight of each context."""
    weights = [[1.0] * len(seen) for seen in contexts]
    answers = [bool((target != IGNORE_INDEX).any()) for target in targets]
    in_front = [
        not answered and not any(answers[seen] for seen in contexts[row]) for row, answered in enumerate(answers)
    ]
    for row, answered in enumerate(answers):
        if answered:
            others = [at for at, plain in enumerate(in_front) if plain and example_indices[at] != example_indices[row]]
            count = min(negatives, len(others))
            contexts[row] += sorted(rng.sample(others, count)) if rng is not None else others[:count]
            draw = rng.random() if rng is not None else 0.0
            weights[row] += [log_interpolate(negative_weight, draw)] * count
    return weights


class InstructBatches:
    """Endless batches of whole examples, of at most `rows` rows each, drawn from datasets in given proportions.

    Which dataset an example comes from and how it is cut is drawn by a generator that is seeded with the example's
    number, and each dataset is gone through in a new order each epoch; so the position is no more than a count.

    Args:
        datasets: as `load_instructions` gives them, or any sequences of such examples.
        proportions: the share of each in the examples.
        split: how examples are cut.
        rows: the most rows of a batch.
        pad_token_id: fills up rows.
        seed: of all that is drawn.
        stream: which of `streams` disjoint parts of the data this is.
        streams: how many there are.
        negatives: rows of other examples' first parts that rows with answers see as well.
        negative_weight: how many of its kind each of these counts as, the least and the most; see `collate`.

    Raises:
        LlamoryError: an example may take more rows than a batch has, the number of negatives is below 0, or negative_weight
            aren't two numbers above 0, the smaller one first.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        proportions: Sequence[float],
        split: MemorySplit,
        *,
        rows: int,
        pad_token_id: int | None = None,
        seed: int = 0,
        stream: int = 0,
        streams: int = 1,
        negatives: int = 0,
        negative_weight: tuple[float, float] = (1, 1),
    ) -> None:
        check_rows(split, rows)
        if negatives < 0:
            raise LlamoryError(f"negatives must be at least 0, not {negatives}.")
        check_negative_weight(negative_weight)
        self.negatives, self.negative_weight = negatives, negative_weight
        self.negative_weight_progress = (
            1.0  # how far, on a logarithmic scale, the most negative_weight have grown from the least
        )
        self.datasets, self.proportions, self.split, self.rows = datasets, list(proportions), split, rows
        self.pad_token_id, self.seed, self.stream, self.streams = pad_token_id, seed, stream, streams
        self._num_drawn = [0] * len(datasets)
        self._order = lru_cache(len(datasets))(self._shuffled)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        """The next batch; see `collate`."""
        examples: list[SplitExample] = []
        room = self.rows
        while True:
            source, example = self._next_example()
            room -= len(example.rows)
            if room < 0:
                rng = random.Random(f"{self.seed}/{self.stream}/{sum(self._num_drawn)}/negatives")
                negative_weight = (
                    self.negative_weight[0],
                    log_interpolate(self.negative_weight, self.negative_weight_progress),
                )
                return collate(
                    examples, self.pad_token_id, negatives=self.negatives, negative_weight=negative_weight, rng=rng
                )
            examples.append(example)
            self._num_drawn[source] += 1

    def state_dict(self) -> dict[str, Any]:
        """The position: examples drawn of each dataset, and what they were drawn from."""
        return {"drawn": list(self._num_drawn), "data": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a position.

        Raises:
            LlamoryError: it is a position in other data, or in the same with other settings.
        """
        check_same_settings(state["data"], self._identity())
        self._num_drawn = list(state["drawn"])

    def _identity(self) -> dict[str, Any]:
        return {
            "examples": [len(dataset) for dataset in self.datasets],
            "proportions": self.proportions,
            "split": asdict(self.split),
            "rows": self.rows,
            "seed": self.seed,
            "stream": [self.stream, self.streams],
            "negatives": self.negatives,
            **({"negative_weight": list(self.negative_weight)} if self.negative_weight != (1, 1) else {}),
        }

    def _next_example(self) -> tuple[int, SplitExample]:
        """The next example and the dataset it comes from; drawing it again gives the same."""
        rng = random.Random(f"{self.seed}/{self.stream}/{sum(self._num_drawn)}")
        source = rng.choices(range(len(self.datasets)), self.proportions)[0]
        dataset = self.datasets[source]
        epoch, index = divmod(self._num_drawn[source] * self.streams + self.stream, len(dataset))
        example = dataset[int(self._order(source, epoch)[index])]
        rows = self.split.split_rows(len(example["input_ids"]), rng)
        return source, SplitExample(example["input_ids"], example["labels"], rows, example.get("source", ""))

    def _shuffled(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, source, epoch]).permutation(len(self.datasets[source]))


def check_rows(split: MemorySplit, rows: int) -> None:
    """Raise LlamoryError unless a batch has room for the longest example."""
    if rows < split.max_rows:
        raise LlamoryError(
            f"An example may take {split.max_rows} rows, but a batch has {rows}; choose a batch_size of at least "
            f"{split.max_rows} or a smaller total_length."
        )


@dataclass(frozen=True)
class Query:
    """A row that predicts something.

    Attributes:
        ids: its tokens.
        targets: what each of them should predict, -100 where nothing is queries for.
        num_visible_rows: how many of its document's rows, the first ones, are in its memory.
    """

    ids: Sequence[int]
    targets: Sequence[int]
    num_visible_rows: int


@dataclass(frozen=True)
class Context:
    """A document's rows, each read by itself, and what is queries with them in memory."""

    rows: Sequence[Sequence[int]]
    queries: Sequence[Query]
    source: str = ""


def build_context(examples: Sequence[Mapping[str, Any]], split: MemorySplit, rng: random.Random) -> Context:
    """Make rows of a document's examples.

    Where examples ask about a document, it is in memory, in rows as `read` makes them, and each chat or question is a
    row of its own. Any other example is cut by `split`; each of its rows that has answers is queries with those before
    it in memory.

    Args:
        examples: all of one document, or a single one.
        split: how others are cut; `row_length` and the length of the last row hold for all.
        rng: draws the cut.
    """
    first = examples[0]
    document, source = first["document"], first.get("source", "")
    if document:
        ids, step = first["input_ids"][:document], split.row_length
        rows = [ids[start : start + step] for start in range(0, document, step)]
        queries = [
            Query(
                each["input_ids"][document:][: split.last_context_length],
                [*each["labels"][document + 1 :], IGNORE_INDEX][: split.last_context_length],
                len(rows),
            )
            for each in examples
        ]
        return Context(rows, [each for each in queries if _has_targets(each.targets)], source)
    next_labels = [*first["labels"][1:], IGNORE_INDEX]
    cut = split.split_rows(len(first["input_ids"]), rng)
    queries = [
        Query(first["input_ids"][start:stop], next_labels[start:stop], number)
        for number, (start, stop) in enumerate(cut)
        if _has_targets(next_labels[start:stop])
    ]
    rows = [first["input_ids"][start:stop] for start, stop in cut]
    return Context(rows[: max((each.num_visible_rows for each in queries), default=0)], queries, source)


def _has_targets(targets: Sequence[int]) -> bool:
    return any(target != IGNORE_INDEX for target in targets)


def collate_frozen_contexts(
    documents: Sequence[Context],
    pad_token_id: int | None,
    *,
    query_token_budget: int,
    negatives: int = 0,
    negative_weight: tuple[float, float] = (1, 1),
    rng: random.Random,
) -> dict[str, Any]:
    """Make one batch, padded on the right.

    Args:
        documents: their rows and what is queries.
        pad_token_id: fills up rows.
        query_token_budget: tokens, with padding, of the rows that are queries; which ones is drawn. One is queries at least.
        negatives: rows of other documents that are in memory as well, where there are so many.
        negative_weight: how many of its kind each of these counts as in the softmax, the least and the most; each document draws
            one number, evenly on a logarithmic scale.
        rng: draws all that is drawn.

    Returns:
        `context_ids`: (rows, longest) what is in memory; `context_lengths`: real tokens of each. `input_ids`,
        `attention_mask`, `shift_labels`: (queries rows, longest); `contexts`: per queries row, what it num_visible_rows of the first;
        `context_weights`, with negative_weight: what each of these counts as; `sources`: per document, where it is from.
    """
    rows = [torch.as_tensor(row, dtype=torch.long) for each in documents for row in each.rows]
    document_indices = [number for number, each in enumerate(documents) for _ in each.rows]
    chosen = _sample_queries(documents, query_token_budget, rng)
    queries: list[Query] = []
    contexts: list[list[int]] = []
    weights: list[list[float]] = []
    for number, document in enumerate(documents):
        first = document_indices.index(number) if document.rows else 0
        others = [at for at, document_index in enumerate(document_indices) if document_index != number]
        seen = sorted(rng.sample(others, min(negatives, len(others))))
        weight = log_interpolate(negative_weight, rng.random())
        for index, each in enumerate(document.queries):
            if (number, index) in chosen:
                queries.append(each)
                contexts.append([*range(first, first + each.num_visible_rows), *seen])
                weights.append([1.0] * each.num_visible_rows + [weight] * len(seen))
    ids = [torch.as_tensor(each.ids, dtype=torch.long) for each in queries]
    targets = [torch.as_tensor(each.targets, dtype=torch.long) for each in queries]
    return {
        "context_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id or 0),
        "context_lengths": list(map(len, rows)),
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "shift_labels": pad_sequence(targets, batch_first=True, padding_value=IGNORE_INDEX),
        "contexts": contexts,
        **({"context_weights": weights} if negative_weight != (1, 1) else {}),
        "sources": [each.source for each in documents],
    }


def _sample_queries(documents: Sequence[Context], token_budget: int, rng: random.Random) -> set[tuple[int, int]]:
    """Document and index of the rows that are queries."""
    all_rows = [(number, index) for number, each in enumerate(documents) for index in range(len(each.queries))]
    rng.shuffle(all_rows)
    chosen: set[tuple[int, int]] = set()
    longest = 0
    for number, index in all_rows:
        longest = max(longest, len(documents[number].queries[index].ids))
        if chosen and (len(chosen) + 1) * longest > token_budget:
            break
        chosen.add((number, index))
    return chosen


class DocumentExamples(Sequence[list[dict[str, Any]]]):
    """The examples of a dataset, those that ask about one document together."""

    def __init__(self, examples: Any) -> None:
        self.examples, self._starts = examples, [0]
        keys = zip(examples["document"], examples["source"], strict=True)
        for about, group in groupby(keys, lambda key: key[1] if key[0] else ""):
            first, count = self._starts[-1], len(list(group))
            # Examples of no document stand alone.
            self._starts += [first + count] if about else range(first + 1, first + count + 1)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: Any) -> Any:
        start, stop = self._starts[number], self._starts[number + 1]
        return [self.examples[at] for at in range(start, stop)]


class FrozenContextBatches(InstructBatches):
    """Endless batches as of `collate_frozen_contexts`, each of one dataset's documents, of at most `rows` rows in memory.

    Args:
        datasets, proportions, split, rows, negatives, negative_weight: as for `InstructBatches`, but that a dataset's proportion
            is its share in the batches.
        query_token_budget: tokens of the rows that are queries, with padding.
        more: as there.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        proportions: Sequence[float],
        split: MemorySplit,
        *,
        query_token_budget: int,
        **more: Any,
    ) -> None:
        if query_token_budget < 1:
            raise LlamoryError(f"The rows that are queries need at least 1 token, not {query_token_budget}.")
        super().__init__([DocumentExamples(each) for each in datasets], proportions, split, **more)
        self.query_token_budget = query_token_budget

    def __next__(self) -> dict[str, Any]:
        """The next batch; see `collate_frozen_contexts`."""
        rng = random.Random(f"{self.seed}/{self.stream}/{sum(self._num_drawn)}/batch")
        source = rng.choices(range(len(self.datasets)), self.proportions)[0]
        documents: list[Context] = []
        remaining_rows = self.rows
        while True:
            document = build_context(self._draw(source), self.split, rng)
            remaining_rows -= len(document.rows)
            if documents and remaining_rows < 0:
                break
            documents.append(document)
            self._num_drawn[source] += 1
        negative_weight = self.negative_weight[0], log_interpolate(self.negative_weight, self.negative_weight_progress)
        settings: dict[str, Any] = {
            "query_token_budget": self.query_token_budget,
            "negatives": self.negatives,
            "negative_weight": negative_weight,
        }
        return collate_frozen_contexts(documents, self.pad_token_id, **settings, rng=rng)

    def _draw(self, source: int) -> list[dict[str, Any]]:
        dataset = self.datasets[source]
        epoch, index = divmod(self._num_drawn[source] * self.streams + self.stream, len(dataset))
        examples: list[dict[str, Any]] = dataset[int(self._order(source, epoch)[index])]
        return examples

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"query_token_budget": self.query_token_budget}


BATCH_ROWS = 16  # rows that are read together


class HiddenStateCache:
    """Reads rows, and keeps what it read.

    Args:
        rows: how many are kept, those that were wanted last; each takes width * hidden * memory layers * the type's
            bytes.
    """

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, model: Any, input_ids: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
        """Per memory layer (rows, width, hidden), as `layer_inputs` gives them.

        Args:
            model: a LongLlamaModel, whose weights must not change but for memory's projections.
            input_ids: (rows, width), padded on the right.
            lengths: real tokens of each row; what is behind them means nothing.
        """
        layers = sorted(model.config.mem_layers)
        names = [row[:length].cpu().numpy().tobytes() for row, length in zip(input_ids, lengths, strict=True)]
        found = {name: self._cache[name] for name in names if name in self._cache}
        new = list({name: at for at, name in enumerate(names) if name not in found}.values())
        for start in range(0, len(new), BATCH_ROWS):
            rows = new[start : start + BATCH_ROWS]
            width = max(lengths[row] for row in rows)
            states = model.layer_inputs(input_ids[rows, :width])
            for index, row in enumerate(rows):
                state = torch.stack([states[layer][index, : lengths[row]] for layer in layers])
                found[names[row]] = state.to(_cache_dtype(state))
        self._store(found)
        output = next(iter(found.values())).new_zeros(len(layers), *input_ids.shape, model.config.hidden_size)
        for row, name in enumerate(names):
            output[:, row, : lengths[row]] = found[name]
        return dict(zip(layers, output, strict=True))

    def _store(self, found: dict[bytes, Tensor]) -> None:
        for name, state in found.items():
            self._cache[name] = state
            self._cache.move_to_end(name)
        while len(self._cache) > self.rows:
            self._cache.popitem(last=False)


def _cache_dtype(state: Tensor) -> torch.dtype:
    """The short type of autocast, which projections round to anyway."""
    device = state.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else state.dtype

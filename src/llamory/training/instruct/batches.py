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
    """How much of an example is in memory: as in the published code, whose padding determines it, but without padding.

    Attributes:
        row_length: maximum tokens of a row, i.e. of a window in memory; the model's context.
        last_context_length: maximum tokens of the last row.
        total_length: maximum tokens of an example, the columns of the published code.
        mode: "random", a random part of the padding is in front (published `random_pad`); "memory", none is, so that as
            much as possible is in memory (published `always_pad` alone); "last", the last `last_context_length` tokens
            are local, as in a prompt (neither).
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
            lengths = f"{self.last_context_length} tokens where a row has {self.row_length}"
            raise LlamoryError(f"The last row can't have {lengths}; last_context_length must be at most row_length.")

    @property
    def max_rows(self) -> int:
        """Maximum number of rows of an example."""
        return -(-max(0, self.total_length - self.last_context_length) // self.row_length) + 1

    def num_memory_tokens(self, length: int, rng: random.Random) -> int:
        """How many of the first tokens of an example go into memory."""
        columns = self.total_length if self.mode != "last" else length
        padding = rng.randint(0, columns - length) if self.mode == "random" else 0
        return min(max(columns - self.last_context_length - padding, 0), length)

    def split_rows(self, length: int, rng: random.Random) -> list[tuple[int, int]]:
        """Start and stop of each row of an example; a row sees earlier rows as memory."""
        memory = self.num_memory_tokens(length, rng)
        rows = [(start, min(start + self.row_length, memory)) for start in range(0, memory, self.row_length)]
        return rows + [(memory, length)] * (memory < length)


@dataclass(frozen=True)
class SplitExample:
    """An example and the start and stop of its rows."""

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
    """Make a batch of whole examples, padded on the right.

    Args:
        examples: the examples.
        pad_token_id: for padding.
        negatives: maximum rows of other examples that a row with answers sees as well. Only rows before all answers of
            their example are used. They see such rows only, so that no row sees its own answers through others.
        negative_weight: (min, max) weight of a negative in the softmax, log-uniform per row; simulates a larger memory.
        rng: draws negatives and weights; without it, the first negatives and the min weight are used.

    Returns:
        `input_ids`, `attention_mask`, `shift_labels`: (rows, longest row), the last with the label of the next token
        of the example, also of its next row, and -100 elsewhere; `contexts`: per row, the earlier rows of its
        example, nearest first, then negatives; `context_weights` (with negative_weight): of each context; `sources`:
        per example.
    """
    tokens: list[Sequence[int]] = []
    targets: list[Sequence[int]] = []
    contexts: list[list[int]] = []
    example_indices: list[int] = []
    for number, example in enumerate(examples):
        next_labels, first = [*example.labels[1:], IGNORE_INDEX], len(tokens)
        for start, stop in example.rows:
            contexts.append(list(range(len(tokens) - 1, first - 1, -1)))
            example_indices.append(number)
            tokens.append(example.input_ids[start:stop])
            targets.append(next_labels[start:stop])
    weights = [[1.0] * len(seen) for seen in contexts]
    answers = [_has_targets(target) for target in targets]
    in_front = [not any(answers[at] for at in (row, *seen)) for row, seen in enumerate(contexts)]
    for row in [row for row, answered in enumerate(answers) if answered and negatives]:
        others = [at for at, plain in enumerate(in_front) if plain and example_indices[at] != example_indices[row]]
        count = min(negatives, len(others))
        contexts[row] += sorted(rng.sample(others, count)) if rng is not None else others[:count]
        weights[row] += [log_interpolate(negative_weight, 0.0 if rng is None else rng.random())] * count
    return {
        **_padded(tokens, targets, pad_token_id),
        "contexts": contexts,
        **({"context_weights": weights} if negatives and negative_weight != (1, 1) else {}),
        "sources": [example.source for example in examples],
    }


def _padded(
    rows: Sequence[Sequence[int]], targets: Sequence[Sequence[int]], pad_token_id: int | None
) -> dict[str, Tensor]:
    """Token ids, mask and targets of rows, padded on the right, (rows, longest)."""
    ids = [torch.as_tensor(row, dtype=torch.long) for row in rows]
    labels = [torch.as_tensor(row, dtype=torch.long) for row in targets]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=pad_token_id or 0),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "shift_labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }


class InstructBatches:
    """An endless iterator of batches of whole examples, drawn from datasets in given proportions.

    The generator for each example is seeded with its number, and each epoch of a dataset has its own order, so the
    position is only a count per dataset. Raises LlamoryError if an example may need more rows than a batch has, or
    negatives or their weights are out of range.

    Args:
        datasets: from `load_instructions`, or any sequences of such examples.
        proportions: of the datasets in the examples.
        split: how examples are split.
        rows: maximum rows of a batch.
        pad_token_id: for padding.
        seed: of all draws.
        stream: index of this part of the data, of `streams` disjoint ones.
        streams: number of parts.
        negatives, negative_weight: as for `collate`.
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
        self.negative_weight_progress = 1.0  # from the min weight (0) to the max (1), on a logarithmic scale
        self.datasets, self.proportions, self.split, self.rows = datasets, list(proportions), split, rows
        self.pad_token_id, self.seed, self.stream, self.streams = pad_token_id, seed, stream, streams
        self._counts = [0] * len(datasets)
        self._order = lru_cache(len(datasets))(self._shuffled)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self

    def __next__(self) -> dict[str, Any]:
        examples: list[SplitExample] = []
        remaining_rows = self.rows
        while True:
            source, example = self._next_example()
            remaining_rows -= len(example.rows)
            if remaining_rows < 0:
                rng = random.Random(f"{self.seed}/{self.stream}/{sum(self._counts)}/negatives")
                return collate(examples, self.pad_token_id, **self._negative_settings(), rng=rng)
            examples.append(example)
            self._counts[source] += 1

    def _negative_settings(self) -> dict[str, Any]:
        """Number and current weights of negatives."""
        largest = log_interpolate(self.negative_weight, self.negative_weight_progress)
        return {"negatives": self.negatives, "negative_weight": (self.negative_weight[0], largest)}

    def _example_index(self, source: int) -> int:
        """The index of a dataset's next example of this stream."""
        size = len(self.datasets[source])
        epoch, index = divmod(self._counts[source] * self.streams + self.stream, size)
        return int(self._order(source, epoch)[index])

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values: examples drawn of each dataset, and the identity of the data."""
        return {"drawn": list(self._counts), "data": self._identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position; raises LlamoryError if it is of other data or settings."""
        check_same_settings(state["data"], self._identity())
        self._counts = list(state["drawn"])

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
        """The next example and its dataset; repeated calls return the same."""
        rng = random.Random(f"{self.seed}/{self.stream}/{sum(self._counts)}")
        source = rng.choices(range(len(self.datasets)), self.proportions)[0]
        example = self.datasets[source][self._example_index(source)]
        rows = self.split.split_rows(len(example["input_ids"]), rng)
        return source, SplitExample(example["input_ids"], example["labels"], rows, example.get("source", ""))

    def _shuffled(self, source: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, source, epoch]).permutation(len(self.datasets[source]))


def check_rows(split: MemorySplit, rows: int) -> None:
    """Raise LlamoryError unless a batch has enough rows for the longest example."""
    if rows < split.max_rows:
        need = f"An example may need {split.max_rows} rows, but a batch has {rows}"
        raise LlamoryError(f"{need}; raise batch_size or lower total_length.")


@dataclass(frozen=True)
class Query:
    """A row and the token that each token predicts (-100 for none); it sees the document's first rows as memory."""

    ids: Sequence[int]
    targets: Sequence[int]
    num_visible_rows: int


@dataclass(frozen=True)
class Context:
    """The rows of a document, encoded independently, and the queries with these rows in memory."""

    rows: Sequence[Sequence[int]]
    queries: Sequence[Query]
    source: str = ""


def build_context(examples: Sequence[Mapping[str, Any]], split: MemorySplit, rng: random.Random) -> Context:
    """Make the rows and queries of all examples of one document, or of a single example.

    The document is in memory, in rows like the windows of `read`, and each chat or question is a query. An example
    without a document is split by `split`; each of its rows with answers is a query that sees earlier rows.
    """
    ids, document, last = examples[0]["input_ids"], examples[0]["document"], split.last_context_length
    if document:
        rows = [ids[start : min(start + split.row_length, document)] for start in range(0, document, split.row_length)]
        queries = []
        for each in examples:
            targets = [*each["labels"][document + 1 :], IGNORE_INDEX]
            queries.append(Query(each["input_ids"][document : document + last], targets[:last], len(rows)))
    else:
        next_labels = [*examples[0]["labels"][1:], IGNORE_INDEX]
        spans = split.split_rows(len(ids), rng)
        rows = [ids[start:stop] for start, stop in spans]
        queries = [Query(rows[at], next_labels[start:stop], at) for at, (start, stop) in enumerate(spans)]
    queries = [each for each in queries if _has_targets(each.targets)]
    if not document:  # rows that no query sees are left out
        rows = rows[: max((each.num_visible_rows for each in queries), default=0)]
    return Context(rows, queries, examples[0].get("source", ""))


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
    """Make a batch of queries on frozen contexts, padded on the right.

    Args:
        documents: rows and queries of each document.
        pad_token_id: for padding.
        query_token_budget: maximum tokens of the queries with padding; at least one query is drawn.
        negatives: maximum rows of other documents that a query sees as well.
        negative_weight: (min, max) weight of a negative, log-uniform per document.
        rng: of all draws.

    Returns:
        `context_ids`: (context rows, longest), and `context_lengths`: their real tokens; `input_ids`, `attention_mask`,
        `shift_labels`: (queries, longest); `contexts`: per query, the context rows that it sees; `context_weights`
        (with negative_weight): of each context; `sources`: per document.
    """
    rows = [torch.as_tensor(row, dtype=torch.long) for each in documents for row in each.rows]
    document_indices = [number for number, each in enumerate(documents) for _ in each.rows]
    selected = _sample_queries(documents, query_token_budget, rng)
    queries: list[Query] = []
    contexts: list[list[int]] = []
    weights: list[list[float]] = []
    for number, document in enumerate(documents):
        first = document_indices.index(number) if document.rows else 0
        others = [at for at, document_index in enumerate(document_indices) if document_index != number]
        seen = sorted(rng.sample(others, min(negatives, len(others))))
        weight = log_interpolate(negative_weight, rng.random())
        for index, each in enumerate(document.queries):
            if (number, index) in selected:
                queries.append(each)
                contexts.append([*range(first, first + each.num_visible_rows), *seen])
                weights.append([1.0] * each.num_visible_rows + [weight] * len(seen))
    return {
        "context_ids": pad_sequence(rows, batch_first=True, padding_value=pad_token_id or 0),
        "context_lengths": list(map(len, rows)),
        **_padded([each.ids for each in queries], [each.targets for each in queries], pad_token_id),
        "contexts": contexts,
        **({"context_weights": weights} if negative_weight != (1, 1) else {}),
        "sources": [each.source for each in documents],
    }


def _sample_queries(documents: Sequence[Context], token_budget: int, rng: random.Random) -> set[tuple[int, int]]:
    """Draw queries within the budget, as (document, index) pairs."""
    pairs = [(number, index) for number, each in enumerate(documents) for index in range(len(each.queries))]
    rng.shuffle(pairs)
    selected: set[tuple[int, int]] = set()
    longest = 0
    for number, index in pairs:
        longest = max(longest, len(documents[number].queries[index].ids))
        if selected and (len(selected) + 1) * longest > token_budget:
            break
        selected.add((number, index))
    return selected


class DocumentExamples(Sequence[list[dict[str, Any]]]):
    """The examples of a dataset, grouped by document."""

    def __init__(self, examples: Any) -> None:
        self.examples, self._starts = examples, [0]
        keys = zip(examples["document"], examples["source"], strict=True)
        for about, group in groupby(keys, lambda key: key[1] if key[0] else ""):
            first, count = self._starts[-1], len(list(group))
            # An example without a document is its own group.
            self._starts += [first + count] if about else range(first + 1, first + count + 1)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: Any) -> Any:
        start, stop = self._starts[number], self._starts[number + 1]
        return [self.examples[at] for at in range(start, stop)]


class FrozenContextBatches(InstructBatches):
    """An endless iterator of `collate_frozen_contexts` batches, each with documents of one dataset.

    The arguments are those of `InstructBatches`; `rows` is the maximum number of context rows.
    """

    def __init__(self, datasets: Sequence[Any], *args: Any, query_token_budget: int, **kwargs: Any) -> None:
        if query_token_budget < 1:
            raise LlamoryError(f"query_token_budget must be at least 1, not {query_token_budget}.")
        super().__init__([DocumentExamples(each) for each in datasets], *args, **kwargs)
        self.query_token_budget = query_token_budget

    def __next__(self) -> dict[str, Any]:
        rng = random.Random(f"{self.seed}/{self.stream}/{sum(self._counts)}/batch")
        source = rng.choices(range(len(self.datasets)), self.proportions)[0]
        documents: list[Context] = []
        remaining_rows = self.rows
        while True:
            document = build_context(self.datasets[source][self._example_index(source)], self.split, rng)
            remaining_rows -= len(document.rows)
            if documents and remaining_rows < 0:
                break
            documents.append(document)
            self._counts[source] += 1
        settings = {"query_token_budget": self.query_token_budget, **self._negative_settings()}
        return collate_frozen_contexts(documents, self.pad_token_id, **settings, rng=rng)

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"query_token_budget": self.query_token_budget}


BATCH_ROWS = 16  # rows that are encoded together


class HiddenStateCache:
    """An LRU cache of the memory layers' inputs of up to `rows` encoded rows."""

    def __init__(self, rows: int = 0) -> None:
        self.rows = rows
        self._cache: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, model: Any, input_ids: Tensor, lengths: Sequence[int]) -> dict[int, Tensor]:
        """`LongLlamaModel.layer_inputs` of rows (rows, width) of these lengths: per layer (rows, width, hidden)."""
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
                if torch.is_autocast_enabled(state.device.type):  # projections convert their input anyway
                    state = state.to(torch.get_autocast_dtype(state.device.type))
                found[names[row]] = state
        for name, state in found.items():
            self._cache[name] = state
            self._cache.move_to_end(name)
        while len(self._cache) > self.rows:
            self._cache.popitem(last=False)
        output = next(iter(found.values())).new_zeros(len(layers), *input_ids.shape, model.config.hidden_size)
        for row, name in enumerate(names):
            output[:, row, : lengths[row]] = found[name]
        return dict(zip(layers, output, strict=True))

"""Examples as rows of a batch: their first part in memory, their last local; endless, seeded and resumable."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from llamory.errors import LlamoryError
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.corpus import check_same_settings
from llamory.training.fot.batches import check_negative_weight, log_interpolate


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

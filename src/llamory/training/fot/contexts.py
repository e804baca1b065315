"""Which rows each row of a batch sees: chunks of its own document (positives) and of other documents (negatives).

Tworkowski et al. 2023, section 3.2. A pack is `dataset_packing` consecutive rows with consecutive chunks of one
document, or of several short ones. Rows that see one another in a cycle could copy their own next tokens, so the rows
get an order, drawn at each step with a crossbatch_schedule, and no row sees a later one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.longllama.crossbatch import crossbatch_contexts
from llamory.training.streaming import Curriculum

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

Embed = Callable[[list[Tensor]], Tensor]

# (positives, negatives) for each quarter of the batch, published for LongLLaMA's two models.
PUBLISHED_CROSSBATCH_SCHEDULES: dict[str, list[tuple[int, int]]] = {
    "3b": [(0, 0), (1, 1), (2, 1), (3, 0)],
    "7b": [(0, 0), (1, 2), (2, 5), (3, 4)],
}
SCHEDULES = ("constant", "sampled", "curriculum")
NEGATIVES = ("random", "similar")

_SIZE, _ROWS, _WEIGHTS = 0, 1, 2  # independent random draws


@dataclass(frozen=True)
class ContextSamplingConfig:
    """How contexts are selected: by a crossbatch_schedule, or by a range as in the published training code.

    Attributes:
        crossbatch_schedule: (positives, negatives) for each equal fraction of the batch's packs, in order.
        cross_batch_range: maximum number of earlier rows that a row sees; give either this or `crossbatch_schedule`.
        crossbatch_stepping: with a range, later chunks of a pack see more rows than earlier ones.
        schedule: of the number of contexts: "constant", "sampled" (drawn from `sizes` at each step) or "curriculum"
            (the next of `sizes` once a training accuracy is reached). A size replaces the range, or the
            number of negatives of each entry that has negatives.
        sizes: numbers of contexts, at most the range; increasing for "curriculum".
        advance_at_accuracy: running mean of the training accuracy that advances the curriculum, above 0, at most 1.
        negatives: "random", or "similar" for the nearest by a retriever.
        negative_weight: (min, max) weight of each negative in the softmax, log-uniform per row; simulates a larger
            memory. Not in the paper.
    """

    crossbatch_schedule: Sequence[Sequence[int]] | None = None
    cross_batch_range: int | None = None
    crossbatch_stepping: bool = False
    schedule: str = "constant"
    sizes: Sequence[int] = ()
    advance_at_accuracy: float = 0.98
    negatives: str = "random"
    negative_weight: Sequence[float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        schedule = self.crossbatch_schedule
        if (schedule is None) == (self.cross_batch_range is None):
            raise LlamoryError("Give either a crossbatch_schedule or a cross_batch_range, not both.")
        if self.schedule not in SCHEDULES:
            raise LlamoryError(f"There is no schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}.")
        if self.negatives not in NEGATIVES:
            raise LlamoryError(f"negatives can't be {self.negatives!r}; choose one of {', '.join(NEGATIVES)}.")
        if schedule is None and self.negatives == "similar":
            raise LlamoryError("Similar negatives need a crossbatch_schedule; give one instead of a cross_batch_range.")
        if schedule is not None and self.crossbatch_stepping:
            raise LlamoryError("Stepping goes with a cross_batch_range, not with a crossbatch_schedule.")
        if schedule is not None and not (
            schedule and all(isinstance(entry, tuple | list) and len(entry) == 2 for entry in schedule)
        ):
            raise LlamoryError(f"A crossbatch_schedule is a list of pairs (positives, negatives), not {schedule!r}.")
        numbers = [number for entry in schedule or () for number in entry] + list(self.sizes)
        numbers += [] if self.cross_batch_range is None else [self.cross_batch_range]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise LlamoryError(f"A number of contexts must be an integer of at least 0, not {number!r}.")
        check_negative_weight(self.negative_weight)
        if not 0 < self.advance_at_accuracy <= 1:
            raise LlamoryError(f"advance_at_accuracy must be above 0 and at most 1, not {self.advance_at_accuracy}.")
        self._check_sizes()

    def _check_sizes(self) -> None:
        if self.schedule == "constant":
            if self.sizes:
                raise LlamoryError('sizes are for the schedules "sampled" and "curriculum"; choose one of them.')
            return
        if not self.sizes:
            raise LlamoryError(f'The schedule "{self.schedule}" needs sizes: numbers of contexts, such as 1, 2, 4.')
        if self.schedule == "curriculum" and any(b <= a for a, b in pairwise(self.sizes)):
            raise LlamoryError(f"The sizes of a curriculum must increase, not {list(self.sizes)}.")
        if self.cross_batch_range is not None and max(self.sizes) > self.cross_batch_range:
            limit = f"more than the cross_batch_range of {self.cross_batch_range}"
            raise LlamoryError(f"sizes go up to {max(self.sizes)}, {limit}; choose smaller ones.")
        if self.crossbatch_schedule is not None and not any(negatives for _, negatives in self.crossbatch_schedule):
            raise LlamoryError("Sizes are numbers of negatives, but no entry of the crossbatch_schedule has any.")


class ContextSampler:
    """Selects the contexts of a batch; the result depends on seed, step and stream only, not on earlier calls."""

    def __init__(
        self,
        sampling_config: ContextSamplingConfig,
        batch_size: int,
        dataset_packing: int = 1,
        seed: int = 0,
        embed: Embed | None = None,
    ) -> None:
        """Raise LlamoryError unless the configuration fits the batch.

        `embed` maps the token ids of rows to normalized vectors (rows, dimension), for similar negatives.
        """
        if seed < 0:
            raise LlamoryError(f"seed must be at least 0, not {seed}.")
        if sampling_config.negatives == "similar" and embed is None:
            raise LlamoryError("Similar negatives need a retriever; give one, or use random negatives.")
        # Checks batch and packing, also for a crossbatch_schedule.
        crossbatch_contexts(batch_size, sampling_config.cross_batch_range or 0, dataset_packing)
        self.sampling_config = sampling_config
        self.batch_size, self.dataset_packing, self.seed, self._embed = batch_size, dataset_packing, seed, embed
        self._pack = np.arange(batch_size) // dataset_packing
        self._check_crossbatch_schedule()
        self._curriculum: Curriculum[int] | None = None
        if sampling_config.schedule == "curriculum":
            self._curriculum = Curriculum(
                [(size, sampling_config.advance_at_accuracy) for size in sampling_config.sizes]
            )

    def _check_crossbatch_schedule(self) -> None:
        schedule = self.sampling_config.crossbatch_schedule
        if schedule is None:
            return
        packs = self.batch_size // self.dataset_packing
        if len(schedule) > packs:
            raise LlamoryError(
                f"The crossbatch_schedule has {len(schedule)} entries, but a batch of {self.batch_size} rows with "
                f"{self.dataset_packing} rows per document has {packs} documents."
            )
        positives = max(entry[0] for entry in schedule)
        if positives >= self.dataset_packing:
            raise LlamoryError(
                f"The crossbatch_schedule asks for {positives} earlier chunks, but a dataset_packing of "
                f"{self.dataset_packing} has at most {self.dataset_packing - 1}; choose at least {positives + 1}."
            )
        negatives = max(self.sampling_config.sizes or [entry[1] for entry in schedule])
        others = self.batch_size - self.dataset_packing
        if negatives > others:
            problem = f"a batch of {self.batch_size} rows has {others} of them"
            raise LlamoryError(f"A row can't see {negatives} rows of other documents: {problem}.")

    def size(self, step: int) -> int | None:
        """The range or number of negatives at a step, the same in all streams; None for the schedule's own."""
        if self.sampling_config.schedule == "constant":
            return self.sampling_config.cross_batch_range
        if self._curriculum is not None:
            return self._curriculum.stage
        return self.sampling_config.sizes[int(self._random(_SIZE, step).integers(len(self.sampling_config.sizes)))]

    def observe(self, accuracy: float) -> None:
        """Report the training accuracy of a step, once per step, the same in all processes; may advance the size."""
        if self._curriculum is not None:
            self._curriculum.observe(accuracy)

    def state_dict(self) -> dict[str, Any]:
        """The state of the curriculum, as JSON values."""
        return {} if self._curriculum is None else self._curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; raises LlamoryError if it is of a configuration with more sizes."""
        if self._curriculum is not None:
            self._curriculum.load_state_dict(state)

    def select(
        self, step: int, stream: int = 0, input_ids: Tensor | None = None, documents: Tensor | None = None
    ) -> list[list[int]]:
        """The contexts of each row of a batch.

        With a crossbatch_schedule, a row sees the previous chunks of its pack, nearest first, and then negatives, fewer
        if too few rows are before it in the order of the step. `stream` is the index of the batch in the step,
        `input_ids` (batch, length) are for similar negatives, `documents` (batch,) are numbers: no row sees its own
        document in another pack. Raises LlamoryError if these don't fit the batch or are missing.
        """
        is_other_document = self._different_documents(documents)
        size = self.size(step)
        if self.sampling_config.crossbatch_schedule is None:
            assert size is not None
            stepping = self.sampling_config.crossbatch_stepping
            contexts = crossbatch_contexts(self.batch_size, size, self.dataset_packing, stepping)
            allowed = is_other_document | (self._pack[:, None] == self._pack)
            return [[other for other in seen if allowed[row, other]] for row, seen in enumerate(contexts)]
        scores = self._similarities(input_ids) if self.sampling_config.negatives == "similar" else None
        random = self._random(_ROWS, step, stream)
        order = self._draw_order(random)
        contexts = []
        for row in range(self.batch_size):
            positives, negatives = self._entry(row, size)
            chunk = row % self.dataset_packing
            before = np.flatnonzero(is_other_document[row] & (order < order[row]))
            if scores is None:
                others = random.choice(before, min(negatives, len(before)), replace=False)
            else:
                others = before[np.argsort(-scores[row, before], kind="stable")][:negatives]
            contexts.append([row - offset for offset in range(1, min(positives, chunk) + 1)] + others.tolist())
        return contexts

    def weights(self, contexts: Sequence[Sequence[int]], step: int, stream: int = 0) -> list[list[float]] | None:
        """The weight of each context that `select` gave for a step and stream, 1 for positives; None if all are 1."""
        least, most = self.sampling_config.negative_weight
        if least == most == 1:
            return None
        draws = self._random(_WEIGHTS, step, stream).random(self.batch_size)
        negative_weight = [log_interpolate((least, most), float(draw)) for draw in draws]
        return [
            [1.0 if self._pack[other] == self._pack[row] else negative_weight[row] for other in seen]
            for row, seen in enumerate(contexts)
        ]

    def order(self, step: int, stream: int = 0) -> list[int]:
        """The position of each row in the order of a step; a row sees earlier rows only."""
        if self.sampling_config.crossbatch_schedule is None:
            return list(range(self.batch_size))
        return [int(at) for at in self._draw_order(self._random(_ROWS, step, stream))]

    def _draw_order(self, random: np.random.Generator) -> np.ndarray:
        """(batch,) a uniformly random interleaving of the packs; those without negatives come first."""
        numbers = np.sort(random.random((self.batch_size // self.dataset_packing, self.dataset_packing)), axis=1)
        for pack, row in enumerate(range(0, self.batch_size, self.dataset_packing)):
            numbers[pack] += self._entry(row, None)[1] > 0
        order = np.empty(self.batch_size, dtype=np.int64)
        order[np.argsort(numbers, axis=None, kind="stable")] = np.arange(self.batch_size)
        return order

    def _entry(self, row: int, size: int | None) -> tuple[int, int]:
        """(positives, negatives) of a row."""
        schedule = self.sampling_config.crossbatch_schedule
        assert schedule is not None
        packs = self.batch_size // self.dataset_packing
        positives, negatives = schedule[row // self.dataset_packing * len(schedule) // packs]
        return positives, size if negatives and size is not None else negatives

    def _different_documents(self, documents: Tensor | None) -> np.ndarray:
        """(batch, batch) True for rows of different packs and documents."""
        different: np.ndarray = self._pack[:, None] != self._pack
        if documents is None:
            return different
        if documents.shape != (self.batch_size,):
            shape = tuple(documents.shape)
            raise LlamoryError(f"There are {self.batch_size} rows, but document numbers of shape {shape}.")
        numbers = documents.cpu().numpy()
        return different & (numbers[:, None] != numbers)

    def _similarities(self, input_ids: Tensor | None) -> np.ndarray:
        """(batch, batch) dot products of the rows' vectors."""
        if input_ids is None or len(input_ids) != self.batch_size:
            raise LlamoryError(f"Similar negatives need the token ids of all {self.batch_size} rows.")
        assert self._embed is not None
        with torch.no_grad():
            vectors = self._embed(list(input_ids)).double().cpu().numpy()
        products: np.ndarray = vectors @ vectors.T
        return products

    def _random(self, what: int, step: int, stream: int = 0) -> np.random.Generator:
        return np.random.default_rng([self.seed, what, step, stream])


def embedder(
    retriever: SentenceTransformer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    clean: Callable[[list[str]], list[str]] = lambda texts: texts,
) -> Embed:
    """The `embed` of `ContextSampler` for a Sentence Transformers model, which is frozen.

    Rows are decoded to text, which `clean` may change, and encoded as documents, truncated to the model's maximum.
    """
    retriever.requires_grad_(False)

    def embed(rows: list[Tensor]) -> Tensor:
        texts = clean(tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True))
        vectors = retriever.encode_document(
            texts, batch_size=batch_size, show_progress_bar=False, convert_to_tensor=True, normalize_embeddings=True
        )
        assert isinstance(vectors, Tensor)
        return vectors

    return embed


def log_interpolate(negative_weight: tuple[float, float], fraction: float) -> float:
    """Interpolate between the min and max weight on a logarithmic scale; `fraction` is from 0 to 1."""
    least, most = negative_weight
    return float(least * (most / least) ** fraction)


def check_negative_weight(negative_weight: Sequence[float]) -> None:
    """Raise LlamoryError unless these are a min and a max weight."""
    if len(negative_weight) != 2 or not 0 < negative_weight[0] <= negative_weight[1] < math.inf:
        raise LlamoryError(f"negative_weight must be two numbers above 0, min and max, not {list(negative_weight)}.")

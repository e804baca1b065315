"""Which rows of a batch each row sees in training: chunks of its own document (positives) and of others (negatives).

Tworkowski et al. 2023, section 3.2. A pack is `dataset_packing` consecutive rows, which hold consecutive chunks of one
document (or of short ones joined).

What a row reads of another in one memory layer carries all that the other has read in the memory layers below. Rows
that see one another, at once or in a circle, would so be told their own next tokens. So rows are put in an order, in
which the chunks of a pack stay in theirs, and no row sees one behind it. In a crossbatch_schedule the order is drawn at each step.
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

# (positives, negatives) that each quarter of the batch sees, as LongLLaMA's authors give them for their two models.
PUBLISHED_CROSSBATCH_SCHEDULES: dict[str, list[tuple[int, int]]] = {
    "3b": [(0, 0), (1, 1), (2, 1), (3, 0)],
    "7b": [(0, 0), (1, 2), (2, 5), (3, 4)],
}
SCHEDULES = ("constant", "sampled", "curriculum")
NEGATIVES = ("random", "similar")

# Draws that mustn't depend on one another.
_SIZE, _ROWS, _WEIGHTS = 0, 1, 2


@dataclass(frozen=True)
class ContextSamplingConfig:
    """How contexts are chosen: by a crossbatch_schedule, or by a range as in the published training code.

    Attributes:
        crossbatch_schedule: (positives, negatives) of each equal fraction of the batch's packs, in their order.
        cross_batch_range: how many rows before it a row sees at most; exactly one of this and `crossbatch_schedule` is given.
        crossbatch_stepping: with a range, later chunks see more than earlier ones.
        schedule: of the number of contexts: "constant"; "sampled", drawn from `sizes` at each step; "curriculum", the next
            of `sizes` once training accuracy is reached. A size is the range, or the negatives of all entries of the
            crossbatch_schedule that have any.
        sizes: numbers of contexts, with a range none above it, and for "curriculum" from small to large.
        advance_at_accuracy: the running mean of training accuracy, above 0 and up to 1, at which the number grows.
        negatives: "random", or "similar": the closest ones by a retriever.
        negative_weight: how many of its kind a negative counts as in the softmax, the least and the most; each row draws one
            number, evenly on a logarithmic scale, so that a few rows stand for memories of all sizes. Not in the paper.

    Raises:
        LlamoryError: settings that can't be, or can't be together.
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
        if self.crossbatch_schedule is not None:
            object.__setattr__(
                self,
                "crossbatch_schedule",
                tuple(tuple(entry) if isinstance(entry, list) else entry for entry in self.crossbatch_schedule),
            )
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if (self.crossbatch_schedule is None) == (self.cross_batch_range is None):
            raise LlamoryError(
                "Give either a crossbatch_schedule of positives and negatives or a cross_batch_range, and not both."
            )
        self._check_names()
        self._check_numbers()
        self._check_schedule()

    def _check_names(self) -> None:
        if self.schedule not in SCHEDULES:
            raise LlamoryError(f"There is no schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}.")
        if self.negatives not in NEGATIVES:
            raise LlamoryError(f"negatives can't be {self.negatives!r}; choose one of {', '.join(NEGATIVES)}.")
        if self.crossbatch_schedule is None and self.negatives == "similar":
            raise LlamoryError(
                "Similar negatives are chosen for a crossbatch_schedule; give a crossbatch_schedule instead of a cross_batch_range."
            )
        if self.crossbatch_schedule is not None and self.crossbatch_stepping:
            raise LlamoryError(
                "Stepping goes with a cross_batch_range; leave it out where a crossbatch_schedule is given."
            )

    def _check_numbers(self) -> None:
        if self.crossbatch_schedule is not None and (
            not self.crossbatch_schedule
            or any(not isinstance(entry, tuple) or len(entry) != 2 for entry in self.crossbatch_schedule)
        ):
            raise LlamoryError(
                f"A crossbatch_schedule is a list of pairs (positives, negatives), not {self.crossbatch_schedule!r}."
            )
        numbers = [number for entry in self.crossbatch_schedule or () for number in entry] + list(self.sizes)
        if self.cross_batch_range is not None:
            numbers.append(self.cross_batch_range)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise LlamoryError(f"A number of contexts is a whole number from 0 on, not {number!r}.")
        check_negative_weight(self.negative_weight)
        if not 0 < self.advance_at_accuracy <= 1:
            raise LlamoryError(
                f"advance_at_accuracy is an accuracy above 0 and up to 1, not {self.advance_at_accuracy}."
            )

    def _check_schedule(self) -> None:
        if self.schedule == "constant":
            if self.sizes:
                raise LlamoryError('sizes are for the schedules "sampled" and "curriculum"; choose one of them.')
            return
        if not self.sizes:
            raise LlamoryError(f'The schedule "{self.schedule}" needs sizes: numbers of contexts, such as 1, 2, 4.')
        if self.schedule == "curriculum" and any(b <= a for a, b in pairwise(self.sizes)):
            raise LlamoryError(f"Sizes to grow through go from small to large, not {list(self.sizes)}.")
        if self.cross_batch_range is not None and max(self.sizes) > self.cross_batch_range:
            raise LlamoryError(
                f"sizes go up to {max(self.sizes)}, which is more than the cross_batch_range of "
                f"{self.cross_batch_range}; raise it or choose smaller sizes."
            )
        if self.crossbatch_schedule is not None and not any(negatives for _, negatives in self.crossbatch_schedule):
            raise LlamoryError(
                "Sizes are numbers of negatives, but no entry of the crossbatch_schedule has any; give one some."
            )


class ContextSampler:
    """Chooses the contexts of a batch; the same for the same seed, step and stream, whatever was chosen before."""

    def __init__(
        self,
        sampling_config: ContextSamplingConfig,
        batch_size: int,
        dataset_packing: int = 1,
        seed: int = 0,
        embed: Embed | None = None,
    ) -> None:
        """See that the sampling_config fits the batch.

        Args:
            sampling_config: how contexts are chosen.
            batch_size: rows of the batch.
            dataset_packing: consecutive rows that hold consecutive chunks of one document.
            seed: of all draws, from 0 on.
            embed: for similar negatives: token ids of rows (tokens,) to their vectors (rows, dimension), normalised.

        Raises:
            LlamoryError: a batch that packing doesn't divide, more contexts than it has rows for, more entries of the
                crossbatch_schedule than packs, or similar negatives without `embed`.
        """
        if seed < 0:
            raise LlamoryError(f"A seed is a whole number from 0 on, not {seed}.")
        if sampling_config.negatives == "similar" and embed is None:
            raise LlamoryError("Similar negatives need a retriever that finds them; name one, or take random ones.")
        # Its checks of batch and packing hold for a crossbatch_schedule too.
        crossbatch_contexts(batch_size, sampling_config.cross_batch_range or 0, dataset_packing)
        self.sampling_config = sampling_config
        self.batch_size, self.dataset_packing, self.seed, self._embed = batch_size, dataset_packing, seed, embed
        self._pack = np.arange(batch_size) // dataset_packing
        self._check_crossbatch_schedule()
        curriculum = sampling_config.schedule == "curriculum"
        self._curriculum = (
            Curriculum([(size, sampling_config.advance_at_accuracy) for size in sampling_config.sizes])
            if curriculum
            else None
        )

    def _check_crossbatch_schedule(self) -> None:
        if self.sampling_config.crossbatch_schedule is None:
            return
        packs = self.batch_size // self.dataset_packing
        if len(self.sampling_config.crossbatch_schedule) > packs:
            raise LlamoryError(
                f"The crossbatch_schedule has {len(self.sampling_config.crossbatch_schedule)} entries, but a batch of {self.batch_size} rows with "
                f"{self.dataset_packing} rows per document has {packs} documents; choose a larger batch or fewer "
                "entries."
            )
        positives = max(entry[0] for entry in self.sampling_config.crossbatch_schedule)
        if positives >= self.dataset_packing:
            raise LlamoryError(
                f"The crossbatch_schedule asks for {positives} earlier chunks of a document, but with a dataset_packing of "
                f"{self.dataset_packing} a row has at most {self.dataset_packing - 1}; choose one of at least "
                f"{positives + 1}."
            )
        negatives = max(
            [entry[1] for entry in self.sampling_config.crossbatch_schedule]
            if not self.sampling_config.sizes
            else self.sampling_config.sizes
        )
        others = self.batch_size - self.dataset_packing
        if negatives > others:
            raise LlamoryError(
                f"A row can't see {negatives} rows of other documents, as a batch of {self.batch_size} rows has "
                f"{others} of them; choose a larger batch or fewer negatives."
            )

    # ---- the number of contexts --------------------------------------------------------------------------------------

    def size(self, step: int) -> int | None:
        """The range or number of negatives at a step, the same in all streams; None: what the crossbatch_schedule says."""
        if self.sampling_config.schedule == "constant":
            return self.sampling_config.cross_batch_range
        if self._curriculum is not None:
            return self._curriculum.stage
        return self.sampling_config.sizes[int(self._random(_SIZE, step).integers(len(self.sampling_config.sizes)))]

    def observe(self, accuracy: float) -> None:
        """Hear the training accuracy of a step, once per step and the same in all processes; may go to the next size.

        Raises:
            LlamoryError: not an accuracy.
        """
        if self._curriculum is not None:
            self._curriculum.observe(accuracy)

    def state_dict(self) -> dict[str, Any]:
        """What the schedule "curriculum" knows of the steps so far; fit for JSON."""
        return {} if self._curriculum is None else self._curriculum.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            LlamoryError: the state is of a sampling_config with more sizes.
        """
        if self._curriculum is not None:
            self._curriculum.load_state_dict(state)

    # ---- the rows ----------------------------------------------------------------------------------------------------

    def choose(
        self, step: int, stream: int = 0, input_ids: Tensor | None = None, documents: Tensor | None = None
    ) -> list[list[int]]:
        """The contexts of each row of a batch.

        In a crossbatch_schedule, a row sees chunks of its pack just before it, nearest first, and then negatives. It gets fewer
        negatives than asked for where fewer rows stand before it in the step's order.

        Args:
            step: of the training, from 0 on.
            stream: which of the step's batches.
            input_ids: (batch, columns) the batch's tokens, for similar negatives.
            documents: (batch,) numbers of the rows' documents; no row sees its own document at another pack.

        Raises:
            LlamoryError: tokens or documents that don't fit the batch, or no tokens for similar negatives.
        """
        is_other_document = self._different_documents(documents)
        size = self.size(step)
        if self.sampling_config.crossbatch_schedule is None:
            assert size is not None
            contexts = crossbatch_contexts(
                self.batch_size, size, self.dataset_packing, self.sampling_config.crossbatch_stepping
            )
            own = self._pack[:, None] == self._pack
            return [
                [other for other in seen if (own | is_other_document)[row, other]] for row, seen in enumerate(contexts)
            ]
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
        """What each of the chosen contexts counts as in the softmax: positives once; None where all do.

        Args:
            contexts: what `choose` gave for this step and stream.
            step: of the training, from 0 on.
            stream: which of the step's batches.
        """
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
        """Where each row stands in the order of a step's crossbatch_schedule: it sees no row behind it. With a range, as they come."""
        if self.sampling_config.crossbatch_schedule is None:
            return list(range(self.batch_size))
        return [int(at) for at in self._draw_order(self._random(_ROWS, step, stream))]

    def _draw_order(self, random: np.random.Generator) -> np.ndarray:
        """(batch,) any interleaving of the packs is as likely as any other, behind those that see no negatives."""
        numbers = np.sort(random.random((self.batch_size // self.dataset_packing, self.dataset_packing)), axis=1)
        for pack, row in enumerate(range(0, self.batch_size, self.dataset_packing)):
            numbers[pack] += self._entry(row, None)[1] > 0
        order = np.empty(self.batch_size, dtype=np.int64)
        order[np.argsort(numbers, axis=None, kind="stable")] = np.arange(self.batch_size)
        return order

    def _entry(self, row: int, size: int | None) -> tuple[int, int]:
        """(positives, negatives) of a row."""
        assert self.sampling_config.crossbatch_schedule is not None
        packs = self.batch_size // self.dataset_packing
        positives, negatives = self.sampling_config.crossbatch_schedule[
            row // self.dataset_packing * len(self.sampling_config.crossbatch_schedule) // packs
        ]
        return positives, size if negatives and size is not None else negatives

    def _different_documents(self, documents: Tensor | None) -> np.ndarray:
        """(batch, batch) whether two rows are of different packs and documents."""
        is_other_document: np.ndarray = self._pack[:, None] != self._pack
        if documents is None:
            return is_other_document
        if documents.shape != (self.batch_size,):
            raise LlamoryError(
                f"There are {self.batch_size} rows, but numbers of documents of shape {tuple(documents.shape)}."
            )
        numbers = documents.cpu().numpy()
        different: np.ndarray = is_other_document & (numbers[:, None] != numbers)
        return different

    def _similarities(self, input_ids: Tensor | None) -> np.ndarray:
        """(batch, batch) inner products of the rows' vectors."""
        if input_ids is None or len(input_ids) != self.batch_size:
            raise LlamoryError(f"Similar negatives are found by the tokens of all {self.batch_size} rows; give those.")
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
    """What `ContextSampler` finds similar rows with: any Sentence Transformers model, which isn't trained.

    It reads rows as documents, up to the length that it takes.

    Args:
        retriever: the model.
        tokenizer: turns rows into text; special tokens are left out.
        batch_size: texts that the model reads at once.
        clean: changes texts that the model wouldn't take.
    """
    retriever.requires_grad_(False)

    def embed(rows: list[Tensor]) -> Tensor:
        texts = clean(tokenizer.batch_decode([row.tolist() for row in rows], skip_special_tokens=True))
        vectors = retriever.encode_document(
            texts,
            batch_size=batch_size,
            show_progress_bar=False,
            convert_to_tensor=True,
            normalize_embeddings=True,
        )
        assert isinstance(vectors, Tensor)
        return vectors

    return embed


def log_interpolate(negative_weight: tuple[float, float], fraction: float) -> float:
    """The number that lies so far, from 0 to 1, log_interpolate the least and the most negative_weight on a logarithmic scale."""
    least, most = negative_weight
    return float(least * (most / least) ** fraction)


def check_negative_weight(negative_weight: Sequence[float]) -> None:
    """Raise LlamoryError unless these are the least and the most negative_weight of a negative."""
    if len(negative_weight) != 2 or not 0 < negative_weight[0] <= negative_weight[1] < math.inf:
        raise LlamoryError(
            f"negative_weight must be two numbers above 0, the least and the most, not {list(negative_weight)}."
        )

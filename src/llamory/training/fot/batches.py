"""Which rows of a batch each row sees in training: chunks of its own document (positives) and of others (negatives).

Tworkowski et al. 2023, section 3.2. A place is `dataset_packing` consecutive rows, which hold consecutive chunks of one
document (or of short ones joined).

What a row reads of another in one memory layer carries all that the other has read in the memory layers below. Rows
that see one another, at once or in a circle, would so be told their own next tokens. So rows are put in an order, in
which the chunks of a place stay in theirs, and no row sees one behind it. In a mix the order is drawn at each step.
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
from llamory.training.curriculum import Growth

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

Embed = Callable[[list[Tensor]], Tensor]

# (positives, negatives) that each quarter of the batch sees, as LongLLaMA's authors give them for their two models.
PUBLISHED_MIXES: dict[str, list[tuple[int, int]]] = {
    "3b": [(0, 0), (1, 1), (2, 1), (3, 0)],
    "7b": [(0, 0), (1, 2), (2, 5), (3, 4)],
}
SCHEDULES = ("constant", "sampled", "grown")
NEGATIVES = ("random", "similar")

# Draws that mustn't depend on one another.
_SIZE, _ROWS, _COPIES = 0, 1, 2


@dataclass(frozen=True)
class ContextPlan:
    """How contexts are chosen: by a mix, or by a range as in the published training code.

    Attributes:
        mix: (positives, negatives) of each equal share of the batch's places, in their order.
        cross_batch_range: how many rows before it a row sees at most; exactly one of this and `mix` is given.
        stepping: with a range, later chunks see more than earlier ones.
        schedule: of the number of contexts: "constant"; "sampled", drawn from `sizes` at each step; "grown", the next
            of `sizes` once training accuracy is reached. A size is the range, or the negatives of all entries of the
            mix that have any.
        sizes: numbers of contexts, with a range none above it, and for "grown" from small to large.
        grow_at: the running mean of training accuracy, above 0 and up to 1, at which the number grows.
        negatives: "random", or "similar": the closest ones by a retriever.
        copies: how many of its kind a negative counts as in the softmax, the least and the most; each row draws one
            number, evenly on a logarithmic scale, so that a few rows stand for memories of all sizes. Not in the paper.

    Raises:
        LlamoryError: settings that can't be, or can't be together.
    """

    mix: Sequence[Sequence[int]] | None = None
    cross_batch_range: int | None = None
    stepping: bool = False
    schedule: str = "constant"
    sizes: Sequence[int] = ()
    grow_at: float = 0.98
    negatives: str = "random"
    copies: Sequence[float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.mix is not None:
            object.__setattr__(
                self, "mix", tuple(tuple(entry) if isinstance(entry, list) else entry for entry in self.mix)
            )
        object.__setattr__(self, "sizes", tuple(self.sizes))
        if (self.mix is None) == (self.cross_batch_range is None):
            raise LlamoryError("Give either a mix of positives and negatives or a cross_batch_range, and not both.")
        self._check_names()
        self._check_numbers()
        self._check_schedule()

    def _check_names(self) -> None:
        if self.schedule not in SCHEDULES:
            raise LlamoryError(f"There is no schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}.")
        if self.negatives not in NEGATIVES:
            raise LlamoryError(f"negatives can't be {self.negatives!r}; choose one of {', '.join(NEGATIVES)}.")
        if self.mix is None and self.negatives == "similar":
            raise LlamoryError("Similar negatives are chosen for a mix; give a mix instead of a cross_batch_range.")
        if self.mix is not None and self.stepping:
            raise LlamoryError("Stepping goes with a cross_batch_range; leave it out where a mix is given.")

    def _check_numbers(self) -> None:
        if self.mix is not None and (
            not self.mix or any(not isinstance(entry, tuple) or len(entry) != 2 for entry in self.mix)
        ):
            raise LlamoryError(f"A mix is a list of pairs (positives, negatives), not {self.mix!r}.")
        numbers = [number for entry in self.mix or () for number in entry] + list(self.sizes)
        if self.cross_batch_range is not None:
            numbers.append(self.cross_batch_range)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                raise LlamoryError(f"A number of contexts is a whole number from 0 on, not {number!r}.")
        check_copies(self.copies)
        if not 0 < self.grow_at <= 1:
            raise LlamoryError(f"grow_at is an accuracy above 0 and up to 1, not {self.grow_at}.")

    def _check_schedule(self) -> None:
        if self.schedule == "constant":
            if self.sizes:
                raise LlamoryError('sizes are for the schedules "sampled" and "grown"; choose one of them.')
            return
        if not self.sizes:
            raise LlamoryError(f'The schedule "{self.schedule}" needs sizes: numbers of contexts, such as 1, 2, 4.')
        if self.schedule == "grown" and any(b <= a for a, b in pairwise(self.sizes)):
            raise LlamoryError(f"Sizes to grow through go from small to large, not {list(self.sizes)}.")
        if self.cross_batch_range is not None and max(self.sizes) > self.cross_batch_range:
            raise LlamoryError(
                f"sizes go up to {max(self.sizes)}, which is more than the cross_batch_range of "
                f"{self.cross_batch_range}; raise it or choose smaller sizes."
            )
        if self.mix is not None and not any(negatives for _, negatives in self.mix):
            raise LlamoryError("Sizes are numbers of negatives, but no entry of the mix has any; give one some.")


class ContextChooser:
    """Chooses the contexts of a batch; the same for the same seed, step and stream, whatever was chosen before."""

    def __init__(
        self,
        plan: ContextPlan,
        batch_size: int,
        dataset_packing: int = 1,
        seed: int = 0,
        embed: Embed | None = None,
    ) -> None:
        """See that the plan fits the batch.

        Args:
            plan: how contexts are chosen.
            batch_size: rows of the batch.
            dataset_packing: consecutive rows that hold consecutive chunks of one document.
            seed: of all draws, from 0 on.
            embed: for similar negatives: token ids of rows (tokens,) to their vectors (rows, dimension), normalised.

        Raises:
            LlamoryError: a batch that packing doesn't divide, more contexts than it has rows for, more entries of the
                mix than places, or similar negatives without `embed`.
        """
        if seed < 0:
            raise LlamoryError(f"A seed is a whole number from 0 on, not {seed}.")
        if plan.negatives == "similar" and embed is None:
            raise LlamoryError("Similar negatives need a retriever that finds them; name one, or take random ones.")
        # Its checks of batch and packing hold for a mix too.
        crossbatch_contexts(batch_size, plan.cross_batch_range or 0, dataset_packing)
        self.plan = plan
        self.batch_size, self.dataset_packing, self.seed, self._embed = batch_size, dataset_packing, seed, embed
        self._place = np.arange(batch_size) // dataset_packing
        self._check_mix()
        grown = plan.schedule == "grown"
        self._growth = Growth([(size, plan.grow_at) for size in plan.sizes]) if grown else None

    def _check_mix(self) -> None:
        if self.plan.mix is None:
            return
        places = self.batch_size // self.dataset_packing
        if len(self.plan.mix) > places:
            raise LlamoryError(
                f"The mix has {len(self.plan.mix)} entries, but a batch of {self.batch_size} rows with "
                f"{self.dataset_packing} rows per document has {places} documents; choose a larger batch or fewer "
                "entries."
            )
        positives = max(entry[0] for entry in self.plan.mix)
        if positives >= self.dataset_packing:
            raise LlamoryError(
                f"The mix asks for {positives} earlier chunks of a document, but with a dataset_packing of "
                f"{self.dataset_packing} a row has at most {self.dataset_packing - 1}; choose one of at least "
                f"{positives + 1}."
            )
        negatives = max([entry[1] for entry in self.plan.mix] if not self.plan.sizes else self.plan.sizes)
        others = self.batch_size - self.dataset_packing
        if negatives > others:
            raise LlamoryError(
                f"A row can't see {negatives} rows of other documents, as a batch of {self.batch_size} rows has "
                f"{others} of them; choose a larger batch or fewer negatives."
            )

    # ---- the number of contexts --------------------------------------------------------------------------------------

    def size(self, step: int) -> int | None:
        """The range or number of negatives at a step, the same in all streams; None: what the mix says."""
        if self.plan.schedule == "constant":
            return self.plan.cross_batch_range
        if self._growth is not None:
            return self._growth.stage
        return self.plan.sizes[int(self._random(_SIZE, step).integers(len(self.plan.sizes)))]

    def observe(self, accuracy: float) -> None:
        """Hear the training accuracy of a step, once per step and the same in all processes; may go to the next size.

        Raises:
            LlamoryError: not an accuracy.
        """
        if self._growth is not None:
            self._growth.observe(accuracy)

    def state_dict(self) -> dict[str, Any]:
        """What the schedule "grown" knows of the steps so far; fit for JSON."""
        return {} if self._growth is None else self._growth.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken.

        Raises:
            LlamoryError: the state is of a plan with more sizes.
        """
        if self._growth is not None:
            self._growth.load_state_dict(state)

    # ---- the rows ----------------------------------------------------------------------------------------------------

    def choose(
        self, step: int, stream: int = 0, input_ids: Tensor | None = None, documents: Tensor | None = None
    ) -> list[list[int]]:
        """The contexts of each row of a batch.

        In a mix, a row sees chunks of its place just before it, nearest first, and then negatives. It gets fewer
        negatives than asked for where fewer rows stand before it in the step's order.

        Args:
            step: of the training, from 0 on.
            stream: which of the step's batches.
            input_ids: (batch, columns) the batch's tokens, for similar negatives.
            documents: (batch,) numbers of the rows' documents; no row sees its own document at another place.

        Raises:
            LlamoryError: tokens or documents that don't fit the batch, or no tokens for similar negatives.
        """
        apart = self._apart(documents)
        size = self.size(step)
        if self.plan.mix is None:
            assert size is not None
            contexts = crossbatch_contexts(self.batch_size, size, self.dataset_packing, self.plan.stepping)
            own = self._place[:, None] == self._place
            return [[other for other in seen if (own | apart)[row, other]] for row, seen in enumerate(contexts)]
        scores = self._similarities(input_ids) if self.plan.negatives == "similar" else None
        random = self._random(_ROWS, step, stream)
        order = self._draw_order(random)
        contexts = []
        for row in range(self.batch_size):
            positives, negatives = self._entry(row, size)
            chunk = row % self.dataset_packing
            before = np.flatnonzero(apart[row] & (order < order[row]))
            if scores is None:
                others = random.choice(before, min(negatives, len(before)), replace=False)
            else:
                others = before[np.argsort(-scores[row, before], kind="stable")][:negatives]
            contexts.append([row - back for back in range(1, min(positives, chunk) + 1)] + others.tolist())
        return contexts

    def weights(self, contexts: Sequence[Sequence[int]], step: int, stream: int = 0) -> list[list[float]] | None:
        """What each of the chosen contexts counts as in the softmax: positives once; None where all do.

        Args:
            contexts: what `choose` gave for this step and stream.
            step: of the training, from 0 on.
            stream: which of the step's batches.
        """
        least, most = self.plan.copies
        if least == most == 1:
            return None
        draws = self._random(_COPIES, step, stream).random(self.batch_size)
        copies = [between((least, most), float(draw)) for draw in draws]
        return [
            [1.0 if self._place[other] == self._place[row] else copies[row] for other in seen]
            for row, seen in enumerate(contexts)
        ]

    def order(self, step: int, stream: int = 0) -> list[int]:
        """Where each row stands in the order of a step's mix: it sees no row behind it. With a range, as they come."""
        if self.plan.mix is None:
            return list(range(self.batch_size))
        return [int(at) for at in self._draw_order(self._random(_ROWS, step, stream))]

    def _draw_order(self, random: np.random.Generator) -> np.ndarray:
        """(batch,) any interleaving of the places is as likely as any other, behind those that see no negatives."""
        numbers = np.sort(random.random((self.batch_size // self.dataset_packing, self.dataset_packing)), axis=1)
        for place, row in enumerate(range(0, self.batch_size, self.dataset_packing)):
            numbers[place] += self._entry(row, None)[1] > 0
        order = np.empty(self.batch_size, dtype=np.int64)
        order[np.argsort(numbers, axis=None, kind="stable")] = np.arange(self.batch_size)
        return order

    def _entry(self, row: int, size: int | None) -> tuple[int, int]:
        """(positives, negatives) of a row."""
        assert self.plan.mix is not None
        places = self.batch_size // self.dataset_packing
        positives, negatives = self.plan.mix[row // self.dataset_packing * len(self.plan.mix) // places]
        return positives, size if negatives and size is not None else negatives

    def _apart(self, documents: Tensor | None) -> np.ndarray:
        """(batch, batch) whether two rows are of different places and documents."""
        apart: np.ndarray = self._place[:, None] != self._place
        if documents is None:
            return apart
        if documents.shape != (self.batch_size,):
            raise LlamoryError(
                f"There are {self.batch_size} rows, but numbers of documents of shape {tuple(documents.shape)}."
            )
        numbers = documents.cpu().numpy()
        different: np.ndarray = apart & (numbers[:, None] != numbers)
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
    """What `ContextChooser` finds similar rows with: any Sentence Transformers model, which isn't trained.

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


def between(copies: tuple[float, float], share: float) -> float:
    """The number that lies so far, from 0 to 1, between the least and the most copies on a logarithmic scale."""
    least, most = copies
    return float(least * (most / least) ** share)


def check_copies(copies: Sequence[float]) -> None:
    """Raise LlamoryError unless these are the least and the most copies of a negative."""
    if len(copies) != 2 or not 0 < copies[0] <= copies[1] < math.inf:
        raise LlamoryError(f"negative_copies must be two numbers above 0, the least and the most, not {list(copies)}.")

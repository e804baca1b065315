"""Citations: the passages whose memory got the most attention, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from llamory.documents import Chunk

_EPSILON = 1e-300


@dataclass(frozen=True)
class Citation:
    """A passage that an answer rests on.

    Attributes:
        location: where it starts, as `path:line`.
        share: of the attention that question and answer drew to all passages in memory, from 0 to 1; attention counts
            as drawn where it is far more than the prompt's own words give (see `llamory.qa.attribution`).
        attention: of all attention that the answer's tokens gave to all passages, drawn or not, from 0 to 1.
        source: the document's source.
        title: title of the part of the document that it stands in.
        line: where it starts, counted from 1.
        text: the passage.
    """

    location: str
    share: float
    attention: float
    source: str
    title: str
    line: int
    text: str


def sum_mass_by_chunk(mass: Tensor, starts: Sequence[int]) -> Tensor:
    """Sum over each passage's tokens.

    Args:
        mass: attention to each token of a document, (kinds, tokens).
        starts: the first token of each passage, rising.

    Returns:
        (passages, kinds).
    """
    import torch

    boundaries = torch.tensor([*starts, mass.shape[1]])
    chunk_index = torch.repeat_interleave(torch.arange(len(starts)), boundaries.diff())
    return torch.zeros(len(starts), len(mass), dtype=mass.dtype).index_add_(0, chunk_index, mass[:, starts[0] :].T)


def cite(passages: Sequence[Chunk], masses: Tensor, limit: int) -> list[Citation]:
    """The passages with the largest shares, largest first; those that drew nothing aren't cited.

    Args:
        passages: all in memory.
        masses: attention to each that was given and that was drawn, (passages, 2).
        limit: so many at most.
    """
    import torch

    attention_mass, baseline_corrected_mass = masses.unbind(1)
    # A model that looks at everything alike draws nothing; then the plain sums are all there is.
    masses = torch.stack(
        [attention_mass, baseline_corrected_mass if float(baseline_corrected_mass.sum()) > 0 else attention_mass], 1
    )
    fractions = masses / masses.sum(0).clamp_min(_EPSILON)
    cited = []
    for index in fractions[:, 1].argsort(descending=True, stable=True)[:limit].tolist():
        attention, share = fractions[index].tolist()
        if share > 0:
            chunk = passages[index]
            cited.append(Citation(chunk.location, share, attention, chunk.source, chunk.title, chunk.line, chunk.text))
    return cited

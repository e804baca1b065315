"""Citations: the passages whose memory got the most attention, and how much of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from llamory.documents import Passage


@dataclass(frozen=True)
class Citation:
    """A passage that an answer rests on.

    Attributes:
        place: where it starts, as `path:line`.
        share: of the attention that the answer's tokens gave to all passages in memory, from 0 to 1.
        source: the document's source.
        title: title of the part of the document that it stands in.
        line: where it starts, counted from 1.
        text: the passage.
    """

    place: str
    share: float
    source: str
    title: str
    line: int
    text: str


def passage_masses(mass: Tensor, starts: Sequence[int]) -> Tensor:
    """Sum over each passage's tokens.

    Args:
        mass: attention to each token of a document, (tokens,).
        starts: the first token of each passage, rising.

    Returns:
        (passages,).
    """
    import torch

    edges = torch.tensor([*starts, len(mass)])
    whose = torch.repeat_interleave(torch.arange(len(starts)), edges.diff())
    return torch.zeros(len(starts), dtype=mass.dtype).index_add_(0, whose, mass[starts[0] :])


def cite(passages: Sequence[tuple[Passage, float]], most: int) -> list[Citation]:
    """The passages with the most attention, most first.

    Args:
        passages: all in memory, with the attention to each.
        most: so many at most.
    """
    total = sum(mass for _, mass in passages)
    ranked = sorted(passages, key=lambda item: -item[1])[:most] if total > 0 else []
    return [Citation(each.place, mass / total, each.source, each.title, each.line, each.text) for each, mass in ranked]

"""Attention over a memory bank: the ways of searching in it, and rows of a batch that share one memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.memory.attention import nothing
from llamory.memory.exact import ExactSearch

if TYPE_CHECKING:
    from llamory.memory.bank import MemoryBank

SEARCHES = ("exact", "pages", "faiss")


class Search(Protocol):
    """A way of attending to a memory."""

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """Attention over all of the bank's tokens of a layer.

        Args:
            query: (rows, heads, queries, head_dim), rows that share this very memory; query head h reads the
                memory's head h // (heads // kv_heads).
            bank: the memory.
            layer: whose memory.
            scaling: what scores are multiplied by.

        Returns:
            Output of the query's shape and type, and the log-sum-exp (rows, heads, queries) in float32.
        """


def make_search(name: str, top_k: int | None = None, *, folder: str | Path | None = None) -> Search:
    """The way of searching that goes by a name.

    Args:
        name: "exact" (reads everything), "pages" (reads the best pages, estimates the rest) or "faiss" (reads the
            nearest neighbours from an index, estimates the rest).
        top_k: pages or neighbours that are read per query and head; a sensible number if none is given.
        folder: where "faiss" keeps its indexes, which are read from there piece by piece; in memory if none is given.

    Raises:
        LlamoryError: there is no such way, or `top_k` isn't positive.
    """
    if top_k is not None and top_k < 1:
        raise LlamoryError(f"mem_top_k is {top_k}, but at least 1 page or neighbour must be read.")
    if name == "exact":
        return ExactSearch()
    if name == "pages":
        from llamory.memory.pages import PagesSearch

        return PagesSearch(top_k)
    if name == "faiss":
        from llamory.memory.faiss_index import FaissSearch

        return FaissSearch(top_k, folder)
    raise LlamoryError(f"There is no way {name!r} to search in memory: choose one of {', '.join(SEARCHES)}.")


def attend(
    query: Tensor, banks: Sequence[MemoryBank], layer: int, scaling: float, search: Search
) -> tuple[Tensor, Tensor]:
    """Attention of a batch over its rows' memories; rows with the same memory are attended together, read once.

    Args:
        query: (batch, heads, queries, head_dim).
        banks: one per row; the same bank, or forks of one, may stand several times.
        layer: whose memory.
        scaling: what scores are multiplied by.
        search: how.

    Returns:
        Output of the query's shape and type, and the log-sum-exp (batch, heads, queries) in float32; 0 and -inf for
        rows whose memory is empty.
    """
    together: dict[tuple, list[int]] = {}
    for row, bank in enumerate(banks):
        spans = tuple((id(span.block), span.start, span.stop) for span in bank.spans(layer))
        together.setdefault(spans, []).append(row)
    if len(together) == 1:
        return search.attend(query, banks[0], layer, scaling)
    output, log_sum = nothing(query)
    for spans, rows in together.items():
        if spans:
            at = torch.tensor(rows, device=query.device)
            output[at], log_sum[at] = search.attend(query[at], banks[rows[0]], layer, scaling)
    return output, log_sum

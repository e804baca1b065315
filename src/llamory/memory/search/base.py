"""The ways of searching in a memory bank, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from llamory.errors import LlamoryError
from llamory.memory.search.exact import ExactSearch

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


def make_search(
    name: str, top_k: int | None = None, *, top_k_attention: bool = False, folder: str | Path | None = None
) -> Search:
    """The way of searching that goes by a name.

    Args:
        name: "exact" (reads everything), "pages" (reads the best pages, estimates the rest) or "faiss" (reads the
            nearest neighbours from an index, estimates the rest).
        top_k: pages or neighbours that are read per query and head; a sensible number if none is given.
        top_k_attention: leave out what isn't among the `top_k` best tokens, as the paper does, instead of estimating it:
            with "exact" all of memory is scanned for them, with "faiss" its indexes.
        folder: where "faiss" keeps its indexes, which are read from there piece by piece; in memory if none is given.

    Raises:
        LlamoryError: there is no such way, `top_k` isn't positive, or pages should be tokens.
    """
    if top_k is not None and top_k < 1:
        raise LlamoryError(f"mem_top_k is {top_k}, but at least 1 page or neighbour must be read.")
    if top_k_attention and name in ("exact", "faiss"):
        from llamory.memory.search.topk import TopKSearch

        return TopKSearch(top_k, indexed=name == "faiss", folder=folder)
    if top_k_attention and name == "pages":
        raise LlamoryError(
            "pages reads whole pages and estimates the others; for the best tokens only use faiss or exact."
        )
    if name == "exact":
        return ExactSearch()
    if name == "pages":
        from llamory.memory.search.pages import PagesSearch

        return PagesSearch(top_k)
    if name == "faiss":
        from llamory.memory.search.faiss import FaissSearch

        return FaissSearch(top_k, folder)
    raise LlamoryError(f"There is no way {name!r} to search in memory: choose one of {', '.join(SEARCHES)}.")

"""Search in memory: which keys each query attends to. One module per search, and the registry of all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llamory.errors import LlamoryError
from llamory.memory.search.base import Search
from llamory.memory.search.exact import ExactSearch
from llamory.memory.search.faiss import FaissSearch
from llamory.memory.search.pages import PagesSearch
from llamory.memory.search.topk import IndexedTopKSearch, TopKSearch

__all__ = ["SEARCHES", "TOP_K_SEARCHES", "Search", "make_search"]

# A new search is one module and one line here; tests/memory/search/test_registry.py then tests it.
SEARCHES: Mapping[str, type[Search]] = {
    "exact": ExactSearch,  # reads everything
    "pages": PagesSearch,  # reads the best pages, estimates the rest
    "faiss": FaissSearch,  # reads the nearest neighbours from an index, estimates the rest
}
# Searches that leave out all but the best `top_k` tokens, as the paper does, by the search that finds these.
TOP_K_SEARCHES: Mapping[str, type[Search]] = {"exact": TopKSearch, "faiss": IndexedTopKSearch}


def make_search(
    name: str, top_k: int | None = None, *, top_k_attention: bool = False, folder: str | Path | None = None
) -> Search:
    """Construct a search by its name, a key of `SEARCHES`.

    Args:
        top_k: pages, neighbours or tokens that are read per query and head; None for the search's default.
        top_k_attention: leave out all but the `top_k` best tokens instead of estimating them.
        folder: where "faiss" stores its indexes, which are then read from disk; None for in memory.

    Raises LlamoryError if there is no such search, `top_k` isn't positive, or the search has no top-k attention.
    """
    if name not in SEARCHES:
        raise LlamoryError(f"There is no memory search {name!r}: choose one of {', '.join(SEARCHES)}.")
    searches = TOP_K_SEARCHES if top_k_attention else SEARCHES
    if name not in searches:
        raise LlamoryError(f"{name} reads whole pages and estimates the rest; for the best tokens use faiss or exact.")
    return searches[name](top_k, folder=folder)

"""A library on disk: add documents, search their passages, and get answers with citations."""

from typing import TYPE_CHECKING, Any

from llamory.library.indexer import AddReport
from llamory.library.library import Library
from llamory.library.search import Hit
from llamory.library.store import Settings

if TYPE_CHECKING:
    from llamory.library.citations import Citation
    from llamory.library.qa import CitedAnswer, LibraryChat

__all__ = ["AddReport", "Citation", "CitedAnswer", "Hit", "Library", "LibraryChat", "Settings"]


def __getattr__(name: str) -> Any:
    # Search needs no LongLLaMA: it is imported with the first of these.
    if name in ("Citation", "CitedAnswer", "LibraryChat"):
        from llamory.library import qa

        return getattr(qa, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

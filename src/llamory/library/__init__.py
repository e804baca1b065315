"""A library on disk: documents go in, the passages that answer a query come out, and answers from their memory."""

from typing import TYPE_CHECKING, Any

from llamory.library.library import Library
from llamory.library.search import Hit
from llamory.library.store import Settings
from llamory.library.update import AddReport

if TYPE_CHECKING:
    from llamory.library.citations import Citation
    from llamory.library.qa import CitedAnswer, LibraryChat

__all__ = ["AddReport", "Citation", "CitedAnswer", "Hit", "Library", "LibraryChat", "Settings"]


def __getattr__(name: str) -> Any:
    # Searching needs no LongLLaMA; it is loaded with the first of these that is asked for.
    if name in ("CitedAnswer", "LibraryChat"):
        from llamory.library import qa as asking

        return getattr(asking, name)
    if name == "Citation":
        from llamory.library import citations as citing

        return citing.Citation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

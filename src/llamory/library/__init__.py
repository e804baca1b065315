"""A library on disk: documents go in, the passages that answer a query come out, and answers from their memory."""

from typing import TYPE_CHECKING, Any

from llamory.library.library import Library
from llamory.library.searching import Hit
from llamory.library.store import Settings
from llamory.library.updating import AddReport

if TYPE_CHECKING:
    from llamory.library.asking import CitedAnswer, LibraryChat
    from llamory.library.citing import Citation

__all__ = ["AddReport", "Citation", "CitedAnswer", "Hit", "Library", "LibraryChat", "Settings"]


def __getattr__(name: str) -> Any:
    # Searching needs no LongLLaMA; it is loaded with the first of these that is asked for.
    if name in ("CitedAnswer", "LibraryChat"):
        from llamory.library import asking

        return getattr(asking, name)
    if name == "Citation":
        from llamory.library import citing

        return citing.Citation
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

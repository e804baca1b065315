"""Documents into memory, and questions to it: what `llamory read` and `llamory ask` do."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamory.reading.asking import Answer, OpenMemory, ask
    from llamory.reading.reading import ReadReport, read_documents_into

__all__ = ["Answer", "OpenMemory", "ReadReport", "ask", "read_documents_into"]


def __getattr__(name: str) -> Any:
    # Importing the package stays cheap: torch is loaded with the first of these that is asked for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in ("ReadReport", "read_documents_into"):
        from llamory.reading import reading

        return getattr(reading, name)
    from llamory.reading import asking

    return getattr(asking, name)

"""A library of passages on disk: documents go in, the passages that answer a query come out."""

from llamory.library.library import AddReport, Library
from llamory.library.store import Hit, Settings

__all__ = ["AddReport", "Hit", "Library", "Settings"]

"""A library of passages on disk: documents go in, the passages that answer a query come out."""

from llamory.library.library import Library
from llamory.library.searching import Hit
from llamory.library.store import Settings
from llamory.library.updating import AddReport

__all__ = ["AddReport", "Hit", "Library", "Settings"]

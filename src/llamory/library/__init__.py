"""A library on disk: add documents, search their passages, and get answers with citations."""

from llamory.library.indexer import AddReport
from llamory.library.library import Library
from llamory.library.search import Hit
from llamory.library.store import Settings

__all__ = ["AddReport", "Hit", "Library", "Settings"]

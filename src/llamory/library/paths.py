"""Where a library keeps what isn't in its table."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llamory.common.locks import local_folder
from llamory.models.base import cache_folder

MEMORY = "memory"


def memory_folder(library: str) -> Path:
    """The folder of a library's memories: in the library, or, where that is an object store, in the local cache."""
    folder = local_folder(library)
    if folder is not None:
        return folder / MEMORY
    return cache_folder() / MEMORY / hashlib.sha256(library.encode()).hexdigest()[:16]

"""Where a library keeps what isn't in its table."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llamory.backbone import cache_folder

MEMORY = "memory"


def memory_folder(library: str) -> Path:
    """The folder of a library's memories: in the library, or, where that is an object store, in the local cache."""
    if "://" not in library:
        return Path(library) / MEMORY
    return cache_folder() / MEMORY / hashlib.sha256(library.encode()).hexdigest()[:16]

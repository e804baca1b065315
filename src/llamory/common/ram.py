"""Detect too little memory early, and raise one clear error."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from llamory.errors import LlamoryError

# Bytes that stay free for other processes: below it Linux starts to kill processes without a message.
RESERVED_BYTES = 256 << 20

_CGROUP = Path("/sys/fs/cgroup")
# Limit, usage, statistics and the entry with reclaimable bytes: of cgroup versions 2 and 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
_OOM_MESSAGES = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "out of memory")


@contextmanager
def translate_oom(advice: str) -> Iterator[None]:
    """Turn out-of-memory errors of Python, torch and the system into one LlamoryError that ends in `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError, LlamoryError) as error:
        # Loading a model raises "its weights can't be read" from the error that says why.
        if not (is_out_of_memory(error) or is_out_of_memory(error.__cause__)):
            raise
        raise LlamoryError(f"The computer has too little memory for this: {advice}") from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error reports that an allocation failed."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _OOM_MESSAGES)


def require_free_ram(size: int) -> None:
    """Raise MemoryError unless `size` more bytes are free: Linux grants more and kills the process later."""
    if available_ram() < size + RESERVED_BYTES:
        raise MemoryError(f"{size} bytes more would leave too little")


def available_ram() -> int:
    """Bytes that this process can still allocate, on this machine and within its container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, used, stat, reclaimable in _CGROUP_FILES:
        try:
            unused = int((_CGROUP / limit).read_text()) - int((_CGROUP / used).read_text())
            entries = dict(line.split() for line in (_CGROUP / stat).read_text().splitlines())
            free = min(free, unused + int(entries.get(reclaimable, 0)))
        except (OSError, ValueError):  # no such cgroup, or "max": no limit
            continue
    return free

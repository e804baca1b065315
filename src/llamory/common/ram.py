"""Too little memory, said in time and in one sentence."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from llamory.errors import LlamoryError

# What is left for everybody else; below it Linux begins to end processes, without a word.
RESERVE = 256 << 20

_GROUP = Path("/sys/fs/cgroup")
_GROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
_SIGNS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc", "out of memory")


@contextmanager
def told_if_memory_is_short(advice: str) -> Iterator[None]:
    """Turn what Python, torch and the system raise for too little memory into one sentence that ends in `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError, LlamoryError) as error:
        # Loading a model says that its weights can't be read, and why.
        if not (is_out_of_memory(error) or is_out_of_memory(error.__cause__)):
            raise
        raise LlamoryError(f"The computer has too little memory for this: {advice}") from error


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that no more memory can be had."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def need(size: int) -> None:
    """Make sure that `size` more bytes can be had.

    Linux gives memory that it hasn't got and later ends the process; so this is asked before it comes to that.

    Raises:
        MemoryError: they can't.
    """
    if available() < size + RESERVE:
        raise MemoryError(f"{size} bytes more would leave too little")


def available() -> int:
    """Bytes that this process can still take, on this machine and within its container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit, used, stat, reclaimable in _GROUP_FILES:
        try:
            room = int((_GROUP / limit).read_text()) - int((_GROUP / used).read_text())
            entries = dict(line.split() for line in (_GROUP / stat).read_text().splitlines())
            free = min(free, room + int(entries.get(reclaimable, 0)))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return free

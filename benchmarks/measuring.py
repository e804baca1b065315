"""What benchmarks measure with: fresh processes, resident memory, and the machine's own speed in the same run."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import multiprocessing
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from llara_step import processor, status_bytes

GIB = 2**30
LARGEST_BUFFER = GIB  # far beyond any cache, so a larger buffer is read no slower
_PRELOADED = ["torch", "transformers", "llamory.longllama.modeling"]

__all__ = ["GIB", "Peak", "available_memory", "in_child", "processor", "product_rate", "read_rate"]


def available_memory() -> int:
    """Bytes that can be taken without swapping."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def in_child(function: Callable[..., dict], *args: Any, threads: int, seconds: float, memory: int) -> dict[str, Any]:
    """Call a function in a fresh process, so that neither peaks nor the allocator's state leak from one to the next.

    Args:
        function: of a module; gives a dictionary.
        args: its arguments.
        threads: threads that torch uses.
        seconds: after so many the process is stopped.
        memory: bytes of its own that the process may take.

    Returns:
        What the function gave, or {"skipped": why} where it ran out of time or memory.

    Raises:
        RuntimeError: it failed otherwise.
    """
    # The server imports everything once and forks; a fork of this process would bring its memory along.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, threads, memory, function, args))
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return {"skipped": f"stopped after {seconds:.0f} s"}
        return receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode != -signal.SIGKILL:
            raise RuntimeError(f"{function.__name__}{args} failed; its process has told why") from None
        return {"skipped": "out of memory"}
    finally:
        process.kill()
        process.join()


def _answer(sender: Connection, threads: int, memory: int, function: Callable[..., dict], args: tuple) -> None:
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    try:
        sender.send(function(*args))
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "alloc" not in str(error):
            raise
        sender.send({"skipped": f"needs more than {memory / GIB:.0f} GiB"})


class Peak:
    """Resident memory at its highest since this was made, above what it was then."""

    def __init__(self) -> None:
        # What was freed but not yet given back would hide as much of what is taken from here on.
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = status_bytes("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Forget how high it was so far."""
        # Where the mark can't be reset, it is that of the process's whole life, which began just before.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """How much it was at most."""
        return max(0, status_bytes("VmHWM") - self.before)


def read_rate(size: int) -> float:
    """Bytes per second when a buffer of this size is read again and again: what fits into a cache is read faster."""
    buffer = torch.ones(max(min(size, LARGEST_BUFFER), 1 << 16) // 4)
    return buffer.nbytes / min(_best_time(buffer.sum), _best_time(buffer.amax))


def product_rate(dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few matrix products."""
    rates = []
    for inner in (256, 576, 1024):
        a, b = torch.randn(2048, inner).to(dtype), torch.randn(inner, 4 * inner).to(dtype)
        rates.append(2 * 2048 * inner * 4 * inner / _best_time(lambda a=a, b=b: a @ b))
    return max(rates)


def _best_time(function: Callable[[], Any], seconds: float = 0.3) -> float:
    times: list[float] = []
    function()
    while sum(times) < seconds or len(times) < 3:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)

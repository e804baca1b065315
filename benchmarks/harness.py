"""What several benchmarks share: fresh processes, memory and speed of the machine, and LongLLaMA as published.

`ReferenceLongLlama` has the weights and the results of `LongLlamaForCausalLM` with exact search, computed as the
published code does it: memory is one tensor per layer, concatenated again at every window, stored in bfloat16 and cast
as a whole at every use; local keys are stored before the rotary embedding, concatenated and rotated again at every
step; all masks are additive; a full local cache goes into memory at once; logits are computed for the whole prompt.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import platform
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import rotate_half

GIB = 2**30
LARGEST_BUFFER = GIB  # far beyond any cache, so a larger buffer is read no slower
_PRELOADED = ["torch", "transformers", "llamory.longllama.modeling"]


def available_memory() -> int:
    """Bytes that are available without swapping."""
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
    """Peak resident memory since construction, above the size at that time."""

    def __init__(self) -> None:
        # What was freed but not yet given back would hide as much of what is taken from here on.
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        self.before = status_bytes("VmRSS")
        self.restart()

    def restart(self) -> None:
        """Reset the peak."""
        # Where the mark can't be reset, it is that of the process's whole life, which began just before.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")

    def bytes(self) -> int:
        """The peak so far."""
        return max(0, status_bytes("VmHWM") - self.before)


def read_rate(size: int) -> float:
    """Bytes per second when a buffer of this size is read repeatedly; one that fits into a cache is faster."""
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


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.machine()


def status_bytes(key: str) -> int:
    """A value of /proc/self/status, such as VmHWM, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


# ---- LongLLaMA as published ------------------------------------------------------------------------------------------

LOWEST_SCORE = -1e6


@dataclass
class CachedKeysValues:
    """Keys, values (batch, kv_heads, tokens, head_dim) and what is added to their scores (batch, 1, tokens, 1)."""

    keys: Tensor
    values: Tensor
    mask: Tensor | None = None


class ReferenceLongLlama:
    """A LLaMA with memory, for batches without padding.

    Args:
        model: a Llama or LongLlama, whose modules are used and whose forward pass isn't.
        mem_layers: the memory layers.
        context: tokens of a window, and the most tokens that the local cache holds.
        last: tokens of a prompt that make the last window.
        mem_dtype: what memory is kept in.
        positionals: whether memory layers rotate queries and keys.
        sdpa: the variant with `scaled_dot_product_attention` (published key `torch_attention`); the default is eager.

    Attributes:
        memory: of each layer that has any.
        local: the local cache of each layer, keys not rotated.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        mem_layers: list[int],
        context: int,
        last: int,
        mem_dtype: torch.dtype = torch.bfloat16,
        positionals: bool = True,
        sdpa: bool = False,
    ):
        self.model, self.mem_layers, self.context, self.last = model, set(mem_layers), context, last
        self.mem_dtype, self.positionals, self.sdpa = mem_dtype, positionals, sdpa
        self.head_dim = model.config.head_dim
        self.groups = model.config.num_attention_heads // model.config.num_key_value_heads
        self.memory: dict[int, CachedKeysValues] = {}
        self.local: dict[int, CachedKeysValues] = {}

    @torch.no_grad()
    def read(self, ids: Tensor, use_cache: bool = True) -> Tensor:
        """Encode a prompt (batch, length) window by window; returns the hidden states (batch, length, hidden)."""
        memory_tokens = max(ids.shape[1] - self.last, 0)
        states = [
            self._forward(ids[:, start : min(start + self.context, memory_tokens)], use_cache=False)
            for start in range(0, memory_tokens, self.context)
        ]
        states.append(self._forward(ids[:, memory_tokens:], use_cache))
        return torch.cat(states, 1)

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """Continue with tokens (batch, n); returns their logits."""
        return self.head(self._forward(ids, use_cache=True))

    @torch.no_grad()
    def head(self, hidden: Tensor) -> Tensor:
        """Logits; the published code asks for those of the whole prompt."""
        return self.model.lm_head(hidden)

    def _forward(self, ids: Tensor, use_cache: bool) -> Tensor:
        hidden = self.model.model.embed_tokens(ids)
        batch, width, past = *ids.shape, 0
        if use_cache and self.local:
            past = self.local[0].keys.shape[2]
        lowest = torch.finfo(hidden.dtype).min
        mask = torch.full((width, past + width), lowest, dtype=hidden.dtype).triu(past + 1)
        mask = mask.expand(batch, 1, -1, -1) + torch.zeros(batch, 1, width, past + width, dtype=hidden.dtype)
        # Memory of the step before is held until the whole step is done.
        memory = dict(self.memory)
        for index, layer in enumerate(self.model.model.layers):
            attention_output = self._attention(index, layer.input_layernorm(hidden), mask, use_cache, memory)
            hidden = hidden + attention_output
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.memory = memory
        return self.model.model.norm(hidden)

    def _attention(
        self, index: int, hidden: Tensor, mask: Tensor, use_cache: bool, memory: dict[int, CachedKeysValues]
    ) -> Tensor:
        layer, width, has_memory = self.model.model.layers[index].self_attn, hidden.shape[1], index in self.mem_layers
        query, key, value = (
            part(hidden).view(*hidden.shape[:2], -1, self.head_dim).transpose(1, 2)
            for part in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        raw_key, local_value = key, value
        if use_cache:
            if index in self.local:
                key = torch.cat([self.local[index].keys, key], 2)
                value = torch.cat([self.local[index].values, value], 2)
                past = key.shape[2] - width
                if key.shape[2] > self.context:
                    if has_memory:
                        self._append_to_memory(index, key[:, :, :past], value[:, :, :past], mask[..., :past], memory)
                    key, value, mask = key[:, :, past:], value[:, :, past:], mask[..., past:]
            self.local[index] = CachedKeysValues(key, value)
        if self.positionals or not has_memory:
            cos, sin = self.model.model.rotary_emb(hidden, torch.arange(key.shape[2])[None])
            query = _rotate(query, cos[:, -width:], sin[:, -width:])
            key = _rotate(key, cos, sin)
        attend = self._sdpa if self.sdpa else self._eager
        output = attend(query, key, value, mask, memory.get(index))
        if has_memory and not use_cache:
            self._append_to_memory(index, raw_key, local_value, mask, memory)
        return layer.o_proj(output.transpose(1, 2).reshape(hidden.shape[0], width, -1))

    def _append_to_memory(
        self, index: int, key: Tensor, value: Tensor, mask: Tensor, memory: dict[int, CachedKeysValues]
    ) -> None:
        """Concatenate a window to a layer's memory. (A rotary embedding leaves keys at position 0 as they are.)"""
        key, value, mask = key.to(self.mem_dtype), value.to(self.mem_dtype), mask[..., -1, :, None]
        if index in memory:
            existing = memory[index]
            assert existing.mask is not None
            key, value, mask = (
                torch.cat(pair, 2) for pair in ((existing.keys, key), (existing.values, value), (existing.mask, mask))
            )
        memory[index] = CachedKeysValues(key, value, mask)

    def _eager(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, memory: CachedKeysValues | None
    ) -> Tensor:
        scores, value = self._scores(query, key, mask), self._repeat_kv(value)
        if memory is not None:
            assert memory.mask is not None
            memory_scores = self._scores(query, memory.keys.to(query.dtype), memory.mask.squeeze(-1).unsqueeze(-2))
            scores = torch.cat([scores, memory_scores], -1)
            value = torch.cat([value, self._repeat_kv(memory.values.to(value.dtype))], 2)
        weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, value)

    def _scores(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        scores = torch.matmul(query, self._repeat_kv(key).transpose(2, 3)) / math.sqrt(self.head_dim)
        scores = scores + mask
        return torch.max(scores, torch.tensor(LOWEST_SCORE, dtype=scores.dtype))

    def _sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, memory: CachedKeysValues | None) -> Tensor:
        if memory is not None:
            assert memory.mask is not None
            key = torch.cat([key, memory.keys.to(key.dtype)], 2)
            value = torch.cat([value, memory.values.to(value.dtype)], 2)
            memory_scores = memory.mask.squeeze(-1).unsqueeze(-2).expand(-1, -1, query.shape[2], -1)
            mask = torch.cat([mask, memory_scores], -1)
        return torch.nn.functional.scaled_dot_product_attention(
            query, self._repeat_kv(key), self._repeat_kv(value), attn_mask=mask
        )

    def _repeat_kv(self, tensor: Tensor) -> Tensor:
        """A key for each query head. (The published code has no grouped queries.)"""
        return tensor if self.groups == 1 else tensor.repeat_interleave(self.groups, 1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return x * cos[:, None] + rotate_half(x) * sin[:, None]

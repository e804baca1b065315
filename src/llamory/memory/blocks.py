"""Blocks of memory: preallocated keys and values of one memory layer, and the spans that segments take of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llamory.errors import LlamoryError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}


def memory_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch type of a memory's dtype ("float32", "bfloat16", "float16", "int8" or the torch type itself).

    Raises:
        LlamoryError: memory can't be kept in that type.
    """
    dtype = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise LlamoryError(f"Memory can't be kept as {name}: choose one of {', '.join(DTYPES)}.")
    return dtype


class Block:
    """Room for `capacity` tokens of one layer's memory, filled from the front and never changed once filled.

    Forks and segments share blocks: what lies before `filled` stays as it is, so nobody's view can change.

    Attributes:
        keys: (kv_heads, capacity, head_dim), contiguous, not rotated (memory keys are at position 0).
        values: (kv_heads, capacity, head_dim), contiguous.
        key_scales, value_scales: (kv_heads, capacity) float32 for int8 memory (number = int8 * scale), else None.
        filled: tokens written so far.
        search_cache: what ways of searching remember of the filled part, each under a name of its own.
    """

    __slots__ = ("__weakref__", "filled", "key_scales", "keys", "search_cache", "value_scales", "values")

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        key_scales: Tensor | None = None,
        value_scales: Tensor | None = None,
        filled: int = 0,
    ):
        self.keys, self.values = keys, values
        self.key_scales, self.value_scales = key_scales, value_scales
        self.filled = filled
        self.search_cache: dict[str, object] = {}

    @classmethod
    def allocate(
        cls, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Block:
        """An empty block; on a CPU its pages take real memory only once they are written."""
        shape = (kv_heads, capacity, head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        if dtype != torch.int8:
            return cls(keys, values)
        key_scales, value_scales = (torch.empty(shape[:2], device=device) for _ in range(2))
        return cls(keys, values, key_scales, value_scales)

    @property
    def capacity(self) -> int:
        """Tokens that fit."""
        return self.keys.shape[1]

    @property
    def free(self) -> int:
        """Tokens that still fit."""
        return self.capacity - self.filled

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Append tokens, converted to the block's type.

        Args:
            keys: (kv_heads, tokens, head_dim) in any floating type, at most `free` tokens.
            values: the same shape.
        """
        start, stop = self.filled, self.filled + keys.shape[1]
        for target, scales, source in (
            (self.keys, self.key_scales, keys),
            (self.values, self.value_scales, values),
        ):
            if scales is None:
                target[:, start:stop].copy_(source)
            else:
                # Symmetric, one scale per token and head: the largest number of the token becomes 127.
                scale = source.abs().amax(-1).float().clamp_min(1e-30) / 127
                scales[:, start:stop].copy_(scale)
                target[:, start:stop].copy_((source.float() / scale.unsqueeze(-1)).round_())
        self.filled = stop

    def append_span(self, span: Span) -> None:
        """Append a span of a block of the same type as it is: int8 keeps its scales."""
        start, stop, block = self.filled, self.filled + len(span), span.block
        for source, target in (
            (block.keys, self.keys),
            (block.values, self.values),
            (block.key_scales, self.key_scales),
            (block.value_scales, self.value_scales),
        ):
            if source is not None and target is not None:
                target[:, start:stop].copy_(source[:, span.start : span.stop])
        self.filled = stop


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` of a block: what a segment owns of it.

    Attributes:
        block: whose tokens.
        start: the first token.
        stop: behind the last token, never past what the block has filled.
    """

    block: Block
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def keys(self, dtype: torch.dtype | None = None) -> Tensor:
        """(kv_heads, tokens, head_dim): a view where no conversion is needed, int8 as float32 if no type is given."""
        return _read(self.block.keys, self.block.key_scales, self.start, self.stop, dtype)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """(kv_heads, tokens, head_dim), as `keys`."""
        return _read(self.block.values, self.block.value_scales, self.start, self.stop, dtype)

    def split(self, tokens: int) -> Iterator[Span]:
        """This span in parts of at most `tokens` tokens."""
        for start in range(self.start, self.stop, tokens):
            yield Span(self.block, start, min(start + tokens, self.stop))


def _read(tensor: Tensor, scales: Tensor | None, start: int, stop: int, dtype: torch.dtype | None) -> Tensor:
    part = tensor[:, start:stop]
    if scales is None:
        return part if dtype is None else part.to(dtype)
    return (part.float() * scales[:, start:stop].unsqueeze(-1)).to(dtype or torch.float32)

"""Blocks of memory (preallocated keys and values of one layer), spans of blocks, and segments made of spans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llamory.errors import LlamoryError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
SMALLEST_BLOCK = 4096
LARGEST_BLOCK = 262144


def memory_dtype(name: str | torch.dtype) -> torch.dtype:
    """The torch type of "float32", "bfloat16", "float16" or "int8"; LlamoryError if memory has no such type."""
    dtype = DTYPES.get(name.removeprefix("torch.")) if isinstance(name, str) else name
    if dtype is None or dtype not in DTYPES.values():
        raise LlamoryError(f"Memory can't be stored as {name}: choose one of {', '.join(DTYPES)}.")
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """ "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@dataclass(slots=True, weakref_slot=True, eq=False)
class Block:
    """Storage for `capacity` tokens of one memory layer, filled from the front; filled tokens never change."""

    keys: Tensor  # (kv_heads, capacity, head_dim), contiguous, not rotated (position 0)
    values: Tensor  # the same shape
    key_scales: Tensor | None = None  # (kv_heads, capacity) float32 for int8 memory: number = int8 * scale
    value_scales: Tensor | None = None
    _: KW_ONLY
    filled: int = 0  # tokens written so far
    checksum: str = ""  # identifies the content of a block read from a file
    search_cache: dict[str, dict[Any, Any]] = field(default_factory=dict)  # of memory searches, by name

    @classmethod
    def allocate(cls, kv_heads: int, capacity: int, head_dim: int, dtype: torch.dtype, device: Any = "cpu") -> Block:
        """An empty block; on a CPU its memory pages are only committed when they are written."""
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

    @property
    def tensors(self) -> list[Tensor]:
        """keys and values, and for int8 memory key_scales and value_scales."""
        tensors = (self.keys, self.values, self.key_scales, self.value_scales)
        return [each for each in tensors if each is not None]

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Append floating keys and values (kv_heads, tokens, head_dim), converted; at most `free` tokens."""
        start, stop = self.filled, self.filled + keys.shape[1]
        for target, scales, source in ((self.keys, self.key_scales, keys), (self.values, self.value_scales, values)):
            if scales is None:
                target[:, start:stop].copy_(source)
            else:
                # Symmetric, one scale per token and head: the largest number of the token becomes 127.
                scale = source.abs().amax(-1).float().clamp_min(1e-30) / 127
                scales[:, start:stop].copy_(scale)
                target[:, start:stop].copy_((source.float() / scale.unsqueeze(-1)).round_())
        self.filled = stop

    def append_span(self, span: Span) -> None:
        """Append a span of a block of the same type without conversion (int8 keeps its scales)."""
        stop = self.filled + len(span)
        for source, target in zip(span.block.tensors, self.tensors, strict=True):
            target[:, self.filled : stop].copy_(source[:, span.start : span.stop])
        self.filled = stop

    def to(self, device: torch.device) -> Block:
        """The filled part on a device; this block itself if it is there already."""
        if self.keys.device == torch.empty(0, device=device).device:
            return self
        return Block(*(each[:, : self.filled].to(device).contiguous() for each in self.tensors), filled=self.filled)


@dataclass(frozen=True)
class Span:
    """Tokens `start` to `stop` (exclusive) of a block, all of them filled."""

    block: Block
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def keys(self, dtype: torch.dtype | None = None) -> Tensor:
        """(kv_heads, tokens, head_dim): a view if no conversion is needed; int8 becomes float32 by default."""
        return self._read(self.block.keys, self.block.key_scales, dtype)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """(kv_heads, tokens, head_dim), as `keys`."""
        return self._read(self.block.values, self.block.value_scales, dtype)

    def split(self, tokens: int) -> Iterator[Span]:
        """This span in parts of at most `tokens` tokens."""
        for start in range(self.start, self.stop, tokens):
            yield Span(self.block, start, min(start + tokens, self.stop))

    def copy_to(self, block: Block, start: int, stop: int) -> None:
        """Append this span's tokens `start` to `stop` to a block of the same type without conversion."""
        block.append_span(Span(self.block, self.start + start, self.start + stop))

    def _read(self, tensor: Tensor, scales: Tensor | None, dtype: torch.dtype | None) -> Tensor:
        part = tensor[:, self.start : self.stop]
        if scales is None:
            return part if dtype is None else part.to(dtype)
        return (part.float() * scales[:, self.start : self.stop].unsqueeze(-1)).to(dtype or torch.float32)


class SpanList(tuple[Span, ...]):
    """All spans of one layer, in order; a bank returns the same object until the layer changes."""

    @cached_property
    def identity(self) -> bytes:
        """Equal for span lists of the same tokens in the same order."""
        return np.array([(id(span.block), span.start, span.stop) for span in self], dtype=np.int64).tobytes()

    @cached_property
    def tokens(self) -> int:
        """Tokens in all spans."""
        return sum(map(len, self))

    @cached_property
    def by_device(self) -> dict[torch.device, SpanList]:
        """The spans on each device."""
        devices = dict.fromkeys(span.block.keys.device for span in self)
        if len(devices) == 1:
            return dict.fromkeys(devices, self)
        return {each: SpanList(span for span in self if span.block.keys.device == each) for each in devices}

    @cached_property
    def derived(self) -> dict[Any, Any]:
        """What searches derive from the spans, by name: once per change of the memory, not once per token."""
        return {}


class SegmentSpan(NamedTuple):
    """Tokens `start` to `stop` (exclusive) of a segment."""

    segment: str
    start: int
    stop: int


@dataclass
class Segment:
    """A segment's spans per layer and its metadata; both are replaced, never changed in place."""

    spans: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def length(self, layer: int) -> int:
        """Tokens in a layer."""
        return sum(map(len, self.spans.get(layer, ())))

    def copy(self) -> Segment:
        """The same content for another bank."""
        return Segment(dict(self.spans), self.metadata)


def slice_spans(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    """The spans of tokens `start` to `stop`, counted over all spans."""
    result, position = [], 0
    for span in spans:
        first, last = max(start - position, 0), min(stop - position, len(span))
        if first < last:
            result.append(Span(span.block, span.start + first, span.start + last))
        position += len(span)
    return result


def merge_spans(spans: Iterable[Span], before: Sequence[Span] = ()) -> list[Span]:
    """`before` and the spans; spans that are adjacent in a block become one."""
    result = list(before)
    for span in spans:
        last = result[-1] if result else None
        if last is not None and last.block is span.block and last.stop == span.start:
            result[-1] = Span(span.block, last.start, span.stop)
        else:
            result.append(span)
    return result


def capacity_for(tokens: int, allocated: int) -> int:
    """Capacity of the next block after `allocated` tokens: the total doubles, up to a limit per block."""
    wanted = max(SMALLEST_BLOCK, allocated, tokens)
    return min(LARGEST_BLOCK, 1 << (wanted - 1).bit_length())


def compact_tail(spans: Sequence[Span], block: Block, tokens: int) -> tuple[Span, ...]:
    """Copy the last spans, each at most twice as long as what follows, into an empty block for `tokens` more tokens."""
    first, size = len(spans), tokens
    for i in reversed(range(len(spans))):
        if size + len(spans[i]) > SMALLEST_BLOCK:
            break
        if len(spans[i]) <= 2 * size:
            first = i
        size += len(spans[i])
    for span in spans[first:]:
        block.append_span(span)
    return (*spans[:first], Span(block, 0, block.filled)) if block.filled else tuple(spans)

"""The memory bank: keys and values of all memory layers, in named segments that share their blocks."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from llamory.common.io import PathLike
from llamory.errors import LlamoryError
from llamory.memory import blocks, files
from llamory.memory.blocks import LARGEST_BLOCK, Block, Segment, SegmentSpan, Span, SpanList, dtype_name, merge_spans

# A segment that can't continue in its block continues in a shared one only if its last span is at least this long:
# many short spans would cost every search a call each.
_LONG_SPAN = 256
_NAMES_SHOWN = 10
# Forks may append to one block from several threads; the capacity check and the write are one step.
_write_lock = threading.Lock()


class MemoryBank:
    """Keys and values of a reader's memory layers, in named, ordered segments (one per document).

    Forks (`copy.deepcopy` makes them too), attached segments and loaded files share preallocated blocks.

    Args:
        layers: indices of the memory layers in the model.
        dtype: "float32", "bfloat16", "float16", or "int8" (one scale per token and head).
        device: where the memory is stored; None for the device of the first keys of each layer.
        fingerprint: identity of the model that computes the memory, "" if unknown.

    Raises LlamoryError if an argument is invalid; in the methods if a layer has no memory or a segment doesn't exist.
    """

    def __init__(
        self,
        layers: Sequence[int],
        kv_heads: int,
        head_dim: int,
        *,
        dtype: str | torch.dtype = "bfloat16",
        device: str | torch.device | None = None,
        fingerprint: str = "",
    ):
        self.layers = tuple(int(layer) for layer in layers)
        if len(set(self.layers)) < len(self.layers) or min(self.layers, default=0) < 0:
            raise LlamoryError(f"Memory layers must be different and not negative, not {_list_layers(self.layers)}.")
        if kv_heads < 1 or head_dim < 1:
            raise LlamoryError(f"A memory needs at least one head of size 1, not {kv_heads} of size {head_dim}.")
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.dtype = blocks.memory_dtype(dtype)
        self.device = None if device is None else torch.device(device)
        self.fingerprint = fingerprint
        self._segments: dict[str, Segment] = {}
        self._lengths = dict.fromkeys(self.layers, 0)
        # Per layer: the block written last, where a new segment starts, and all blocks made here. A fork has neither.
        self._tail_blocks: WeakValueDictionary[int, Block] = WeakValueDictionary()
        self._allocated_blocks: dict[int, WeakSet[Block]] = {layer: WeakSet() for layer in self.layers}
        # Per layer: all spans, and the merged spans of all segments but the last, which is the one that usually grows.
        self._cached_spans: dict[int, SpanList] = {}
        self._cached_prefix_spans: dict[int, list[Span]] = {}

    def __repr__(self) -> str:
        content = f"{len(self._segments)} segments, {self.length():,} tokens, layers {_list_layers(self.layers)}"
        return f"MemoryBank({content}, {dtype_name(self.dtype)})"

    @property
    def segments(self) -> tuple[str, ...]:
        """The segments' names, in order."""
        return tuple(self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens in all layers, scales included, without unused capacity."""
        return sum(self._lengths.values()) * self.token_bytes // max(1, len(self.layers))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers, scales included."""
        scale = torch.float32.itemsize if self.dtype == torch.int8 else 0
        return len(self.layers) * self.kv_heads * 2 * (self.head_dim * self.dtype.itemsize + scale)

    def length(self, layer: int | None = None, segment: str | None = None) -> int:
        """Tokens in a layer (default: the first memory layer), of one segment or of all."""
        if layer is None and not self.layers:
            return 0
        layer = self.layers[0] if layer is None else layer
        self._check_layer(layer)
        return self._lengths[layer] if segment is None else self._segment(segment).length(layer)

    def spans(self, layer: int) -> SpanList:
        """A layer's tokens, segment after segment, as non-empty spans; the same object until the layer changes."""
        if layer not in self._cached_spans:
            self._check_layer(layer)
            *prefix, last = self._segments.values() or [Segment()]
            if layer not in self._cached_prefix_spans:
                self._cached_prefix_spans[layer] = merge_spans(s for each in prefix for s in each.spans.get(layer, ()))
            spans = merge_spans(last.spans.get(layer, ()), self._cached_prefix_spans[layer])
            self._cached_spans[layer] = SpanList(spans)
        return self._cached_spans[layer]

    def keys(self, layer: int, segment: str | None = None) -> Tensor:
        """A copy of a layer's keys, (kv_heads, tokens, head_dim) float32, of one segment or of all."""
        return self._read(layer, segment, Span.keys)

    def values(self, layer: int, segment: str | None = None) -> Tensor:
        """A copy of a layer's values, as `keys`."""
        return self._read(layer, segment, Span.values)

    def metadata(self, segment: str) -> dict[str, Any]:
        """A copy of the metadata that `set_metadata` stored for a segment."""
        return json.loads(json.dumps(self._segment(segment).metadata))

    def append(self, layer: int, keys: Tensor, values: Tensor, segment: str | None = None) -> None:
        """Add tokens at the end of a segment.

        Args:
            keys, values: (kv_heads, tokens, head_dim), floating, not rotated.
            segment: its name; a new one is made at the end. None for the last one, or "context" if there is none.
        """
        self._check_layer(layer)
        self._check_tensors(keys, values)
        if segment is None:
            segment = next(reversed(self._segments), "context")
        if segment not in self._segments:
            self._add(segment, Segment())
        elif segment != next(reversed(self._segments)):
            self._cached_prefix_spans.pop(layer, None)
        self._cached_spans.pop(layer, None)
        target = self._segments[segment]
        keys, values = keys.detach(), values.detach()

        def write(block: Block, start: int, stop: int) -> None:
            block.write(keys[:, start:stop], values[:, start:stop])
            self._lengths[layer] += stop - start

        with _write_lock:
            self._extend(layer, target, keys.shape[1], keys.device, write)

    def attach_copy(
        self,
        other: MemoryBank,
        segment: str,
        *,
        tokens: int | None = None,
        step: int = LARGEST_BLOCK,
        devices: Mapping[int, torch.device] | None = None,
    ) -> None:
        """Attach a copy of another bank's segment, without its metadata, in blocks of this bank, without conversion.

        Args:
            other: a memory of the same layers, heads and dtype.
            segment: its name in both banks; it must be new here. Copies of short segments share blocks.
            tokens: copy only the first ones.
            step: tokens to allocate and copy at a time, as if appended so.
            devices: where each layer's blocks go if this bank has no device; by default where the other's are.
        """
        source, target = other._segment(segment), Segment()
        with _write_lock:
            for layer in self.layers:
                spans, length = source.spans.get(layer, ()), source.length(layer) if tokens is None else tokens
                for start in range(0, length, step):
                    for part in blocks.slice_spans(spans, start, min(start + step, length)):
                        device = part.block.keys.device if devices is None else devices[layer]
                        self._extend(layer, target, len(part), device, part.copy_to)
        self._add(segment, target)

    def _extend(
        self, layer: int, target: Segment, tokens: int, device: torch.device, write: Callable[[Block, int, int], None]
    ) -> None:
        """Add tokens to a segment: `write` gets each block with the numbers of the tokens to append to it."""
        start = 0
        while start < tokens:
            spans, block = self._writable_block(layer, target.spans.get(layer, ()), tokens - start, device)
            first, stop = block.filled, min(tokens, start + block.free)
            write(block, start, stop)
            target.spans[layer] = tuple(merge_spans([Span(block, first, block.filled)], spans))
            self._tail_blocks[layer] = block
            start = stop

    def set_metadata(self, segment: str, **metadata: Any) -> None:
        """Add JSON-serializable metadata of a segment (its source, say); files store them too."""
        target = self._segment(segment)
        try:
            stored = json.loads(json.dumps(metadata, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise LlamoryError(f"Segment metadata must be JSON-serializable: {error}.") from error
        target.metadata = {**target.metadata, **stored}

    def drop(self, segment: str) -> None:
        """Remove a segment; its blocks are freed when no bank uses them any more."""
        dropped = self._segment(segment)
        del self._segments[segment]
        self._clear_caches()
        for layer in self.layers:
            self._lengths[layer] -= dropped.length(layer)

    def rename(self, old: str, new: str) -> None:
        """Rename a segment; its position stays."""
        self.rename_all({old: new})

    def rename_all(self, names: Mapping[str, str]) -> None:
        """Rename segments from old to new names at once, or none (LlamoryError) if a new name is invalid or taken."""
        for old, new in names.items():
            self._segment(old)
            _check_name(new)
        renamed: dict[str, Segment] = {}
        for name, segment in self._segments.items():
            new = names.get(name, name)
            if new in renamed:
                raise LlamoryError(f"The memory already has a segment {new!r}: choose another name, or drop it first.")
            renamed[new] = segment
        self._segments = renamed

    def reorder(self, segments: Sequence[str]) -> None:
        """Change the order of the segments to that of `segments`, which names each of them once."""
        if isinstance(segments, str) or sorted(map(str, segments)) != sorted(self._segments):
            names = _list_names(self.segments)
            raise LlamoryError(f"The new order must name every segment once ({names}), not {_list_names(segments)}.")
        self._segments = {name: self._segments[name] for name in segments}
        self._clear_caches()

    def attach(self, other: MemoryBank, segments: Sequence[str] | None = None) -> None:
        """Add segments of another bank (None: all) at the end, in the order given; blocks are shared.

        A bank of unknown model takes over the other's fingerprint. If the banks differ in model, layers or dtype, or a
        name exists here, LlamoryError is raised and nothing attached.
        """
        names = other.segments if segments is None else tuple(segments)
        subject, heads = "The memory to attach", (self.kv_heads, self.head_dim)
        other.check_compatible(subject, fingerprint=self.fingerprint, heads=heads, layers=self.layers, dtype=self.dtype)
        attached = [other._segment(name).copy() for name in names]
        existing = set(self._segments)
        for name in names:
            if name in existing:
                raise LlamoryError(f"The memory already has a segment {name!r}: rename or drop one of the two.")
            existing.add(name)
        self.fingerprint = self.fingerprint or other.fingerprint
        for name, segment in zip(names, attached, strict=True):
            self._add(name, segment)

    def slice(self, segment_spans: Sequence[SegmentSpan]) -> MemoryBank:
        """A bank of parts of this one's segments, concatenated per segment; it shares blocks and has no metadata."""
        result, segments = self._empty_bank(), dict[str, Segment]()
        for name, start, stop in segment_spans:
            spans, target = self._segment(name).spans, segments.setdefault(name, Segment())
            for layer in self.layers:
                part = blocks.slice_spans(spans.get(layer, ()), start, stop)
                target.spans[layer] = tuple(merge_spans(part, target.spans.get(layer, ())))
        for name, segment in segments.items():
            result._add(name, segment)
        return result

    def fork(self) -> MemoryBank:
        """A bank of the same content that shares all blocks; later changes of either don't affect the other."""
        result = self._empty_bank()
        result._segments = {name: each.copy() for name, each in self._segments.items()}
        result._lengths = dict(self._lengths)
        result._cached_spans, result._cached_prefix_spans = dict(self._cached_spans), dict(self._cached_prefix_spans)
        return result

    def empty_sibling(self) -> MemoryBank:
        """An empty bank that writes into this one's blocks: attached here it takes no more storage."""
        result = self._empty_bank()
        result._tail_blocks, result._allocated_blocks = self._tail_blocks, self._allocated_blocks
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBank:
        return self.fork()

    def to(self, device: str | torch.device) -> MemoryBank:
        """A bank of the same content on a device; blocks that are there already are shared."""
        device = torch.device(device)
        result, moved = self._empty_bank(), dict[Block, Block]()
        result.device = device
        for name, segment in self._segments.items():
            target = Segment(metadata=segment.metadata)
            for layer, spans in segment.spans.items():
                moved |= {span.block: span.block.to(device) for span in spans if span.block not in moved}
                target.spans[layer] = tuple(Span(moved[span.block], span.start, span.stop) for span in spans)
            result._add(name, target)
        return result

    def save(self, path: PathLike) -> None:
        """Write a safetensors file without a second copy in RAM, even over the one loaded; errors as `files.write`."""
        segments = tuple(
            files.StoredSegment(name, tuple(each.length(layer) for layer in self.layers), each.metadata)
            for name, each in self._segments.items()
        )
        dtype = dtype_name(self.dtype)
        header = files.MemoryHeader(self.layers, self.kv_heads, self.head_dim, dtype, self.fingerprint, segments)
        files.write(path, header, self._tensor_chunks)

    @classmethod
    def load(
        cls,
        path: PathLike,
        *,
        fingerprint: str | None = None,
        layers: Sequence[int] | None = None,
        dtype: str | torch.dtype | None = None,
        verify: bool = True,
    ) -> MemoryBank:
        """Map a memory file that `save` wrote; its tokens are read when they are needed, and never written.

        Args:
            fingerprint, layers, dtype: required of the memory, see `check_compatible`.
            verify: compare the checksums of all data (0.1 s per GB in the page cache). The header is always checked.

        Raises LlamoryError if the file is missing, damaged, no memory file, or of another model, layers or dtype.
        """
        file = files.read(path)
        header = file.header
        bank = cls(header.layers, header.kv_heads, header.head_dim, dtype=header.dtype, fingerprint=header.fingerprint)
        required = None if dtype is None else blocks.memory_dtype(dtype)
        bank.check_compatible(f"The memory file {path}", fingerprint=fingerprint, layers=layers, dtype=required)
        if verify:
            file.verify()
        for name, segment in file.segments().items():
            bank._add(name, segment)
        return bank

    def check_compatible(
        self,
        subject: str,
        *,
        fingerprint: str | None = None,
        heads: tuple[int, int] | None = None,
        layers: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Raise LlamoryError unless this memory fits a model or another memory; None or "" matches any.

        `subject` is how the error names this memory, `heads` is (kv_heads, head_dim).
        """
        read_again = "or read the documents again with this model"
        if heads is not None and (self.kv_heads, self.head_dim) != heads:
            problem = f"has {self.kv_heads} key/value heads of size {self.head_dim}, not {heads[0]} of size {heads[1]}"
            raise LlamoryError(f"{subject} {problem}: it belongs to another model.")
        if layers is not None and sorted(self.layers) != sorted(layers):
            problem = f"has the memory layers {_list_layers(self.layers)}, not {_list_layers(layers)}"
            raise LlamoryError(f"{subject} {problem}: use a model with those memory layers, {read_again}.")
        if dtype is not None and self.dtype != dtype:
            stored = dtype_name(self.dtype)
            problem = f"is stored as {stored}, not as {dtype_name(dtype)}: use mem_dtype {stored}"
            raise LlamoryError(f"{subject} {problem}, or read the documents again.")
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            problem = f"was made by another model (fingerprint {self.fingerprint}, not {fingerprint})"
            raise LlamoryError(f"{subject} {problem}: use that model, {read_again}.")

    def _tensor_chunks(self, layer: int, part: str) -> Iterator[Tensor]:
        """A tensor of the file, head by head, as parts of the blocks."""
        for head in range(self.kv_heads):
            for span in self.spans(layer):
                for subspan in span.split(LARGEST_BLOCK):
                    yield getattr(subspan.block, part)[head, subspan.start : subspan.stop]

    def _writable_block(
        self, layer: int, spans: tuple[Span, ...], tokens: int, device: torch.device
    ) -> tuple[tuple[Span, ...], Block]:
        """A block with capacity for a segment's next tokens, and the segment's spans (the last may move into it)."""
        last = spans[-1] if spans else None
        continued_by_another = last is not None and last.stop < last.block.filled
        if last is not None and not continued_by_another and last.block.free:
            return spans, last.block
        tail_block = self._tail_blocks.get(layer)
        if tail_block is not None and tail_block.free and (last is None or len(last) >= _LONG_SPAN):
            return spans, tail_block
        capacity = blocks.capacity_for(tokens, sum(block.capacity for block in self._allocated_blocks[layer]))
        # A tensor made in inference mode could not be written to outside of inference mode.
        with torch.inference_mode(False):
            block = Block.allocate(self.kv_heads, capacity, self.head_dim, self.dtype, self.device or device)
        self._allocated_blocks[layer].add(block)
        return (blocks.compact_tail(spans, block, tokens) if continued_by_another else spans), block

    def _empty_bank(self) -> MemoryBank:
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device, "fingerprint": self.fingerprint}
        return MemoryBank(self.layers, self.kv_heads, self.head_dim, **kind)

    def _add(self, name: str, segment: Segment) -> None:
        _check_name(name)
        self._segments[name] = segment
        self._clear_caches()
        for layer in self.layers:
            self._lengths[layer] += segment.length(layer)

    def _clear_caches(self) -> None:
        self._cached_spans.clear()
        self._cached_prefix_spans.clear()

    def _read(self, layer: int, segment: str | None, read: Callable[[Span, torch.dtype], Tensor]) -> Tensor:
        """(kv_heads, tokens, head_dim); on the CPU if the spans are on several devices."""
        self._check_layer(layer)
        spans = self.spans(layer) if segment is None else self._segment(segment).spans.get(layer, ())
        parts = [read(span, torch.float32) for span in spans]
        if not parts:
            return torch.zeros(self.kv_heads, 0, self.head_dim, device=self.device)
        on_one_device = len({part.device for part in parts}) == 1
        return torch.cat([part if on_one_device else part.cpu() for part in parts], dim=1)

    def _segment(self, name: str) -> Segment:
        try:
            return self._segments[name]
        except (KeyError, TypeError):
            existing = f"it has {_list_names(self.segments)}" if self._segments else "it is empty"
            raise LlamoryError(f"The memory has no segment {name!r}: {existing}.") from None

    def _check_layer(self, layer: int) -> None:
        if layer not in self._lengths:
            raise LlamoryError(f"Layer {layer} has no memory: the memory layers are {_list_layers(self.layers)}.")

    def _check_tensors(self, keys: Tensor, values: Tensor) -> None:
        for name, tensor in (("Keys", keys), ("Values", values)):
            if tensor.dim() != 3 or tensor.shape[0] != self.kv_heads or tensor.shape[2] != self.head_dim:
                shape = f"({self.kv_heads} key/value heads, tokens, {self.head_dim})"
                raise LlamoryError(f"{name} for this memory must be {shape}, not {tuple(tensor.shape)}.")
            if not tensor.is_floating_point():
                raise LlamoryError(f"{name} for a memory must be floating numbers, not {dtype_name(tensor.dtype)}.")
        tokens = keys.shape[1], values.shape[1]
        if tokens[0] != tokens[1]:
            raise LlamoryError(f"Keys and values must be of the same tokens, not of {tokens[0]} and {tokens[1]}.")


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise LlamoryError(f"A segment's name must be a text that isn't empty, not {name!r}.")


def _list_layers(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _list_names(names: Sequence[str]) -> str:
    listed = ", ".join(map(repr, names[:_NAMES_SHOWN]))
    return f"{listed} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else listed or "none"

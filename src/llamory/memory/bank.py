"""The memory bank: keys and values of all memory layers, in named segments that share their blocks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import torch
from torch import Tensor

from llamory.common.io import PathLike
from llamory.errors import LlamoryError
from llamory.memory import files
from llamory.memory.blocks import (
    LARGEST_BLOCK,
    Block,
    Segment,
    SegmentSpan,
    Span,
    SpanList,
    capacity_for,
    compact_tail,
    dtype_name,
    memory_dtype,
    merge_spans,
    slice_spans,
)

DEFAULT_SEGMENT = "context"

# A segment that can't continue in its block continues in a shared one only if its last span is at least this long:
# many short spans would cost every search a call each.
_LONG_SPAN = 256
_NAMES_SHOWN = 10
# Forks may append to one block from several threads; the capacity check and the write are one step.
_write_lock = threading.Lock()


class MemoryBank:
    """Keys and values of a reader's memory layers, in named, ordered segments (one per document).

    Appending writes into preallocated blocks that double in size and never moves tokens (except the short spans of
    forks of forks). Forks, attached segments and loaded files share blocks; `copy.deepcopy` of a bank is a fork.

    Args:
        layers: indices of the memory layers in the model.
        kv_heads: key/value heads of the model.
        head_dim: size of a head.
        dtype: storage type: "float32", "bfloat16", "float16", or "int8" (one scale per token and head).
        device: where the memory is stored; None for the device of the first keys of each layer.
        fingerprint: identity of the model that computes the memory, "" if unknown.

    Attributes:
        layers, kv_heads, head_dim, fingerprint: as given; the layers as a tuple.
        dtype, device: as given, as torch types.

    Raises:
        LlamoryError: a layer is repeated or negative, a size isn't positive, or the dtype is unknown.
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
        self.dtype = memory_dtype(dtype)
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
        return (
            f"MemoryBank({len(self._segments)} segments, {self.length():,} tokens, "
            f"layers {_list_layers(self.layers)}, {dtype_name(self.dtype)})"
        )

    # ---- queries -----------------------------------------------------------------------------------------------------

    @property
    def segments(self) -> tuple[str, ...]:
        """The segments' names, in order."""
        return tuple(self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens in all layers, scales included; unused capacity doesn't count."""
        return sum(self._lengths.values()) * self.token_bytes // max(1, len(self.layers))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers, scales included."""
        scale = torch.float32.itemsize if self.dtype == torch.int8 else 0
        return len(self.layers) * self.kv_heads * 2 * (self.head_dim * self.dtype.itemsize + scale)

    def length(self, layer: int | None = None, segment: str | None = None) -> int:
        """Tokens in a layer (default: the first memory layer), of one segment or of all.

        Raises:
            LlamoryError: the layer has no memory, or there is no such segment.
        """
        if layer is None:
            if not self.layers:
                return 0
            layer = self.layers[0]
        self._check_layer(layer)
        return self._lengths[layer] if segment is None else self._segment(segment).length(layer)

    def spans(self, layer: int) -> SpanList:
        """A layer's tokens, segment after segment, as non-empty spans; the same object until the layer changes.

        Raises:
            LlamoryError: the layer has no memory.
        """
        if layer not in self._cached_spans:
            self._check_layer(layer)
            *prefix, last = self._segments.values() or [Segment()]
            if layer not in self._cached_prefix_spans:
                self._cached_prefix_spans[layer] = merge_spans(s for each in prefix for s in each.spans.get(layer, ()))
            spans = merge_spans(last.spans.get(layer, ()), self._cached_prefix_spans[layer])
            self._cached_spans[layer] = SpanList(spans)
        return self._cached_spans[layer]

    def keys(self, layer: int, segment: str | None = None) -> Tensor:
        """A copy of a layer's keys, (kv_heads, tokens, head_dim) float32, of one segment or of all.

        Raises:
            LlamoryError: the layer has no memory, or there is no such segment.
        """
        return self._concat([span.keys(torch.float32) for span in self._spans_of(layer, segment)])

    def values(self, layer: int, segment: str | None = None) -> Tensor:
        """A copy of a layer's values, as `keys`."""
        return self._concat([span.values(torch.float32) for span in self._spans_of(layer, segment)])

    def metadata(self, segment: str) -> dict[str, Any]:
        """A copy of the metadata that `set_metadata` stored for a segment.

        Raises:
            LlamoryError: there is no such segment.
        """
        return json.loads(json.dumps(self._segment(segment).metadata))

    # ---- changes -----------------------------------------------------------------------------------------------------

    def append(self, layer: int, keys: Tensor, values: Tensor, segment: str | None = None) -> None:
        """Add tokens at the end of a segment.

        Args:
            layer: a memory layer.
            keys: (kv_heads, tokens, head_dim), floating, not rotated; converted to the memory's dtype and device.
            values: the same shape.
            segment: its name; a new one is made at the end. None for the last one, or "context" if there is none.

        Raises:
            LlamoryError: the layer has no memory, or the tensors don't have the memory's shape.
        """
        self._check_layer(layer)
        self._check_tensors(keys, values)
        if segment is None:
            segment = next(reversed(self._segments), DEFAULT_SEGMENT)
        if segment not in self._segments:
            self._add(segment, Segment())
        elif segment != next(reversed(self._segments)):
            self._cached_prefix_spans.pop(layer, None)
        self._cached_spans.pop(layer, None)
        target = self._segments[segment]
        keys, values = keys.detach(), values.detach()
        written, tokens = 0, keys.shape[1]
        with _write_lock:
            while written < tokens:
                spans, block = self._writable_block(layer, target.spans.get(layer, ()), tokens - written, keys.device)
                stop, first = min(tokens, written + block.free), block.filled
                block.write(keys[:, written:stop], values[:, written:stop])
                target.spans[layer] = tuple(merge_spans([Span(block, first, block.filled)], spans))
                self._tail_blocks[layer] = block
                self._lengths[layer] += stop - written
                written = stop

    def attach_copy(
        self,
        other: MemoryBank,
        segment: str,
        *,
        tokens: int | None = None,
        step: int = LARGEST_BLOCK,
        devices: Mapping[int, torch.device] | None = None,
    ) -> None:
        """Attach a copy of another bank's segment in this bank's own blocks, without conversion: int8 keeps its scales.

        Copies of short segments share blocks. Metadata isn't copied.

        Args:
            other: a memory of the same layers, heads and dtype.
            segment: its name in both banks; it must be new here.
            tokens: copy only the first ones.
            step: tokens to allocate and copy at a time, as if appended so.
            devices: where each layer's blocks go if this bank has no device; by default where the other's are.
        """
        source, target = other._segment(segment), Segment()
        with _write_lock:
            for layer in self.layers:
                spans, length = source.spans.get(layer, ()), source.length(layer) if tokens is None else tokens
                for start in range(0, length, step):
                    for part in slice_spans(spans, start, min(start + step, length)):
                        device = part.block.keys.device if devices is None else devices[layer]
                        self._copy_span(layer, target, part, device)
        self._add(segment, target)

    def _copy_span(self, layer: int, target: Segment, part: Span, device: torch.device) -> None:
        start = part.start
        while start < part.stop:
            spans, block = self._writable_block(layer, target.spans.get(layer, ()), part.stop - start, device)
            first, stop = block.filled, min(part.stop, start + block.free)
            block.append_span(Span(part.block, start, stop))
            target.spans[layer] = tuple(merge_spans([Span(block, first, block.filled)], spans))
            self._tail_blocks[layer] = block
            start = stop

    def set_metadata(self, segment: str, **metadata: Any) -> None:
        """Add metadata of a segment (its source, say); files store them too.

        Raises:
            LlamoryError: there is no such segment, or a value isn't JSON-serializable.
        """
        target = self._segment(segment)
        try:
            stored = json.loads(json.dumps(metadata, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise LlamoryError(f"Segment metadata must be JSON-serializable: {error}.") from error
        target.metadata = {**target.metadata, **stored}

    def drop(self, segment: str) -> None:
        """Remove a segment; its blocks are freed when no bank uses them any more.

        Raises:
            LlamoryError: there is no such segment.
        """
        dropped = self._segment(segment)
        del self._segments[segment]
        self._clear_caches()
        for layer in self.layers:
            self._lengths[layer] -= dropped.length(layer)

    def rename(self, old: str, new: str) -> None:
        """Rename a segment; its position stays.

        Raises:
            LlamoryError: as `rename_all`.
        """
        self.rename_all({old: new})

    def rename_all(self, names: Mapping[str, str]) -> None:
        """Rename several segments at once; names may be swapped, and positions stay.

        Args:
            names: new name for each old one.

        Raises:
            LlamoryError: an old name doesn't exist, or a new one is invalid or used twice. Nothing changes then.
        """
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
        """Change the order of the segments.

        Args:
            segments: all names, each once.

        Raises:
            LlamoryError: a name is missing, repeated or unknown.
        """
        if isinstance(segments, str) or sorted(map(str, segments)) != sorted(self._segments):
            raise LlamoryError(
                f"The new order must name every segment once ({_list_names(self.segments)}), "
                f"not {_list_names(segments)}."
            )
        self._segments = {name: self._segments[name] for name in segments}
        self._clear_caches()

    def attach(self, other: MemoryBank, segments: Sequence[str] | None = None) -> None:
        """Add segments of another bank at the end. Blocks are shared, and the other bank stays as it is.

        Args:
            other: a memory of the same model, layers and dtype. A bank of unknown model takes over its fingerprint.
            segments: names, in the order wanted; None for all.

        Raises:
            LlamoryError: the other memory doesn't fit, lacks such a segment, or a name exists here. Nothing is
                attached then.
        """
        names = other.segments if segments is None else tuple(segments)
        other.check_compatible(
            "The memory to attach",
            fingerprint=self.fingerprint,
            heads=(self.kv_heads, self.head_dim),
            layers=self.layers,
            dtype=self.dtype,
        )
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
        """A bank of parts of this one's segments, which shares its blocks; it has no metadata.

        Args:
            segment_spans: (segment, start, stop) each; those of one segment are concatenated.

        Raises:
            LlamoryError: there is no such segment.
        """
        result, segments = self._empty_bank(self.device), dict[str, Segment]()
        for name, start, stop in segment_spans:
            spans, target = self._segment(name).spans, segments.setdefault(name, Segment())
            for layer in self.layers:
                part = slice_spans(spans.get(layer, ()), start, stop)
                target.spans[layer] = tuple(merge_spans(part, target.spans.get(layer, ())))
        for name, segment in segments.items():
            result._add(name, segment)
        return result

    def fork(self) -> MemoryBank:
        """A bank of the same content that shares all blocks; later changes of either don't affect the other."""
        result = self._empty_bank(self.device)
        result._segments = {name: each.copy() for name, each in self._segments.items()}
        result._lengths = dict(self._lengths)
        result._cached_spans, result._cached_prefix_spans = dict(self._cached_spans), dict(self._cached_prefix_spans)
        return result

    def empty_sibling(self) -> MemoryBank:
        """An empty bank that writes into this one's blocks, behind their tokens.

        Once attached here it takes no more storage; an independent bank per document would start a block per document.
        """
        result = self._empty_bank(self.device)
        result._tail_blocks, result._allocated_blocks = self._tail_blocks, self._allocated_blocks
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBank:
        return self.fork()

    def to(self, device: str | torch.device) -> MemoryBank:
        """A bank of the same content on a device; blocks that are there already are shared."""
        device = torch.device(device)
        blocks = {span.block for each in self._segments.values() for spans in each.spans.values() for span in spans}
        moved = {block: block.to(device) for block in blocks}
        result = self._empty_bank(device)
        for name, segment in self._segments.items():
            spans = {
                layer: tuple(Span(moved[span.block], span.start, span.stop) for span in each)
                for layer, each in segment.spans.items()
            }
            result._add(name, Segment(spans, segment.metadata))
        return result

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: PathLike) -> None:
        """Write the memory to a safetensors file, atomically and without a second copy in RAM.

        The path may be the file that this memory was loaded from. A missing folder is made.

        Raises:
            LlamoryError: the path is a folder.
            OSError: the file can't be written; the old file stays.
        """
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
        """Map a memory file; its tokens are read when they are needed, and never written.

        Args:
            path: a file that `save` wrote.
            fingerprint: of the model that will use it; None, and "" here or in the file, match any.
            layers: that model's memory layers; None matches any.
            dtype: storage type required; None matches any.
            verify: compare the checksums of all data (0.1 s per GB in the page cache). The header is always checked.

        Raises:
            LlamoryError: the file is missing, damaged, no memory file, or of another model, layers or dtype.
        """
        file = files.read(path)
        header = file.header
        bank = cls(header.layers, header.kv_heads, header.head_dim, dtype=header.dtype, fingerprint=header.fingerprint)
        required = None if dtype is None else memory_dtype(dtype)
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
        """Check that this memory fits a model or another memory; None (for the fingerprint also "") matches any.

        Args:
            subject: how the error names this memory.
            fingerprint, layers, dtype: what they must be.
            heads: what (kv_heads, head_dim) must be.

        Raises:
            LlamoryError: one of them differs.
        """
        if heads is not None and (self.kv_heads, self.head_dim) != heads:
            raise LlamoryError(
                f"{subject} has {self.kv_heads} key/value heads of size {self.head_dim}, not {heads[0]} of size "
                f"{heads[1]}: it belongs to another model."
            )
        if layers is not None and sorted(self.layers) != sorted(layers):
            raise LlamoryError(
                f"{subject} has the memory layers {_list_layers(self.layers)}, not {_list_layers(layers)}: "
                "use a model with those memory layers, or read the documents again with this model."
            )
        if dtype is not None and self.dtype != dtype:
            raise LlamoryError(
                f"{subject} is stored as {dtype_name(self.dtype)}, not as {dtype_name(dtype)}: "
                f"use mem_dtype {dtype_name(self.dtype)}, or read the documents again."
            )
        if self.fingerprint and fingerprint and self.fingerprint != fingerprint:
            raise LlamoryError(
                f"{subject} was made by another model (fingerprint {self.fingerprint}, not {fingerprint}): "
                "use that model, or read the documents again with this model."
            )

    def _tensor_chunks(self, layer: int, part: str) -> Iterator[Tensor]:
        """A tensor of the file, head by head, as parts of the blocks."""
        for head in range(self.kv_heads):
            for span in self.spans(layer):
                for subspan in span.split(LARGEST_BLOCK):
                    yield getattr(subspan.block, part)[head, subspan.start : subspan.stop]

    # ---- internals ---------------------------------------------------------------------------------------------------

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
        capacity = capacity_for(tokens, allocated=sum(block.capacity for block in self._allocated_blocks[layer]))
        # A tensor made in inference mode could not be written to outside of inference mode.
        with torch.inference_mode(False):
            block = Block.allocate(self.kv_heads, capacity, self.head_dim, self.dtype, self.device or device)
        self._allocated_blocks[layer].add(block)
        return (compact_tail(spans, block, tokens) if continued_by_another else spans), block

    def _empty_bank(self, device: torch.device | None) -> MemoryBank:
        return MemoryBank(
            self.layers, self.kv_heads, self.head_dim, dtype=self.dtype, device=device, fingerprint=self.fingerprint
        )

    def _add(self, name: str, segment: Segment) -> None:
        _check_name(name)
        self._segments[name] = segment
        self._clear_caches()
        for layer in self.layers:
            self._lengths[layer] += segment.length(layer)

    def _clear_caches(self) -> None:
        self._cached_spans.clear()
        self._cached_prefix_spans.clear()

    def _spans_of(self, layer: int, segment: str | None) -> Sequence[Span]:
        if segment is None:
            return self.spans(layer)
        self._check_layer(layer)
        return self._segment(segment).spans.get(layer, ())

    def _concat(self, parts: Sequence[Tensor]) -> Tensor:
        """(kv_heads, tokens, head_dim) of all parts; on the CPU if they are on several devices."""
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
                raise LlamoryError(
                    f"{name} for this memory must be ({self.kv_heads} key/value heads, tokens, {self.head_dim}), "
                    f"not {tuple(tensor.shape)}."
                )
            if not tensor.is_floating_point():
                raise LlamoryError(f"{name} for a memory must be floating numbers, not {dtype_name(tensor.dtype)}.")
        if keys.shape[1] != values.shape[1]:
            raise LlamoryError(
                f"Keys and values must be of the same tokens, not of {keys.shape[1]} and {values.shape[1]}."
            )


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise LlamoryError(f"A segment's name must be a text that isn't empty, not {name!r}.")


def _list_layers(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers)) or "none"


def _list_names(names: Sequence[str]) -> str:
    listed = ", ".join(map(repr, names[:_NAMES_SHOWN]))
    return f"{listed} and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else listed or "none"

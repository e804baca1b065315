"""The memory bank: keys and values of all memory layers, in named segments that share their blocks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.memory import checks, files
from llamory.memory.blocks import Block, Span, memory_dtype
from llamory.memory.segments import (
    LARGEST_BLOCK,
    Segment,
    SegmentSpan,
    block_to_device,
    capacity_for,
    compact_tail,
    concat_tokens,
    merge_spans,
    segments_from_file,
    slice_spans,
)

DEFAULT_SEGMENT = "context"

# A segment that was cut off from its block starts anew in a shared one only if what it has is at least this long:
# many short spans would cost every search a call each.
_LONG_SPAN = 256
# Forks may append to one block from several threads; the check for room and the write belong together.
_write_lock = threading.Lock()


class MemoryBank:
    """The memory of a long reader: tensors only, in named segments (one per document) whose order can be chosen.

    Appending writes into preallocated blocks that double in size, so nothing that was written is copied again (but for
    short segment_spans that forks of forks cut off, which are compact_tail). Forks, attached segments and
    loaded files share blocks, which never change where they are filled; `copy.deepcopy` of a bank is therefore a fork.

    Args:
        layers: the memory layers' numbers in the model.
        kv_heads: key/value heads of the model.
        head_dim: size of a head.
        dtype: what the memory is kept as: "float32", "bfloat16", "float16", or "int8" (with one scale per token and
            head).
        device: where the memory is kept; None for where the keys of a layer are when its first block is made.
        fingerprint: identity of the model that makes the memory, "" if unknown.

    Attributes:
        layers, kv_heads, head_dim, fingerprint: as given; the layers as a tuple.
        dtype, device: as given, as torch's types.

    Raises:
        LlamoryError: a layer is given twice or negative, a size isn't positive, or the dtype is none of these.
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
            raise LlamoryError(
                f"Memory layers must be different and not negative, not {checks.format_layers(self.layers)}."
            )
        if kv_heads < 1 or head_dim < 1:
            raise LlamoryError(f"A memory needs at least one head of size 1, not {kv_heads} of size {head_dim}.")
        self.kv_heads, self.head_dim = kv_heads, head_dim
        self.dtype = memory_dtype(dtype)
        self.device = None if device is None else torch.device(device)
        self.fingerprint = fingerprint
        self._segments: dict[str, Segment] = {}
        self._lengths = dict.fromkeys(self.layers, 0)
        # Per layer: the block that was written last, where a new segment starts, and all blocks made here. A fork has
        # neither: it may go on where a segment ends in its block, and else makes small room of its own.
        self._tail_blocks: dict[int, Block] = {}
        self._allocated_blocks: dict[int, WeakSet[Block]] = {layer: WeakSet() for layer in self.layers}
        # Per layer, the merge_spans spans of all segments but the last, which is the one that usually grows.
        self._cached_prefix_spans: dict[int, list[Span]] = {}

    def __repr__(self) -> str:
        kind = checks.dtype_name(self.dtype)
        return (
            f"MemoryBank({len(self._segments)} segments, {self.length():,} tokens, "
            f"layers {checks.format_layers(self.layers)}, {kind})"
        )

    # ---- looking -----------------------------------------------------------------------------------------------------

    @property
    def segments(self) -> tuple[str, ...]:
        """The segments' names, in order."""
        return tuple(self._segments)

    @property
    def nbytes(self) -> int:
        """Bytes of all tokens in all layers, scales included; room that isn't filled doesn't count."""
        scale = torch.float32.itemsize if self.dtype == torch.int8 else 0
        return sum(self._lengths.values()) * self.kv_heads * 2 * (self.head_dim * self.dtype.itemsize + scale)

    def length(self, layer: int | None = None, segment: str | None = None) -> int:
        """How many tokens a layer (the first memory layer if none is given) holds, of one segment or of all.

        Raises:
            LlamoryError: the layer has no memory, or there is no such segment.
        """
        if layer is None:
            if not self.layers:
                return 0
            layer = self.layers[0]
        self._check_layer(layer)
        return self._lengths[layer] if segment is None else self._segment(segment).length(layer)

    def spans(self, layer: int) -> list[Span]:
        """All of a layer's tokens, segment after segment; what lies side by side in a block is one span, none is empty.

        Raises:
            LlamoryError: the layer has no memory.
        """
        self._check_layer(layer)
        if not self._segments:
            return []
        *prefix, last = self._segments.values()
        if layer not in self._cached_prefix_spans:
            self._cached_prefix_spans[layer] = merge_spans(
                span for each in prefix for span in each.spans.get(layer, ())
            )
        return merge_spans(last.spans.get(layer, ()), self._cached_prefix_spans[layer])

    def keys(self, layer: int, segment: str | None = None) -> Tensor:
        """A layer's keys as float32, for looking: (kv_heads, tokens, head_dim), a copy, of one segment or of all.

        Raises:
            LlamoryError: the layer has no memory, or there is no such segment.
        """
        return concat_tokens(
            [self._empty_tensor(), *(span.keys(torch.float32) for span in self._spans_of(layer, segment))]
        )

    def values(self, layer: int, segment: str | None = None) -> Tensor:
        """A layer's values, as `keys`."""
        return concat_tokens(
            [self._empty_tensor(), *(span.values(torch.float32) for span in self._spans_of(layer, segment))]
        )

    def metadata(self, segment: str) -> dict[str, Any]:
        """The metadata that `set_metadata` stored of a segment, as a copy.

        Raises:
            LlamoryError: there is no such segment.
        """
        return json.loads(json.dumps(self._segment(segment).metadata))

    # ---- changing ----------------------------------------------------------------------------------------------------

    def append(self, layer: int, keys: Tensor, values: Tensor, segment: str | None = None) -> None:
        """Add tokens at the end of a segment.

        Args:
            layer: a memory layer.
            keys: (kv_heads, tokens, head_dim), floating, not rotated; converted to the memory's dtype and device.
            values: the same shape.
            segment: which; made at the end if it is new. None for the last one, or "context" if there is none.

        Raises:
            LlamoryError: the layer has no memory, or the tensors aren't of the memory's shape.
        """
        self._check_layer(layer)
        checks.check_tensors(keys, values, self.kv_heads, self.head_dim)
        if segment is None:
            segment = next(reversed(self._segments), DEFAULT_SEGMENT)
        if segment not in self._segments:
            self._add(segment, Segment())
        elif segment != next(reversed(self._segments)):
            self._cached_prefix_spans.pop(layer, None)
        target = self._segments[segment]
        keys, values = keys.detach(), values.detach()
        done, tokens = 0, keys.shape[1]
        with _write_lock:
            while done < tokens:
                spans, block = self._writable_block(layer, target.spans.get(layer, ()), tokens - done, keys.device)
                start, stop = done, min(tokens, done + block.free)
                first = block.filled
                block.write(keys[:, start:stop], values[:, start:stop])
                target.spans[layer] = tuple(merge_spans([Span(block, first, block.filled)], spans))
                self._tail_blocks[layer] = block
                self._lengths[layer] += stop - start
                done = stop

    def set_metadata(self, segment: str, **metadata: Any) -> None:
        """Note metadata of a segment (its source, say) that are kept with it, in files too.

        Raises:
            LlamoryError: there is no such segment, or a fact isn't something that JSON can hold.
        """
        target = self._segment(segment)
        try:
            stored = json.loads(json.dumps(metadata, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise LlamoryError(
                f"Facts of a segment must be what JSON can hold (text, numbers, lists, dictionaries): {error}."
            ) from error
        target.metadata = {**target.metadata, **stored}

    def drop(self, segment: str) -> None:
        """Take a segment out; its blocks are freed when nobody else has a part of them.

        Raises:
            LlamoryError: there is no such segment.
        """
        dropped = self._segment(segment)
        del self._segments[segment]
        self._cached_prefix_spans.clear()
        for layer in self.layers:
            self._lengths[layer] -= dropped.length(layer)
            if not any(span.block is self._tail_blocks.get(layer) for span in self._spans_of(layer)):
                self._tail_blocks.pop(layer, None)

    def rename(self, old: str, new: str) -> None:
        """Give a segment another name; its place stays.

        Raises:
            LlamoryError: there is no segment of the old name, or another one of the new name.
        """
        self._segment(old)
        checks.check_name(new)
        if new != old and new in self._segments:
            raise LlamoryError(f"The memory already has a segment {new!r}: choose another name, or drop it first.")
        self._segments = {new if name == old else name: each for name, each in self._segments.items()}

    def reorder(self, segments: Sequence[str]) -> None:
        """Put the segments in another order.

        Args:
            segments: all names, each once.

        Raises:
            LlamoryError: a name is missing, given twice or unknown.
        """
        if isinstance(segments, str) or sorted(map(str, segments)) != sorted(self._segments):
            raise LlamoryError(
                f"The new order must name every segment once ({checks.format_names(self.segments)}), "
                f"not {checks.format_names(segments)}."
            )
        self._segments = {name: self._segments[name] for name in segments}
        self._cached_prefix_spans.clear()

    def attach(self, other: MemoryBank, segments: Sequence[str] | None = None) -> None:
        """Take over segments of another bank, at the end; nothing is copied, and the other bank keeps them too.

        Args:
            other: a memory of the same model, layers and dtype. If this bank doesn't know its model, it takes over
                the other's fingerprint.
            segments: which, in this order; None for all.

        Raises:
            LlamoryError: the other memory is of another kind, doesn't have such a segment, or has one whose name is
                taken here. Nothing is attached then.
        """
        names = other.segments if segments is None else tuple(segments)
        what = "The memory to attach"
        checks.check_fingerprint(what, other.fingerprint, self.fingerprint)
        checks.check_heads(what, (other.kv_heads, other.head_dim), (self.kv_heads, self.head_dim))
        checks.check_layers(what, other.layers, self.layers)
        checks.check_dtype(what, other.dtype, self.dtype)
        attached = [other._segment(name).copy() for name in names]
        duplicates = [name for i, name in enumerate(names) if name in self._segments or name in names[:i]]
        if duplicates:
            raise LlamoryError(
                f"The memory already has a segment {duplicates[0]!r}: rename one of the two, or drop the one that is there."
            )
        self.fingerprint = self.fingerprint or other.fingerprint
        for name, segment in zip(names, attached, strict=True):
            self._add(name, segment)

    def slice(self, segment_spans: Sequence[SegmentSpan]) -> MemoryBank:
        """A bank with segment_spans of this one's segments, whose blocks it shares.

        Args:
            segment_spans: which tokens of which segments, (segment, start, stop). Several of one segment are put together;
                the segments' metadata, which are of all their tokens, are left out.

        Raises:
            LlamoryError: there is no such segment.
        """
        result, segments = self._empty_bank(self.device), dict[str, Segment]()
        for name, start, stop in segment_spans:
            spans, target = self._segment(name).spans, segments.setdefault(name, Segment())
            for layer in self.layers:
                target.spans[layer] = tuple(
                    merge_spans(slice_spans(spans.get(layer, ()), start, stop), target.spans.get(layer, ()))
                )
        for name, segment in segments.items():
            result._add(name, segment)
        return result

    def fork(self) -> MemoryBank:
        """A bank of the same content that shares all blocks; what is done to either isn't seen by the other."""
        result = self._empty_bank(self.device)
        result._segments = {name: each.copy() for name, each in self._segments.items()}
        result._lengths = dict(self._lengths)
        return result

    def empty_sibling(self) -> MemoryBank:
        """An empty bank that writes into this one's blocks, behind all that is there.

        Mounted here it takes no more room; in a bank of its own each document would begin a block of its own, most of
        which stays empty.
        """
        result = self._empty_bank(self.device)
        result._tail_blocks, result._allocated_blocks = self._tail_blocks, self._allocated_blocks
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBank:
        return self.fork()

    def to(self, device: str | torch.device) -> MemoryBank:
        """A bank of the same content that is kept on a device; blocks that are there already are shared."""
        device = torch.device(device)
        blocks = {span.block for each in self._segments.values() for spans in each.spans.values() for span in spans}
        on_device = {block: block_to_device(block, device) for block in blocks}
        result = self._empty_bank(device)
        for name, segment in self._segments.items():
            spans = {
                layer: tuple(Span(on_device[span.block], span.start, span.stop) for span in each)
                for layer, each in segment.spans.items()
            }
            result._add(name, Segment(spans, segment.metadata))
        return result

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path: files.PathLike) -> None:
        """Write the memory to a safetensors file, without a second copy of it in RAM.

        It is written beside and renamed, so that a kill at any moment leaves the old file or the new one; the path may
        be the one that this very memory was loaded from. A missing folder is made.

        Raises:
            LlamoryError: the path is a folder.
            OSError: the file can't be written (no permission, a full disk); the old file is as it was.
        """
        segments = tuple(
            files.StoredSegment(name, tuple(each.length(layer) for layer in self.layers), each.metadata)
            for name, each in self._segments.items()
        )
        kind = checks.dtype_name(self.dtype)
        contents = files.MemoryHeader(self.layers, self.kv_heads, self.head_dim, kind, self.fingerprint, segments)
        files.write(path, contents, self._tensor_chunks)

    @classmethod
    def load(
        cls,
        path: files.PathLike,
        *,
        fingerprint: str | None = None,
        layers: Sequence[int] | None = None,
        dtype: str | torch.dtype | None = None,
        verify: bool = True,
    ) -> MemoryBank:
        """Map a memory file; its tokens are read from it when they are needed, and never written.

        Args:
            path: a file that `save` wrote.
            fingerprint: of the model that will use it; None, and "" here or in the file, fit any.
            layers: that model's memory layers; None fits any.
            dtype: what the memory must be kept as; None fits any.
            verify: compare the checksums of all data (0.1 s per GB that lies in the page cache). The header is always
                checked.

        Raises:
            LlamoryError: there is no such file, it isn't a memory file, it is damaged or cut short, or it was made by
                another model, with other memory layers or another dtype than those given.
        """
        file = files.read(path)
        contents = file.contents
        what = f"The memory file {path}"
        checks.check_fingerprint(what, contents.fingerprint, fingerprint)
        if layers is not None:
            checks.check_layers(what, contents.layers, layers)
        if dtype is not None:
            checks.check_dtype(what, memory_dtype(contents.dtype), memory_dtype(dtype))
        if verify:
            file.verify()
        bank = cls(
            contents.layers,
            contents.kv_heads,
            contents.head_dim,
            dtype=contents.dtype,
            fingerprint=contents.fingerprint,
        )
        for name, segment in segments_from_file(file).items():
            bank._add(name, segment)
        return bank

    def _tensor_chunks(self, layer: int, part: str) -> Iterator[Tensor]:
        """A part of all blocks, as one tensor's elements follow one another: head by head."""
        for head in range(self.kv_heads):
            for span in self.spans(layer):
                for subspan in span.split(LARGEST_BLOCK):
                    yield getattr(subspan.block, part)[head, subspan.start : subspan.stop]

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _writable_block(
        self, layer: int, spans: tuple[Span, ...], tokens: int, device: torch.device
    ) -> tuple[tuple[Span, ...], Block]:
        """A block with room for a segment's next tokens, and the segment's spans, the last ones maybe block_to_device into it."""
        last = spans[-1] if spans else None
        tail_shared = last is not None and last.stop < last.block.filled
        if last is not None and not tail_shared and last.block.free:
            return spans, last.block
        tail_block = self._tail_blocks.get(layer)
        if tail_block is not None and tail_block.free and (last is None or len(last) >= _LONG_SPAN):
            return spans, tail_block
        capacity = capacity_for(tokens, allocated=sum(block.capacity for block in self._allocated_blocks[layer]))
        # A tensor made in inference mode could not be written to outside of inference mode.
        with torch.inference_mode(False):
            block = Block.allocate(self.kv_heads, capacity, self.head_dim, self.dtype, self.device or device)
        self._allocated_blocks[layer].add(block)
        return (compact_tail(spans, block, tokens) if tail_shared else spans), block

    def _empty_bank(self, device: torch.device | None) -> MemoryBank:
        return MemoryBank(
            self.layers, self.kv_heads, self.head_dim, dtype=self.dtype, device=device, fingerprint=self.fingerprint
        )

    def _add(self, name: str, segment: Segment) -> None:
        checks.check_name(name)
        self._segments[name] = segment
        self._cached_prefix_spans.clear()
        for layer in self.layers:
            self._lengths[layer] += segment.length(layer)

    def _spans_of(self, layer: int, segment: str | None = None) -> list[Span]:
        if segment is None:
            return self.spans(layer)
        self._check_layer(layer)
        return list(self._segment(segment).spans.get(layer, ()))

    def _empty_tensor(self) -> Tensor:
        return torch.zeros(self.kv_heads, 0, self.head_dim, device=self.device)

    def _segment(self, name: str) -> Segment:
        try:
            return self._segments[name]
        except (KeyError, TypeError):
            existing = f"it has {checks.format_names(self.segments)}" if self._segments else "it is empty"
            raise LlamoryError(f"The memory has no segment {name!r}: {existing}.") from None

    def _check_layer(self, layer: int) -> None:
        if layer not in self._lengths:
            raise LlamoryError(
                f"Layer {layer} has no memory: the memory layers are {checks.format_layers(self.layers)}."
            )

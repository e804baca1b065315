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
    Piece,
    Segment,
    capacity_for,
    concatenated,
    gathered,
    joined,
    moved,
    sliced,
    stored_segments,
)

DEFAULT_SEGMENT = "context"

# A segment that was cut off from its block starts anew in a shared one only if what it has is at least this long:
# many short spans would cost every search a call each.
_LONG_SPAN = 256
# Forks may append to one block from several threads; the check for room and the write belong together.
_writing = threading.Lock()


class MemoryBank:
    """The memory of a long reader: tensors only, in named segments (one per document) whose order can be chosen.

    Appending writes into preallocated blocks that double in size, so nothing that was written is copied again (but for
    short pieces that forks of forks cut off, which are gathered). Forks, mounted segments and
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
            raise LlamoryError(f"Memory layers must be different and not negative, not {checks.numbers(self.layers)}.")
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
        self._tails: dict[int, Block] = {}
        self._made: dict[int, WeakSet[Block]] = {layer: WeakSet() for layer in self.layers}
        # Per layer, the joined spans of all segments but the last, which is the one that usually grows.
        self._settled: dict[int, list[Span]] = {}

    def __repr__(self) -> str:
        kind = checks.dtype_name(self.dtype)
        return (
            f"MemoryBank({len(self._segments)} segments, {self.length():,} tokens, "
            f"layers {checks.numbers(self.layers)}, {kind})"
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
        *settled, last = self._segments.values()
        if layer not in self._settled:
            self._settled[layer] = joined(span for each in settled for span in each.spans.get(layer, ()))
        return joined(last.spans.get(layer, ()), self._settled[layer])

    def keys(self, layer: int, segment: str | None = None) -> Tensor:
        """A layer's keys as float32, for looking: (kv_heads, tokens, head_dim), a copy, of one segment or of all.

        Raises:
            LlamoryError: the layer has no memory, or there is no such segment.
        """
        return concatenated([self._nothing(), *(span.keys(torch.float32) for span in self._spans_of(layer, segment))])

    def values(self, layer: int, segment: str | None = None) -> Tensor:
        """A layer's values, as `keys`."""
        return concatenated([self._nothing(), *(span.values(torch.float32) for span in self._spans_of(layer, segment))])

    def describe(self, segment: str) -> dict[str, Any]:
        """The facts that `annotate` noted of a segment, as a copy.

        Raises:
            LlamoryError: there is no such segment.
        """
        return json.loads(json.dumps(self._segment(segment).facts))

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
            self._settled.pop(layer, None)
        target = self._segments[segment]
        keys, values = keys.detach(), values.detach()
        done, tokens = 0, keys.shape[1]
        with _writing:
            while done < tokens:
                spans, block = self._room(layer, target.spans.get(layer, ()), tokens - done, keys.device)
                start, stop = done, min(tokens, done + block.free)
                first = block.filled
                block.write(keys[:, start:stop], values[:, start:stop])
                target.spans[layer] = tuple(joined([Span(block, first, block.filled)], spans))
                self._tails[layer] = block
                self._lengths[layer] += stop - start
                done = stop

    def annotate(self, segment: str, **facts: Any) -> None:
        """Note facts of a segment (its source, say) that are kept with it, in files too.

        Raises:
            LlamoryError: there is no such segment, or a fact isn't something that JSON can hold.
        """
        target = self._segment(segment)
        try:
            noted = json.loads(json.dumps(facts, allow_nan=False))
        except (TypeError, ValueError, RecursionError) as error:
            raise LlamoryError(
                f"Facts of a segment must be what JSON can hold (text, numbers, lists, dictionaries): {error}."
            ) from error
        target.facts = {**target.facts, **noted}

    def drop(self, segment: str) -> None:
        """Take a segment out; its blocks are freed when nobody else has a part of them.

        Raises:
            LlamoryError: there is no such segment.
        """
        dropped = self._segment(segment)
        del self._segments[segment]
        self._settled.clear()
        for layer in self.layers:
            self._lengths[layer] -= dropped.length(layer)
            if not any(span.block is self._tails.get(layer) for span in self._spans_of(layer)):
                self._tails.pop(layer, None)

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
                f"The new order must name every segment once ({checks.quoted(self.segments)}), "
                f"not {checks.quoted(segments)}."
            )
        self._segments = {name: self._segments[name] for name in segments}
        self._settled.clear()

    def mount(self, other: MemoryBank, segments: Sequence[str] | None = None) -> None:
        """Take over segments of another bank, at the end; nothing is copied, and the other bank keeps them too.

        Args:
            other: a memory of the same model, layers and dtype. If this bank doesn't know its model, it takes over
                the other's fingerprint.
            segments: which, in this order; None for all.

        Raises:
            LlamoryError: the other memory is of another kind, doesn't have such a segment, or has one whose name is
                taken here. Nothing is mounted then.
        """
        names = other.segments if segments is None else tuple(segments)
        what = "The memory to mount"
        checks.check_fingerprint(what, other.fingerprint, self.fingerprint)
        checks.check_heads(what, (other.kv_heads, other.head_dim), (self.kv_heads, self.head_dim))
        checks.check_layers(what, other.layers, self.layers)
        checks.check_dtype(what, other.dtype, self.dtype)
        mounted = [other._segment(name).copy() for name in names]
        taken = [name for i, name in enumerate(names) if name in self._segments or name in names[:i]]
        if taken:
            raise LlamoryError(
                f"The memory already has a segment {taken[0]!r}: rename one of the two, or drop the one that is there."
            )
        self.fingerprint = self.fingerprint or other.fingerprint
        for name, segment in zip(names, mounted, strict=True):
            self._add(name, segment)

    def excerpt(self, pieces: Sequence[Piece]) -> MemoryBank:
        """A bank with pieces of this one's segments, whose blocks it shares.

        Args:
            pieces: which tokens of which segments, (segment, start, stop). Several of one segment are put together;
                the segments' facts, which are of all their tokens, are left out.

        Raises:
            LlamoryError: there is no such segment.
        """
        twin, segments = self._empty(self.device), dict[str, Segment]()
        for name, start, stop in pieces:
            spans, target = self._segment(name).spans, segments.setdefault(name, Segment())
            for layer in self.layers:
                target.spans[layer] = tuple(
                    joined(sliced(spans.get(layer, ()), start, stop), target.spans.get(layer, ()))
                )
        for name, segment in segments.items():
            twin._add(name, segment)
        return twin

    def fork(self) -> MemoryBank:
        """A bank of the same content that shares all blocks; what is done to either isn't seen by the other."""
        twin = self._empty(self.device)
        twin._segments = {name: each.copy() for name, each in self._segments.items()}
        twin._lengths = dict(self._lengths)
        return twin

    def beside(self) -> MemoryBank:
        """An empty bank that writes into this one's blocks, behind all that is there.

        Mounted here it takes no more room; in a bank of its own each document would begin a block of its own, most of
        which stays empty.
        """
        twin = self._empty(self.device)
        twin._tails, twin._made = self._tails, self._made
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryBank:
        return self.fork()

    def to(self, device: str | torch.device) -> MemoryBank:
        """A bank of the same content that is kept on a device; blocks that are there already are shared."""
        device = torch.device(device)
        blocks = {span.block for each in self._segments.values() for spans in each.spans.values() for span in spans}
        there = {block: moved(block, device) for block in blocks}
        twin = self._empty(device)
        for name, segment in self._segments.items():
            spans = {
                layer: tuple(Span(there[span.block], span.start, span.stop) for span in each)
                for layer, each in segment.spans.items()
            }
            twin._add(name, Segment(spans, segment.facts))
        return twin

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
            files.StoredSegment(name, tuple(each.length(layer) for layer in self.layers), each.facts)
            for name, each in self._segments.items()
        )
        kind = checks.dtype_name(self.dtype)
        contents = files.Contents(self.layers, self.kv_heads, self.head_dim, kind, self.fingerprint, segments)
        files.write(path, contents, self._pieces)

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
        for name, segment in stored_segments(file).items():
            bank._add(name, segment)
        return bank

    def _pieces(self, layer: int, part: str) -> Iterator[Tensor]:
        """A part of all blocks, as one tensor's elements follow one another: head by head."""
        for head in range(self.kv_heads):
            for span in self.spans(layer):
                for piece in span.parts(LARGEST_BLOCK):
                    yield getattr(piece.block, part)[head, piece.start : piece.stop]

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _room(
        self, layer: int, spans: tuple[Span, ...], tokens: int, device: torch.device
    ) -> tuple[tuple[Span, ...], Block]:
        """A block with room for a segment's next tokens, and the segment's spans, the last ones maybe moved into it."""
        last = spans[-1] if spans else None
        cut_off = last is not None and last.stop < last.block.filled
        if last is not None and not cut_off and last.block.free:
            return spans, last.block
        tail = self._tails.get(layer)
        if tail is not None and tail.free and (last is None or len(last) >= _LONG_SPAN):
            return spans, tail
        capacity = capacity_for(tokens, made=sum(block.capacity for block in self._made[layer]))
        # A tensor made in inference mode could not be written to outside of inference mode.
        with torch.inference_mode(False):
            block = Block.allocate(self.kv_heads, capacity, self.head_dim, self.dtype, self.device or device)
        self._made[layer].add(block)
        return (gathered(spans, block, tokens) if cut_off else spans), block

    def _empty(self, device: torch.device | None) -> MemoryBank:
        return MemoryBank(
            self.layers, self.kv_heads, self.head_dim, dtype=self.dtype, device=device, fingerprint=self.fingerprint
        )

    def _add(self, name: str, segment: Segment) -> None:
        checks.check_name(name)
        self._segments[name] = segment
        self._settled.clear()
        for layer in self.layers:
            self._lengths[layer] += segment.length(layer)

    def _spans_of(self, layer: int, segment: str | None = None) -> list[Span]:
        if segment is None:
            return self.spans(layer)
        self._check_layer(layer)
        return list(self._segment(segment).spans.get(layer, ()))

    def _nothing(self) -> Tensor:
        return torch.zeros(self.kv_heads, 0, self.head_dim, device=self.device)

    def _segment(self, name: str) -> Segment:
        try:
            return self._segments[name]
        except (KeyError, TypeError):
            there = f"it has {checks.quoted(self.segments)}" if self._segments else "it is empty"
            raise LlamoryError(f"The memory has no segment {name!r}: {there}.") from None

    def _check_layer(self, layer: int) -> None:
        if layer not in self._lengths:
            raise LlamoryError(f"Layer {layer} has no memory: the memory layers are {checks.numbers(self.layers)}.")

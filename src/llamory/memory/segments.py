"""What a segment owns: spans of blocks per layer, and how lists of spans are merge_spans, extended, compact_tail and block_to_device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llamory.memory.blocks import Block, Span
from llamory.memory.files import MemoryFile, tensor_name

SMALLEST_BLOCK = 4096
LARGEST_BLOCK = 262144


@dataclass
class Segment:
    """A segment's tokens per layer and what is known of it; spans and metadata are replaced, never changed in place."""

    spans: dict[int, tuple[Span, ...]] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def length(self, layer: int) -> int:
        """How many tokens it has in a layer."""
        return sum(map(len, self.spans.get(layer, ())))

    def copy(self) -> Segment:
        """The same content, for another bank; both may append to theirs."""
        return Segment(dict(self.spans), self.metadata)


class SegmentSpan(NamedTuple):
    """Tokens `start` to `stop` (not included) of a segment."""

    segment: str
    start: int
    stop: int


def slice_spans(spans: Iterable[Span], start: int, stop: int) -> list[Span]:
    """The spans of tokens `start` to `stop` of all that the spans hold."""
    result, at = [], 0
    for span in spans:
        first, last = max(start - at, 0), min(stop - at, len(span))
        if first < last:
            result.append(Span(span.block, span.start + first, span.start + last))
        at += len(span)
    return result


def merge_spans(spans: Iterable[Span], before: Sequence[Span] = ()) -> list[Span]:
    """One span for those that lie side by side in a block, all in order; `before` is merge_spans already."""
    result = list(before)
    for span in spans:
        last = result[-1] if result else None
        if last is not None and last.block is span.block and last.stop == span.start:
            result[-1] = Span(span.block, last.start, span.stop)
        else:
            result.append(span)
    return result


def segments_from_file(file: MemoryFile) -> dict[str, Segment]:
    """A file's segments over its tensors: one full block per layer, so that many documents are one span."""
    layers = file.contents.layers
    blocks, starts = {}, dict.fromkeys(layers, 0)
    for layer in layers:
        keys, values = (file.tensors[tensor_name(layer, part)] for part in ("keys", "values"))
        key_scales, value_scales = (file.tensors.get(tensor_name(layer, f"{part}_scales")) for part in ("key", "value"))
        blocks[layer] = Block(keys, values, key_scales, value_scales, filled=keys.shape[1])
    segments = {}
    for stored in file.contents.segments:
        segment = segments[stored.name] = Segment(metadata=stored.metadata)
        for layer, tokens in zip(layers, stored.tokens, strict=True):
            if tokens:
                segment.spans[layer] = (Span(blocks[layer], starts[layer], starts[layer] + tokens),)
                starts[layer] += tokens
    return segments


def concat_tokens(parts: Sequence[Tensor]) -> Tensor:
    """(kv_heads, tokens, head_dim) of all parts; on the CPU where they are in several devices."""
    filled = [part for part in parts if part.shape[1]] or list(parts)
    devices = {part.device for part in filled}
    return torch.cat([part if len(devices) == 1 else part.cpu() for part in filled], dim=1)


def capacity_for(tokens: int, allocated: int) -> int:
    """How large the next block is if `allocated` tokens of room were allocated before: the room doubles, up to a limit."""
    wanted = max(SMALLEST_BLOCK, allocated, tokens)
    return min(LARGEST_BLOCK, 1 << (wanted - 1).bit_length())


def compact_tail(spans: Sequence[Span], block: Block, tokens: int) -> tuple[Span, ...]:
    """Move short spans at the end into an empty block where `tokens` more will follow them.

    A span moves with all behind it if it is at most twice as long as they are together, so a segment that is cut off
    from its block at every step (forks of forks, as in a beam search) has few spans all the same, and a token is
    copied a few times at most.
    """
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


def block_to_device(block: Block, device: torch.device) -> Block:
    """The filled part of a block on a device: the block itself if it is moved_tensors already."""
    if block.keys.device == torch.empty(0, device=device).device:
        return block
    parts = (block.keys, block.values, block.key_scales, block.value_scales)
    moved_tensors = [None if part is None else part[:, : block.filled].to(device).contiguous() for part in parts]
    assert moved_tensors[0] is not None and moved_tensors[1] is not None
    return Block(moved_tensors[0], moved_tensors[1], moved_tensors[2], moved_tensors[3], filled=block.filled)

"""Positions of the passages, prompts and slots of a batch, found once from the token ids for all layers and losses.

A batch's real tokens are concatenated ("flat"); a passage with its prompts is a segment. In a segment with both
prompts, the prediction block is its tail: it must not attend to the summary block (Li et al. 2023, section 3.2). All
but the tails is causal, so fused kernels can compute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from llamory.llara.template import LlaraTemplate


@dataclass(frozen=True)
class SegmentLengths:
    """Lengths in tokens of a segment's parts: visible to the tail, the summary block, the tail."""

    shared: int
    summary: int
    tail: int

    @property
    def main(self) -> int:
        """Tokens with causal attention."""
        return self.shared + self.summary

    @property
    def total(self) -> int:
        """All tokens of the segment."""
        return self.shared + self.summary + self.tail


@dataclass(frozen=True)
class SequenceLayout:
    """The structure of a batch. N real tokens, S segments; all tensors lie on the input's device."""

    shape: tuple[int, int]  # (batch, length) of the input
    index: Tensor  # (N,) index of each real token in the flattened input
    position_ids: Tensor  # (N,) rotary position of each token
    segment_ids: Tensor  # (N,) the segment of each token
    segments: tuple[SegmentLengths, ...]
    summarize_slots: Tensor  # (blocks, slots) flat index of each slot
    summarize_segments: Tensor  # (blocks,) the segment of each prompt with its slots
    predict_slots: Tensor
    predict_segments: Tensor

    @property
    def has_tail(self) -> bool:
        """Whether any segment has both prompts, so that causal attention would be wrong."""
        return any(segment.tail for segment in self.segments)

    @property
    def is_packed(self) -> bool:
        """Whether a row holds more than one segment."""
        return len(self.segments) > self.shape[0]

    @property
    def has_blocks(self) -> bool:
        """Whether there is any prompt with slots."""
        return bool(self.summarize_slots.shape[0] or self.predict_slots.shape[0])

    @cached_property
    def runs(self) -> tuple[tuple[SegmentLengths, int], ...]:
        """Runs of neighbouring segments of equal lengths, each with their number; one attention call per run."""
        return tuple((lengths, len(list(run))) for lengths, run in groupby(self.segments))

    @cached_property
    def offsets(self) -> Tensor:
        """(S,) flat index of each segment's first token."""
        totals = self.lengths("total")
        return totals.cumsum(0) - totals

    def lengths(self, part: str) -> Tensor:
        """(S,) one of the lengths of each segment, such as "main"."""
        return torch.tensor([getattr(s, part) for s in self.segments], dtype=torch.long, device=self.index.device)

    def pad(self, flat: Tensor) -> Tensor:
        """Scatter flat values (N, ...) to the input's shape (batch, length, ...), zeros at padding."""
        padded = flat.new_zeros(self.shape[0] * self.shape[1], *flat.shape[1:])
        return padded.index_copy(0, self.index, flat).view(*self.shape, *flat.shape[1:])

    def flatten(self, padded: Tensor) -> Tensor:
        """Select the real tokens (N, ...) of a tensor of the input's shape (batch, length, ...)."""
        return padded.flatten(0, 1).index_select(0, self.index)

    def visible(self) -> Tensor:
        """(batch, 1, length, length), true where a query may attend to a key: the plain reference, quadratic."""
        tail_start = (self.offsets + self.lengths("main"))[self.segment_ids]
        summary_start = (self.offsets + self.lengths("shared"))[self.segment_ids]
        order = torch.arange(self.index.shape[0], device=self.index.device)
        in_tail = order >= tail_start
        in_summary = (order >= summary_start) & ~in_tail
        flat = torch.stack([self.segment_ids + 1, order, in_tail.long(), in_summary.long()], dim=-1)
        segment, order, in_tail, in_summary = self.pad(flat).unbind(-1)
        same = segment[:, :, None] == segment[:, None, :]
        causal = order[:, :, None] >= order[:, None, :]
        masked = in_tail.bool()[:, :, None] & in_summary.bool()[:, None, :]
        return (same & causal & ~masked)[:, None]


def find_layout(
    input_ids: Tensor,
    template: LlaraTemplate | None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> SequenceLayout:
    """Find segments, prompts and slots of a batch.

    Passages packed into one row are separated where `position_ids` restart at 0 or, without `position_ids`, where the
    template's prefix follows the slots of the passage before. Rotary positions count from a segment's first token (or
    are those of `position_ids`), and the tail restarts at the position of the summary block.

    Args:
        template: None if there are no prompts.
        attention_mask: (batch, length), 0 at padding on either side; None if every token is real.
        position_ids: (batch or 1, length) rotary positions.
    """
    device, shape = input_ids.device, (int(input_ids.shape[0]), int(input_ids.shape[1]))
    # All structure is computed on the host: one copy, no synchronization per row.
    real = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.cpu() != 0
    index = real.flatten().nonzero().squeeze(1)
    flat = input_ids.cpu().flatten()[index]
    rows = index // shape[1]
    real_positions = None if position_ids is None else position_ids.cpu().expand(shape).flatten()[index]

    starts = torch.ones_like(flat, dtype=torch.bool)
    starts[1:] = rows[1:] != rows[:-1]
    if template is None:
        summary_starts = predict_starts = flat.new_zeros(0)
        summary_length = predict_length = 0
    else:
        summary_length, predict_length = len(template.summarize_block_ids), len(template.predict_block_ids)
        summary_starts = _find_blocks(flat, rows, template.summarize_block_ids, len(template.summarize_prompt_ids))
        predict_starts = _find_blocks(flat, rows, template.predict_block_ids, len(template.predict_prompt_ids))
    if real_positions is not None:
        restarts = torch.zeros_like(starts)
        restarts[1:] = real_positions[1:] <= real_positions[:-1]
        restarts[predict_starts] = False
        starts |= restarts | (real_positions == 0).index_fill(0, predict_starts, False)
    elif template is not None:
        # A prompt may begin like the prefix: a block that follows a block starts no passage.
        after = torch.cat([summary_starts + summary_length, predict_starts + predict_length])
        after = after[~torch.isin(after, torch.cat([summary_starts, predict_starts]))]
        starts[after[_matches(flat, rows, after, template.prefix_ids)]] = True

    segment_ids = starts.long().cumsum(0) - 1
    totals = torch.bincount(segment_ids)
    offsets = totals.cumsum(0) - totals
    summary_segments, predict_segments = segment_ids[summary_starts], segment_ids[predict_starts]

    # Per segment: starts of its summary block and, if that comes first, of its tail; its end where there are none.
    ends = offsets + totals
    shared_end, tail_start = ends.clone(), ends.clone()
    shared_end[summary_segments] = summary_starts
    tail_start[predict_segments] = predict_starts
    has_both = (shared_end < tail_start) & (tail_start < ends)
    masked = has_both if template is None or not template.prediction_sees_summary else torch.zeros_like(has_both)
    shared = torch.where(masked, shared_end - offsets, totals)
    main = torch.where(masked, tail_start - offsets, totals)
    parts = torch.stack([shared, main - shared, totals - main], dim=1)
    segments = tuple(SegmentLengths(*lengths) for lengths in parts.tolist())

    order = torch.arange(len(flat))
    positions = order - offsets[segment_ids] if real_positions is None else real_positions.long().clone()
    in_tail = has_both[segment_ids] & (order >= tail_start[segment_ids])
    restart = positions[shared_end.clamp(max=len(flat) - 1)][segment_ids]
    positions = torch.where(in_tail, restart + order - tail_start[segment_ids], positions)

    slots = torch.arange(-template.slots, 0) if template else torch.arange(0)
    return SequenceLayout(
        shape=shape,
        index=index.to(device),
        position_ids=positions.to(device),
        segment_ids=segment_ids.to(device),
        segments=segments,
        summarize_slots=((summary_starts + summary_length)[:, None] + slots).to(device),
        summarize_segments=summary_segments.to(device),
        predict_slots=((predict_starts + predict_length)[:, None] + slots).to(device),
        predict_segments=predict_segments.to(device),
    )


def _find_blocks(flat: Tensor, rows: Tensor, block: tuple[int, ...], prompt_length: int) -> Tensor:
    """Flat index of the first token of each complete prompt with its slots."""
    candidates = (flat == block[prompt_length]).nonzero().squeeze(1) - prompt_length
    return candidates[_matches(flat, rows, candidates, block)]


def _matches(flat: Tensor, rows: Tensor, starts: Tensor, pattern: tuple[int, ...]) -> Tensor:
    """(starts,) whether the ids from an index on are the pattern, all within one row."""
    if not len(starts):
        return torch.zeros(0, dtype=torch.bool)
    window = starts[:, None] + torch.arange(len(pattern))
    inside = (window >= 0) & (window < len(flat))
    window = window.clamp(0, len(flat) - 1)
    same_row = rows[window] == rows[window[:, -1:]]
    return (inside & same_row & (flat[window] == torch.tensor(pattern))).all(1)

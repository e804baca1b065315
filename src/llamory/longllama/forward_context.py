"""What the layers need to know of the step that they compute."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from llamory.longllama.cache import LongLlamaCache
from llamory.longllama.local_context import LocalUpdate
from llamory.memory import MemoryBank
from llamory.memory.blocks import SpanList
from llamory.memory.search import Search


@dataclass
class ForwardContext:
    """What the layers need to know of the step that they compute.

    Attributes:
        cache: where keys and values go.
        rows: the batch's rows that take part, None for all.
        lengths: real tokens per row; what stands behind them is filling.
        banks: the memory of each row.
        search: how memory is searched.
        keep_local: whether the tokens stay in the local context, or go into memory.
        slots: where a first window that keep_local is written.
        local_update: how the step goes on from a local context; None for a first window.
        memory_rotary: cosine and sine for queries to memory, where they differ from the local ones.
        key_scale: what the rotary embedding multiplies keys with at position 0 (1 but for yarn's).
        last_layer: with a window of which nothing but memory is wanted, the last layer to compute.
        spans: per layer what was in memory when the step began; a recomputed layer must see the same.
    """

    cache: LongLlamaCache
    rows: Tensor | None
    lengths: tuple[int, ...]
    banks: list[MemoryBank]
    search: Search
    keep_local: bool
    slots: slice | None = None
    local_update: LocalUpdate | None = None
    memory_rotary: tuple[Tensor, Tensor] | None = None
    key_scale: float = 1.0
    last_layer: int | None = None
    spans: dict[int, list[SpanList]] = field(default_factory=dict)

    @property
    def row_index(self) -> Any:
        """What picks the window's rows of the local buffers."""
        return slice(None) if self.rows is None else self.rows

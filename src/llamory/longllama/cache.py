"""The key/value cache of LongLLaMA: a local context per layer and a memory bank per row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.models.llama.modeling_llama import rotate_half

from llamory.errors import LlamoryError
from llamory.longllama.configuration import LongLlamaConfig
from llamory.longllama.windows import LocalUpdate, Slots
from llamory.memory import MemoryBank
from llamory.memory.blocks import SpanList
from llamory.memory.search import Search


class LongLlamaCacheLayer(CacheLayerMixin):
    """The local context of one layer. It refers to the slots, not to the cache, so that memory is freed with the cache.

    Attributes:
        keys: (batch, kv_heads, capacity, head_dim), rotated.
        values: the same shape.
        raw_keys: keys for memory, without the rotary embedding; None in layers without memory.
        raw_values: values for memory; None where they equal `values`.
    """

    is_croppable = True

    BUFFERS = ("keys", "values", "raw_keys", "raw_values")

    def __init__(self, slots: Slots, has_memory: bool, has_projections: bool = False):
        super().__init__()
        self._slots, self.has_memory, self.has_projections = slots, has_memory, has_projections
        self.raw_keys: Tensor | None = None
        self.raw_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate buffers for the batch, of the type and device of these (rows, kv_heads, tokens, head_dim)."""
        shape = (self._slots.batch, key_states.shape[1], self._slots.capacity, key_states.shape[3])
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.raw_keys = key_states.new_zeros(shape) if self.has_memory else None
        self.raw_values = value_states.new_zeros(shape) if self.has_memory and self.has_projections else None
        self.is_initialized = True

    def write(self, rows: Any, slots: slice, key: Tensor, value: Tensor, raw_key: Tensor, raw_value: Tensor) -> None:
        """Write tensors (rows, kv_heads, tokens, head_dim) into these slots of these rows."""
        if self.keys is None or self.keys.shape[2] < self._slots.capacity:
            self.lazy_initialization(key, value)
        for name, new in zip(self.BUFFERS, (key, value, raw_key, raw_value), strict=True):
            buffer = getattr(self, name)
            if buffer is not None:
                buffer[rows, :, slots] = new.detach()

    def read(self, rows: Any, slots: Any, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and values (rows, kv_heads, slots, head_dim); with `raw` those for memory."""
        keys = self.raw_keys if raw else self.keys
        values = self.raw_values if raw and self.has_projections else self.values
        assert keys is not None and values is not None
        if isinstance(rows, Tensor):
            return keys[rows][:, :, slots], values[rows][:, :, slots]
        return keys[rows][..., slots, :], values[rows][..., slots, :]

    def move(self, kept_slots: slice, capacity: int) -> None:
        """Move these slots to the front of buffers of another capacity."""
        for name in self.BUFFERS:
            old = getattr(self, name)
            if old is not None:
                new = old.new_zeros((*old.shape[:2], capacity, old.shape[3]))
                new[:, :, : kept_slots.stop - kept_slots.start] = old[:, :, kept_slots]
                setattr(self, name, new)

    def select(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        for name in self.BUFFERS:
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, old.index_select(0, indices.to(old.device)))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Not supported: LongLLaMA's attention writes with `write`."""
        raise NotImplementedError("only LongLLaMA's attention writes to a LongLlamaCache")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of local keys that an input of this length sees, and their offset."""
        return self._slots.longest + query_length, 0

    def get_seq_length(self) -> int:
        """Input columns processed so far."""
        return self._slots.columns

    def get_max_length(self) -> int:
        """-1 for unlimited: the local context evicts what it can't hold."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Does nothing: the cache crops all layers at once."""


class LongLlamaCache(Cache):
    """Local context and memory of a batch.

    `get_seq_length()` doesn't count an attached memory, so that `generate` processes the whole prompt.

    Args:
        config: the model's configuration.
        memory: one bank for all rows (each row gets its own fork), or one bank per row (used directly).

    Attributes:
        observer: called by each memory layer in each forward pass with the layer's index, the queries to memory (rows,
            heads, width, head_dim), and the log-sum-exp of local and memory scores (rows, heads, width) plus the
            `memory_size_bias`, so that exp(score - this) is the attention weight of a memory token.
        search: replaces the configuration's memory search.
    """

    def __init__(self, config: LongLlamaConfig, memory: MemoryBank | Sequence[MemoryBank] | None = None):
        self.config = config
        self.mem_layers = frozenset(config.mem_layers)
        self.slots = Slots(0, config.max_position_embeddings, config.local_cache_overflow == "flush")
        has_memory = [index in self.mem_layers for index in range(config.num_hidden_layers)]
        super().__init__(layers=[LongLlamaCacheLayer(self.slots, each, config.mem_projections) for each in has_memory])
        self.observer: Callable[[int, Tensor, Tensor], None] | None = None
        self.search: Search | None = None
        self._attached = memory if isinstance(memory, MemoryBank) else None
        self.memory: list[MemoryBank] = [] if memory is None or isinstance(memory, MemoryBank) else list(memory)

    def memory_length(self, layer_idx: int) -> int:
        """Tokens in a layer's memory, of the longest row."""
        if layer_idx not in self.mem_layers:
            return 0
        banks = self.memory or ([] if self._attached is None else [self._attached])
        return max((bank.length(layer_idx) for bank in banks), default=0)

    def local_length(self, layer_idx: int) -> int:  # noqa: ARG002 (all layers have the same)
        """Tokens in a layer's local context, of the longest row."""
        return self.slots.longest

    @property
    def has_local(self) -> bool:
        """Whether any row has a local context."""
        return self.slots.end > self.slots.start

    def prepare(self, batch: int, new_bank: Any) -> None:
        """Prepare for `batch` rows, or raise LlamoryError if the cache has others; `new_bank` gives an empty memory."""
        if not self.memory and self.mem_layers:
            self.memory = [self._attached.fork() if self._attached else new_bank() for _ in range(batch)]
        if not self.has_local and not self.slots.columns:
            self.slots.clear(batch)
        known = len(self.memory) if self.mem_layers else self.slots.batch
        if batch not in (known, self.slots.batch) or known != self.slots.batch:
            raise LlamoryError(f"The cache has {known} rows, but the input has {batch}; use one cache per batch.")

    def fresh_copy(self) -> LongLlamaCache:
        """An empty cache with the same attached memory."""
        fresh = LongLlamaCache(self.config, self._attached)
        fresh.search = self.search
        return fresh

    def reserve(self, width: int) -> None:
        """Reserve `width` more columns in all layers."""
        move_args = self.slots.reserve_columns(width)
        if move_args is not None:
            for layer in self.layers:
                layer.move(*move_args)

    def rebase_positions(self, rotary: Any, skipped: frozenset[int] = frozenset()) -> None:
        """Rotate local keys back by the rotary embedding once their positions are large; distances stay the same."""
        shift = self.slots.rebase_positions()
        for index, layer in enumerate(self.layers if shift else []):
            if layer.keys is not None and index not in skipped:
                keys = layer.keys.float()
                cos, sin = rotary(keys, torch.tensor([[shift]], device=keys.device))
                cos, sin = (part[:, None] / rotary.attention_scaling for part in (cos, sin))
                layer.keys = (keys * cos - rotate_half(keys) * sin).to(layer.keys.dtype)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder rows for beam search; a row may occur several times."""
        indices = beam_idx.tolist()
        if indices == list(range(self.slots.batch)):
            return
        for layer in self.layers:
            layer.select(beam_idx)
        self.slots.select(indices)
        self.memory = [
            self.memory[index].fork() if index in indices[:at] else self.memory[index]
            for at, index in enumerate(indices if self.memory else [])
        ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self.reorder_cache(torch.arange(self.slots.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(torch.arange(self.slots.batch)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns; a LlamoryError if the local context has overflowed."""
        count = abs(tokens_to_remove)
        if not count:
            return
        if count > self.slots.end - self.slots.start or max(self.slots.next) > self.config.max_position_embeddings:
            raise LlamoryError("The cache can't be cropped: its local context has overflowed.")
        self.slots.crop(count)
        self.slots.columns -= count

    def reset(self) -> None:
        """Forget everything but an attached memory."""
        self.slots.clear(0)
        self.memory = []
        for layer in self.layers:
            layer.keys = layer.values = layer.raw_keys = layer.raw_values = None


@dataclass
class ForwardContext:
    """What the layers need to know about the window that they process."""

    cache: LongLlamaCache
    rows: Tensor | None  # the batch rows in this window; None for all
    lengths: list[int]  # real tokens per row; the rest is padding
    banks: list[MemoryBank]  # of each row
    search: Search
    keep_local: bool  # whether the tokens stay in the local context or go into memory
    slots: slice | None = None  # of a first window in the local context
    local_update: LocalUpdate | None = None  # how the window continues a local context; None for a first window
    memory_rotary: tuple[Tensor, Tensor] | None = None  # for queries to memory, where it differs from the local one
    key_scale: float = 1.0  # factor of the rotary embedding at position 0 (not 1 for yarn)
    last_layer: int | None = None  # the last layer to compute, if only memory is needed
    # Per layer, the memory before this pass; a layer that is recomputed must see the same.
    spans: dict[int, list[SpanList]] = field(default_factory=dict)

    @property
    def row_index(self) -> Any:
        """The index of the window's rows in the local buffers."""
        return slice(None) if self.rows is None else self.rows

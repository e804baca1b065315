"""The key/value cache of LongLLaMA: a local context per layer, and a memory bank per row."""

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


@dataclass
class CacheShape:
    """What a cache's layers share; knowing the cache itself, they would keep its memory from being freed with it.

    Attributes:
        slots: where the local columns stand.
        count: columns of input taken in so far.
    """

    slots: Slots
    count: int = 0


class LongLlamaCacheLayer(CacheLayerMixin):
    """The local context of one layer.

    Attributes:
        keys: (batch, kv_heads, capacity, head_dim), rotated.
        values: the same shape.
        raw_keys: the keys that memory keeps, without the rotary embedding; None in layers without memory.
        raw_values: the values that memory keeps, where they aren't the local ones.
    """

    is_croppable = True

    BUFFERS = ("keys", "values", "raw_keys", "raw_values")

    def __init__(self, shape: CacheShape, has_memory: bool, has_projections: bool = False):
        super().__init__()
        self._shape, self.has_memory, self.has_projections = shape, has_memory, has_projections
        self.raw_keys: Tensor | None = None
        self.raw_values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make buffers for the cache's batch, of the kind of these (rows, kv_heads, tokens, head_dim)."""
        shape = (self._shape.slots.batch, key_states.shape[1], self._shape.slots.capacity, key_states.shape[3])
        self.keys, self.values = key_states.new_zeros(shape), value_states.new_zeros(shape)
        self.raw_keys = key_states.new_zeros(shape) if self.has_memory else None
        self.raw_values = value_states.new_zeros(shape) if self.has_memory and self.has_projections else None
        self.is_initialized = True

    def write(self, rows: Any, slots: slice, key: Tensor, value: Tensor, raw_key: Tensor, raw_value: Tensor) -> None:
        """Write (rows, kv_heads, tokens, head_dim) into the given slots of these rows."""
        if self.keys is None or self.keys.shape[2] < self._shape.slots.capacity:
            self.lazy_initialization(key, value)
        for name, new in zip(self.BUFFERS, (key, value, raw_key, raw_value), strict=True):
            buffer = getattr(self, name)
            if buffer is not None:
                buffer[rows, :, slots] = new.detach()

    def read(self, rows: Any, slots: Any, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Keys and values of these rows and slots; as memory keeps them with `raw`."""
        keys = self.raw_keys if raw else self.keys
        values = self.raw_values if raw and self.has_projections else self.values
        assert keys is not None and values is not None
        if isinstance(rows, Tensor):
            return keys[rows][:, :, slots], values[rows][:, :, slots]
        return keys[rows][..., slots, :], values[rows][..., slots, :]

    def move(self, kept_slots: slice, capacity: int) -> None:
        """Move what is kept to the front of buffers of another capacity."""
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
        """Not for this cache: LongLLaMA's attention writes with `write`."""
        raise NotImplementedError("a LongLlamaCache is written by LongLLaMA's attention only")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Local keys that a query of this length sees, and their offset."""
        return self._shape.slots.longest + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of input that the cache has taken in."""
        return self._shape.count

    def get_max_length(self) -> int:
        """-1: what the local context can't hold leaves it, so there is no limit."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Done by the cache, for all layers at once."""


class LongLlamaCache(Cache):
    """Local context and memory of a batch.

    `get_seq_length()` is the number of input columns taken in since the cache was made, wherever they are now; a
    mounted memory doesn't count, so `generate` reads all of a question that is asked of it.

    Args:
        config: the model's configuration.
        memory: one bank for all rows (each row gets a fork of its own), or one bank per row, used as they are.

    Attributes:
        observer: if set, is told by each memory layer of each step: its index, the queries to memory (rows, heads,
            width, head_dim) and the log-sum-exp of all that they see, local and in memory, (rows, heads, width), plus
            what is taken off scores of memory (`memory_size_bias`): a score less that is a share's logarithm.
        search: how memory is searched, where that isn't the configuration's way.
    """

    def __init__(self, config: LongLlamaConfig, memory: MemoryBank | Sequence[MemoryBank] | None = None):
        self.config = config
        self.mem_layers = frozenset(config.mem_layers)
        self._shape = CacheShape(self._empty_slots(0))
        indices = range(config.num_hidden_layers)
        has_projections = config.mem_projections
        super().__init__(
            layers=[LongLlamaCacheLayer(self._shape, index in self.mem_layers, has_projections) for index in indices]
        )
        self.observer: Callable[[int, Tensor, Tensor], None] | None = None
        self.search: Search | None = None
        self._attached = memory if isinstance(memory, MemoryBank) else None
        self.memory: list[MemoryBank] = [] if memory is None or isinstance(memory, MemoryBank) else list(memory)

    @property
    def slots(self) -> Slots:
        """Where the local columns stand."""
        return self._shape.slots

    @slots.setter
    def slots(self, slots: Slots) -> None:
        self._shape.slots = slots

    @property
    def columns(self) -> int:
        """Columns of input taken in so far."""
        return self._shape.count

    @columns.setter
    def columns(self, count: int) -> None:
        self._shape.count = count

    def memory_length(self, layer_idx: int) -> int:
        """Tokens in a layer's memory (of the row that has the most)."""
        if layer_idx not in self.mem_layers:
            return 0
        banks = self.memory or ([self._attached] if self._attached is not None else [])
        return max((bank.length(layer_idx) for bank in banks), default=0)

    def local_length(self, layer_idx: int) -> int:  # noqa: ARG002 (all layers have the same)
        """Tokens in a layer's local context (of the row that has the most)."""
        return self.slots.longest

    @property
    def has_local(self) -> bool:
        """Whether any row has a local context."""
        return self.slots.end > self.slots.start

    def prepare(self, batch: int, new_bank: Any) -> None:
        """Get ready for a batch of so many rows.

        Args:
            batch: rows.
            new_bank: makes an empty `MemoryBank`.

        Raises:
            LlamoryError: the cache is another batch's.
        """
        if not self.memory and self.mem_layers:
            self.memory = [self._attached.fork() if self._attached else new_bank() for _ in range(batch)]
        if not self.has_local and not self.columns:
            self.slots = self._empty_slots(batch)
        known = len(self.memory) if self.mem_layers else self.slots.batch
        if batch not in (known, self.slots.batch) or known != self.slots.batch:
            raise LlamoryError(f"The cache holds {known} rows, but the input has {batch}; give each row its own cache.")

    def fresh_copy(self) -> LongLlamaCache:
        """A cache of its own with the same mounted memory and nothing read."""
        fresh = LongLlamaCache(self.config, self._attached)
        fresh.search = self.search
        return fresh

    def reserve(self, width: int) -> None:
        """Make room for `width` more columns in all layers."""
        move_args = self.slots.reserve_columns(width)
        if move_args is not None:
            for layer in self.layers:
                layer.move(*move_args)

    def rebase_positions(self, rotary: Any, skipped: frozenset[int] = frozenset()) -> None:
        """Turn local keys back once their positions have grown large; distances stay as they are.

        Args:
            rotary: the model's rotary embedding.
            skipped: layers whose keys aren't rotated.
        """
        shift = self.slots.rebase_positions()
        for index, layer in enumerate(self.layers if shift else []):
            if layer.keys is not None and index not in skipped:
                keys = layer.keys.float()
                cos, sin = rotary(keys, torch.tensor([[shift]], device=keys.device))
                cos, sin = (part[:, None] / rotary.attention_scaling for part in (cos, sin))
                layer.keys = (keys * cos - rotate_half(keys) * sin).to(layer.keys.dtype)

    # ---- what transformers asks of a cache -----------------------------------------------------------------------

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows in another order, some of them several times, as beam search needs them."""
        indices = beam_idx.tolist()
        if indices == list(range(self.slots.batch)):
            return
        for layer in self.layers:
            layer.select(beam_idx)
        self.slots.select(indices)
        used: set[int] = set()
        banks = []
        for index in indices if self.memory else []:
            banks.append(self.memory[index].fork() if index in used else self.memory[index])
            used.add(index)
        self.memory = banks

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.reorder_cache(torch.arange(self.slots.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows."""
        self.reorder_cache(torch.arange(self.slots.batch)[indices.cpu()])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns.

        Raises:
            LlamoryError: some of them have pushed others out of the local context, which can't be undone.
        """
        count = abs(tokens_to_remove)
        if not count:
            return
        if count > self.slots.end - self.slots.start or max(self.slots.next) > self.config.max_position_embeddings:
            raise LlamoryError(
                "The cache can't be cropped: the local context has overflowed. Assisted decoding must stay within "
                f"{self.config.max_position_embeddings} local tokens."
            )
        self.slots.crop(count)
        self.columns -= count

    def reset(self) -> None:
        """Forget everything but a mounted memory."""
        self.slots = self._empty_slots(0)
        self.columns = 0
        self.memory = []
        for layer in self.layers:
            layer.keys = layer.values = layer.raw_keys = layer.raw_values = None

    def _empty_slots(self, batch: int) -> Slots:
        return Slots(batch, self.config.max_position_embeddings, self.config.local_cache_overflow == "flush")


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

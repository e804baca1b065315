"""Random keys and values, memory banks made of them, and softmax attention in float64 to compare with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llamory.memory import MemoryBank
from llamory.memory.blocks import Block, Span, SpanList


def random_tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, count, 4, generator=chance).unbind()
    return keys, values


@pytest.fixture(scope="session")
def tokens():
    """Makes keys and values of a number of tokens, two heads of four numbers."""
    return random_tokens


@pytest.fixture(scope="session")
def make_bank():
    """Makes a bank with segments of given lengths and different numbers."""

    def make(counts: dict[str, int], layers=(3, 5), dtype="float32", **kwargs) -> MemoryBank:
        made = MemoryBank(layers, 2, 4, dtype=dtype, **kwargs)
        for i, (name, count) in enumerate(counts.items()):
            for layer in layers:
                made.append(layer, *random_tokens(count, seed=100 * i + layer), segment=name)
        return made

    return make


@pytest.fixture(scope="session")
def same_content():
    """Tells whether two banks hold the same segments, metadata, keys and values."""

    def same(one: MemoryBank, other: MemoryBank) -> bool:
        kinds = [(bank.segments, bank.layers, bank.dtype, bank.fingerprint) for bank in (one, other)]
        return (
            kinds[0] == kinds[1]
            and all(one.metadata(name) == other.metadata(name) for name in one.segments)
            and all(
                torch.equal(one.keys(layer, name), other.keys(layer, name))
                and torch.equal(one.values(layer, name), other.values(layer, name))
                for layer in one.layers
                for name in one.segments
            )
        )

    return same


# ---- search ----------------------------------------------------------------------------------------------------------


def plain_attention(query, key, value, scaling, mask=None):
    """Softmax attention in float64 and its log-sum-exp; heads of a group read the same key head."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask.double()
    lse = scores.logsumexp(-1)
    weights = (scores - lse.clamp_min(-1e300).unsqueeze(-1)).exp()
    return weights @ value, lse


def close(actual, expected, tolerance=1e-5, size=0.0):
    """Assert that outputs and log-sum-exps agree, relative to the largest number of each or to `size` (of values)."""
    for one, other in zip(actual, expected, strict=True):
        one, other = one.double(), other.double()
        assert one.shape == other.shape
        infinite = other.isinf()
        assert torch.equal(one.isinf(), infinite)
        one, other = one.masked_fill(infinite, 0), other.masked_fill(infinite, 0)
        difference, scale = (one - other).abs().amax(), other.abs().amax().clamp_min(max(size, 1e-9))
        assert difference <= tolerance * scale, f"{difference / scale:.2g} > {tolerance:.2g}"


class BlockList:
    """A memory of one layer in blocks of a given capacity: what a search needs of a memory bank."""

    def __init__(self, kv_heads, head_dim, dtype=torch.float32, capacity=256):
        self.kv_heads, self.head_dim, self.dtype, self.capacity = kv_heads, head_dim, dtype, capacity
        self._spans = []

    def append(self, layer, keys, values, segment=None):
        while keys.shape[1]:
            last = self._spans[-1] if self._spans else None
            if last is None or last.block.free == 0:
                block = Block.allocate(self.kv_heads, self.capacity, self.head_dim, self.dtype)
                last = Span(block, 0, 0)
                self._spans.append(last)
            taken = min(last.block.free, keys.shape[1])
            last.block.write(keys[:, :taken], values[:, :taken])
            self._spans[-1] = Span(last.block, last.start, last.stop + taken)
            keys, values = keys[:, taken:], values[:, taken:]

    def spans(self, layer):
        return SpanList(self._spans)

    def fork(self):
        other = BlockList(self.kv_heads, self.head_dim, self.dtype, self.capacity)
        other._spans = list(self._spans)
        return other

    def length(self, layer=None):
        return sum(len(span) for span in self._spans)

    def tensors(self):
        """All keys and values in float64, as the memory holds them (rounded to its type)."""
        keys = torch.cat([span.keys(torch.float64) for span in self._spans], 1)
        return keys, torch.cat([span.values(torch.float64) for span in self._spans], 1)


@pytest.fixture(scope="session")
def memory():
    """Small memories, queries, and the expected attention."""

    def filled(tokens, kv_heads=2, head_dim=16, dtype=torch.float32, capacity=256, seed=0, scale=1.0):
        bank, chance = BlockList(kv_heads, head_dim, dtype, capacity), torch.Generator().manual_seed(seed)
        keys, values = torch.randn(2, kv_heads, tokens, head_dim, generator=chance)
        bank.append(0, keys * scale, values)
        return bank

    def expected(query, bank, scaling):
        keys, values = bank.tensors()
        return plain_attention(query, keys[None].expand(len(query), -1, -1, -1), values[None], scaling)

    def queries(*shape, seed=1):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return SimpleNamespace(
        Bank=BlockList, filled=filled, expected=expected, queries=queries, plain_attention=plain_attention, close=close
    )

"""A plain softmax in float64 to compare with, and a small stand-in for a memory bank."""

from types import SimpleNamespace

import pytest
import torch

from llamory.memory.blocks import Block, Span


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


class StandInBank:
    """What searching needs of a memory bank: spans of blocks per layer."""

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
        return list(self._spans)

    def fork(self):
        other = StandInBank(self.kv_heads, self.head_dim, self.dtype, self.capacity)
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
    """What tests of memory share."""

    def filled(tokens, kv_heads=2, head_dim=16, dtype=torch.float32, capacity=256, seed=0, scale=1.0):
        bank, chance = StandInBank(kv_heads, head_dim, dtype, capacity), torch.Generator().manual_seed(seed)
        keys, values = torch.randn(2, kv_heads, tokens, head_dim, generator=chance)
        bank.append(0, keys * scale, values)
        return bank

    def expected(query, bank, scaling):
        keys, values = bank.tensors()
        return plain_attention(query, keys[None].expand(len(query), -1, -1, -1), values[None], scaling)

    def queries(*shape, seed=1):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

    return SimpleNamespace(
        Bank=StandInBank, filled=filled, expected=expected, queries=queries, plain_attention=plain_attention
    )

"""What the tests of memory share: random keys and values, and banks made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llamory.memory import MemoryBank


def random_tokens(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, count, 4, generator=chance).unbind()
    return keys, values


@pytest.fixture(scope="session")
def tokens():
    """Gives keys and values of so many tokens, two heads of four numbers."""
    return random_tokens


@pytest.fixture(scope="session")
def make_bank():
    """Makes a bank with segments of so many tokens; each has other numbers."""

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

"""Pages beside a memory file, so that whoever mounts it needn't sort its tokens into pages again."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from llamory.memory.bank import MemoryBank
from llamory.memory.blocks import Block, Span
from llamory.memory.search.page_segments import (
    LENGTHS,
    PAGE_SIZE,
    PAGES_PER_SUPERPAGE,
    SUPERPAGE_SIZE,
    PagedSegment,
    aligned_ranges,
    get_or_merge,
    install,
)

VERSION = 1
_PARTS = ("rows", "pages", "means", "variances", "values")


def save_pages(bank: MemoryBank, path: Path) -> None:
    """Sort a memory's tokens into pages and write the pages' tables down.

    Args:
        bank: of one segment, as it was loaded from a file: its blocks are those of whoever loads the file again.
        path: written beside and renamed.

    Raises:
        OSError: it can't be written.
    """
    tensors: dict[str, Tensor] = {}
    for layer, block, ranges in _layer_ranges(bank):
        if ranges:
            merged = get_or_merge(block, ranges)
            parts = (merged.rows, merged.pages, *merged.superpages)
            tensors |= {f"layers.{layer}.{name}": part for name, part in zip(_PARTS, parts, strict=True)}
    temp_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # Not safetensors' own file, which only its writer may read.
        temp_path.write_bytes(save(tensors, {"pages": _identity(bank)}))
        temp_path.replace(path)
    except BaseException:
        temp_path.unlink(missing_ok=True)
        raise


def load_pages(bank: MemoryBank, path: Path) -> bool:
    """Let a memory install the pages that were written down.

    Args:
        bank: as for `save_pages`.
        path: the file.

    Returns:
        Whether there were pages of this very memory.
    """
    with suppress(OSError, SafetensorError, KeyError), safe_open(path, "pt") as file:
        if (file.metadata() or {}).get("pages") != _identity(bank):
            return False
        names = set(file.keys())
        for layer, block, ranges in _layer_ranges(bank):
            if not ranges:
                continue
            if f"layers.{layer}.rows" not in names:
                return False
            rows, pages, *superpages = (file.get_tensor(f"layers.{layer}.{name}") for name in _PARTS)
            install(block, ranges, PagedSegment(rows, pages, tuple(superpages)))
        return True
    return False


def page_bytes(bank: MemoryBank, tokens: int) -> int:
    """Bytes that the tables take at most for so many tokens of a memory of this kind, without the file's header."""
    kind = 4 if bank.dtype == torch.float32 else 2
    # Where each token is, three vectors per page, and three per superpage.
    per_token = 4 + 3 * bank.head_dim * (kind / PAGE_SIZE + 4 / SUPERPAGE_SIZE)
    return int(len(bank.layers) * bank.kv_heads * tokens * per_token)


def _layer_ranges(bank: MemoryBank) -> list[tuple[int, Block, list[tuple[int, int]]]]:
    """Each layer's block and the stretches in it; none in a memory that isn't one run of tokens."""
    layer_ranges = []
    for layer in bank.layers:
        spans = bank.spans(layer)
        if len(spans) == 1:
            span = spans[0]
            layer_ranges.append((layer, span.block, aligned_ranges(Span(span.block, span.start, span.stop))[0]))
    return layer_ranges


def _identity(bank: MemoryBank) -> str:
    """What pages must have in common with the memory that they are of."""
    fields: list[Any] = [
        VERSION,
        PAGE_SIZE,
        PAGES_PER_SUPERPAGE,
        LENGTHS,
        bank.fingerprint,
        str(bank.dtype),
        bank.layers,
    ]
    sizes = [[block.capacity, len(ranges)] for _, block, ranges in _layer_ranges(bank)]
    return json.dumps([*fields, bank.kv_heads, bank.head_dim, sizes])

"""Faiss indexes of parts of memory blocks, in memory or on disk, and the means of their lists."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.memory.blocks import Block, Span

LENGTHS = (1 << 20, 1 << 18, 1 << 16, 1 << 14, 1 << 12)  # tokens of a part; every token is in the largest that fits
MIN_PROBES = 8  # lists that are looked into, or
PROBE_DIVISOR = 64  # one list in so many, if that is more
TRAINING_STEPS = 10


@dataclass
class IndexedPart:
    """A part's indexes and lists, of each head.

    Attributes:
        indexes: Faiss index per head, of the keys less their mean: that leaves the order of inner products as it is
            and makes directions tell more.
        lists: (kv_heads, tokens) int16, the list that each token is in.
        means, variances, values: of each list's keys, and mean of its values, (kv_heads, lists, head_dim) float32.
        counts: tokens of each list, (kv_heads, lists) float32.
    """

    indexes: list[Any]
    lists: Tensor
    means: Tensor
    variances: Tensor
    values: Tensor
    counts: Tensor

    def search(self, query: Tensor, count: int) -> Tensor:
        """Numbers of the nearest tokens, -1 where there are fewer, for queries (kv_heads, queries, head_dim)."""
        found = [
            torch.from_numpy(index.search(head.contiguous().numpy(), count)[1])
            for index, head in zip(self.indexes, query.cpu(), strict=True)
        ]
        return torch.stack(found).to(query.device)


def get_or_build_part(block: Block, start: int, stop: int, folder: Path | None) -> IndexedPart:
    """A part of a block, made if it isn't yet cache: read from the folder if it is there, else built and kept there.

    Raises:
        LlamoryError: the folder can't be used.
    """
    cache = block.search_cache.setdefault("faiss", {})
    assert isinstance(cache, dict)
    name = (start, stop, folder)
    if name not in cache:
        span = Span(block, start, stop)
        cache[name] = _build(span) if folder is None else _load_or_build(span, folder)
        for other in [(a, b, f) for a, b, f in list(cache) if start <= a and b <= stop and f == folder]:
            if other != name:
                cache.pop(other, None)
    return cache[name]


def _build(span: Span) -> IndexedPart:
    import faiss

    lists, indexes = [], []
    keys = span.keys(torch.float32)
    for head in keys:
        centered = (head - head.mean(0)).cpu().numpy()
        index = _new_index(faiss, *centered.shape)
        index.train(centered)
        index.add(centered)
        indexes.append(index)
        lists.append(_lists_of(faiss, index))
    return IndexedPart(indexes, *_list_statistics(torch.stack(lists).to(keys.device), keys, span.values(torch.float32)))


def _new_index(faiss: Any, tokens: int, head_dim: int) -> Any:
    lists = 1 << round(tokens.bit_length() / 2)
    # One byte per number is enough to find neighbours, which are then read from the memory itself.
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(head_dim),
        head_dim,
        lists,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
    )
    index.cp.niter = TRAINING_STEPS
    index.nprobe = max(MIN_PROBES, lists // PROBE_DIVISOR)
    return index


def _lists_of(faiss: Any, index: Any) -> Tensor:
    lists = torch.empty(index.ntotal, dtype=torch.int16)
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if size:
            ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size).copy()
            lists[torch.from_numpy(ids)] = number
    return lists


def _list_statistics(lists: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    at = lists.long()
    counts = torch.zeros(len(lists), int(at.max()) + 1, device=keys.device)
    counts.scatter_add_(1, at, torch.ones_like(at, dtype=torch.float32))
    expanded = at.unsqueeze(-1).expand_as(keys)

    def mean_of(tensor: Tensor) -> Tensor:
        sums = torch.zeros(*counts.shape, keys.shape[-1], device=keys.device).scatter_add_(1, expanded, tensor)
        return sums / counts.clamp_min(1).unsqueeze(-1)

    means = mean_of(keys)
    variances = mean_of((keys - means.gather(1, expanded)).square_())
    return lists, means, variances, mean_of(values), counts


# ---- on disk ---------------------------------------------------------------------------------------------------------


def _load_or_build(span: Span, folder: Path) -> IndexedPart:
    """The part from its files, which are named after its content; built and written if they aren't there or broken."""
    import faiss

    try:
        folder.mkdir(parents=True, exist_ok=True)
        digest = _digest(span)
        files = [folder / f"{digest}-{head}.faiss" for head in range(len(span.block.keys))]
        if not all(file.is_file() for file in files):
            for index, file in zip(_build(span).indexes, files, strict=True):
                _write(faiss, index, file)
    except OSError as error:
        raise LlamoryError(
            f"The folder {folder} can't keep indexes of memory ({error.strerror}): give one that can be written."
        ) from error
    indexes = [_open_mmap(faiss, file) for file in files]
    keys = span.keys(torch.float32)
    lists = torch.stack([_lists_of(faiss, index) for index in indexes]).to(keys.device)
    return IndexedPart(indexes, *_list_statistics(lists, keys, span.values(torch.float32)))


def _digest(span: Span) -> str:
    """Name of a span's keys: the same keys have the same index, whatever file or block they are in."""
    digest = hashlib.blake2b(digest_size=16)
    for part in span.split(1 << 16):
        digest.update(part.keys().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return f"{len(span)}-{digest.hexdigest()}"


def _write(faiss: Any, index: Any, file: Path) -> None:
    handle, temp_path = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    os.close(handle)
    try:
        faiss.write_index(index, temp_path)
        Path(temp_path).replace(file)
    finally:
        Path(temp_path).unlink(missing_ok=True)


def _open_mmap(faiss: Any, file: Path) -> Any:
    """An index whose lists stay on disk and are read where they are looked into."""
    try:
        return faiss.read_index(str(file), faiss.IO_FLAG_MMAP)
    except RuntimeError as error:
        raise LlamoryError(f"{file} is not a whole index of memory: remove it, and it is built again.") from error

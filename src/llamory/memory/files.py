"""Memory files: one memory as a safetensors file, written atomically and checked when it is read.

Per memory layer N it holds `layers.N.keys` and `layers.N.values` (kv_heads, tokens, head_dim) and, for int8,
`key_scales` and `value_scales` (kv_heads, tokens), with the tokens of all segments one after the other. The header's
metadata lists the segments, the model's fingerprint, and checksums of every tensor and of the header itself.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from llamory.common.io import PathLike, atomic_file
from llamory.errors import LlamoryError
from llamory.memory.blocks import DTYPES, Block, Segment, Span

VERSION = 1
_CHECKSUM_DIGITS = 16
# Every file starts with the header's length and this; the checksum is of the header with zeros in its place.
_HEADER_PREFIX = b'{"__metadata__":{"format":"llamory memory","check":"'
_CHECKSUM_PLACEHOLDER = "0" * _CHECKSUM_DIGITS
_ALIGNMENT = 64
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Linux counts a writable mapping as requested memory unless told not to, and refuses one larger than its RAM.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
_FILE_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}


@dataclass(frozen=True)
class StoredSegment:
    """One segment of a file: its name, its tokens in each memory layer, and its metadata."""

    name: str
    tokens: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryHeader:
    """The description in a memory file; `dtype` by name, segments in order."""

    layers: tuple[int, ...]
    kv_heads: int
    head_dim: int
    dtype: str
    fingerprint: str
    segments: tuple[StoredSegment, ...]

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every tensor, in the order of the file: the widest type first keeps each aligned."""
        tokens = [sum(segment.tokens[i] for segment in self.segments) for i in range(len(self.layers))]
        table: dict[str, tuple[str, tuple[int, ...]]] = {}
        scales = [(("key_scales", "value_scales"), "float32", ())] if self.dtype == "int8" else []
        for parts, dtype, width in (*scales, (("keys", "values"), self.dtype, (self.head_dim,))):
            for layer, count in zip(self.layers, tokens, strict=True):
                table |= {f"layers.{layer}.{part}": (dtype, (self.kv_heads, count, *width)) for part in parts}
        return table


def read_header(path: PathLike) -> dict[str, Any]:
    """The description in a memory file's header, JSON-serializable; LlamoryError if it isn't a whole memory file.

    Its keys: `version`, `fingerprint`, `layers`, `kv_heads`, `head_dim`, `dtype`, `tokens` (in the first memory layer),
    `bytes` (of the file) and `segments`: a list of `name`, `tokens` and `metadata`, in order.
    """
    with _open(path) as file:
        header, _, _ = _read_header(path, file)
        size = os.fstat(file.fileno()).st_size
    segments = [{**vars(each), "tokens": next(iter(each.tokens), 0)} for each in header.segments]
    tokens = sum(segment["tokens"] for segment in segments)
    changed = {"layers": list(header.layers), "tokens": tokens, "bytes": size, "segments": segments}
    return {"version": VERSION, **vars(header), **changed}


@dataclass(frozen=True)
class MemoryFile:
    """A mapped memory file; its tensors are views of a private mapping, so writes never reach the file."""

    path: PathLike
    header: MemoryHeader
    tensors: dict[str, Tensor]
    checksums: dict[str, str]

    def verify(self) -> None:
        """Read all data once; raise LlamoryError unless the checksums agree."""
        for name, tensor in self.tensors.items():
            if xxhash.xxh3_64_hexdigest(tensor_bytes(tensor)) != self.checksums[name]:
                raise LlamoryError(_damaged_message(self.path, name))

    def segments(self) -> dict[str, Segment]:
        """The segments by name; each layer is one full block, so many documents are one span."""
        layers = self.header.layers
        blocks, starts = {}, dict.fromkeys(layers, 0)
        for layer in layers:
            names = [f"layers.{layer}.{part}" for part in ("keys", "values", "key_scales", "value_scales")]
            tensors = [self.tensors[name] for name in names if name in self.tensors]
            checksum = "-".join(self.checksums[name] for name in names if name in self.checksums)
            blocks[layer] = Block(*tensors, filled=tensors[0].shape[1], checksum=checksum)
        segments = {}
        for stored in self.header.segments:
            segment = segments[stored.name] = Segment(metadata=stored.metadata)
            for layer, tokens in zip(layers, stored.tokens, strict=True):
                if tokens:
                    segment.spans[layer] = (Span(blocks[layer], starts[layer], starts[layer] + tokens),)
                    starts[layer] += tokens
        return segments


def read(path: PathLike) -> MemoryFile:
    """Map a memory file and check its header as `read_header`; `MemoryFile.verify` checks its data."""
    with _open(path) as file:
        header, start, checksums = _read_header(path, file)
        # Not safetensors' own mapping: that is refused for files larger than RAM, and opens the path a second time,
        # when another file may have replaced it.
        data = torch.frombuffer(_mmap(file), dtype=torch.uint8)
    tensors = {}
    for name, (dtype, shape) in header.tensors().items():
        stop = start + math.prod(shape) * DTYPES[dtype].itemsize
        tensors[name] = data[start:stop].view(DTYPES[dtype]).view(shape)
        start = stop
    return MemoryFile(path, header, tensors, checksums)


@contextmanager
def _open(path: PathLike) -> Iterator[BinaryIO]:
    path = Path(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise LlamoryError(f"{path} is not a file; give the path of a memory file.")
        with path.open("rb") as file:
            yield file
    except (FileNotFoundError, NotADirectoryError) as error:
        raise LlamoryError(f"There is no memory file {path}; check the path.") from error


def _mmap(file: BinaryIO) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _read_header(path: PathLike, file: BinaryIO) -> tuple[MemoryHeader, int, dict[str, str]]:
    """The header, the offset of the first tensor, and the tensors' checksums."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(_LENGTH_BYTES + len(_HEADER_PREFIX))
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    is_memory_file = size > _LENGTH_BYTES and _HEADER_PREFIX.startswith(head[_LENGTH_BYTES:])
    if _LENGTH_BYTES + length > size or length > _MAX_HEADER_BYTES:
        problem = f"{path} is not a memory file, or the rest of a damaged one: give another file."
        raise LlamoryError(_truncated_message(path) if is_memory_file else problem)
    raw = (head + file.read(max(0, length - len(_HEADER_PREFIX))))[: _LENGTH_BYTES + length]
    try:
        entries = json.loads(raw[_LENGTH_BYTES:])
        metadata = entries.pop("__metadata__", {})
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        problem = f"{path} is not a memory file: it isn't even a safetensors file."
        raise LlamoryError(_damaged_message(path, "its header") if is_memory_file else problem) from error
    if not is_memory_file:
        raise LlamoryError(f"{path} is a safetensors file, but not of a memory: give a file that `llamory read` made.")
    if (version := metadata.get("version")) != str(VERSION):
        problem = f"The memory file {path} has format version {version}, and this llamory reads {VERSION}"
        raise LlamoryError(f"{problem}: update llamory, or read the documents again.")
    if metadata["check"] != _header_checksum(raw):
        raise LlamoryError(_damaged_message(path, "its header"))
    data_stop = _LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < data_stop:
        raise LlamoryError(_truncated_message(path))
    if size > data_stop:
        raise LlamoryError(f"The memory file {path} is damaged: something was added at its end.")
    segments = json.loads(metadata["segments"])
    header = MemoryHeader(
        layers=tuple(json.loads(metadata["layers"])),
        kv_heads=int(metadata["kv_heads"]),
        head_dim=int(metadata["head_dim"]),
        dtype=metadata["dtype"],
        fingerprint=json.loads(metadata["fingerprint"]),
        segments=tuple(StoredSegment(each["name"], tuple(each["tokens"]), each["facts"]) for each in segments),
    )
    return header, _LENGTH_BYTES + length, json.loads(metadata["checks"])


def _truncated_message(path: PathLike) -> str:
    return f"The memory file {path} is cut short: use a complete copy of it, or read the documents again."


def _damaged_message(path: PathLike, part: str) -> str:
    problem = f"The memory file {path} is damaged ({part} isn't what was written)"
    return f"{problem}: use an intact copy of it, or read the documents again."


def write(path: PathLike, header: MemoryHeader, chunks: Callable[[int, str], Iterable[Tensor]]) -> None:
    """Write a memory file; it replaces the old file when it is complete. A missing folder is made, and a link followed.

    `chunks` gives the chunks of a tensor, by layer and part, in the order of its elements. Raises LlamoryError if the
    path is a folder, and OSError with the path as `filename` if the file can't be written.
    """
    # Banks that have mapped the old file keep it: the new one has another inode.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise LlamoryError(f"{path} is a folder; give the path of a file to save the memory in.")
    with atomic_file(target) as file:
        checksums = dict.fromkeys(header.tensors(), _CHECKSUM_PLACEHOLDER)
        placeholder = _header_bytes(header, checksums)
        file.write(placeholder)
        for name in checksums:
            _, layer, part = name.split(".")
            checksum = xxhash.xxh3_64()
            for chunk in chunks(int(layer), part):
                content = tensor_bytes(chunk)
                checksum.update(content)
                file.write(content)
            checksums[name] = checksum.hexdigest()
        final = _header_bytes(header, checksums)
        assert len(final) == len(placeholder)
        file.seek(0)
        file.write(final)


def _header_bytes(header: MemoryHeader, checksums: dict[str, str]) -> bytes:
    """The file's first bytes: the header's length and the header; equally long for any checksums."""
    segments = [{"name": each.name, "tokens": each.tokens, "facts": each.metadata} for each in header.segments]
    metadata = {
        "format": "llamory memory",
        "check": _CHECKSUM_PLACEHOLDER,
        "version": str(VERSION),
        "fingerprint": json.dumps(header.fingerprint),
        "layers": json.dumps(header.layers),
        "dtype": header.dtype,
        "kv_heads": str(header.kv_heads),
        "head_dim": str(header.head_dim),
        "segments": json.dumps(segments),
        "checks": json.dumps(checksums),
    }
    entries: dict[str, Any] = {"__metadata__": metadata}
    stop = 0
    for name, (dtype, shape) in header.tensors().items():
        start, stop = stop, stop + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": _FILE_TYPES[dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    raw = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    start = _LENGTH_BYTES + len(_HEADER_PREFIX)
    return raw[:start] + _header_checksum(raw).encode() + raw[start + _CHECKSUM_DIGITS :]


def _header_checksum(raw: bytes) -> str:
    start = _LENGTH_BYTES + len(_HEADER_PREFIX)
    return xxhash.xxh3_64_hexdigest(raw[:start] + _CHECKSUM_PLACEHOLDER.encode() + raw[start + _CHECKSUM_DIGITS :])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes, without a copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

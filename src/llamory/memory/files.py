"""Memory files: safetensors files of one memory, written whole or not at all and checked when they are read.

A file holds per memory layer the tensors `layers.N.keys` and `layers.N.values` (kv_heads, tokens, head_dim), for int8
also `key_scales` and `value_scales` (kv_heads, tokens). The tokens of all segments lie in them one after the other; the
metadata says which are whose, what made them, and checksums of every tensor and of the header itself.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.memory.blocks import DTYPES

try:
    import fcntl
except ImportError:  # not a POSIX system: two processes that save the same file at once aren't kept apart
    fcntl = None  # type: ignore[assignment]

VERSION = 1
_CHECKSUM_DIGITS = 16
# Every memory file starts with its header's length and this; the check is that of the header with zeros in its place.
_HEADER_PREFIX = b'{"__metadata__":{"format":"llamory memory","check":"'
_CHECKSUM_PLACEHOLDER = "0" * _CHECKSUM_DIGITS
_ALIGNMENT = 64
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
# Linux counts a writable mapping as memory that was asked for unless told not to, and refuses one larger than its RAM.
_NO_RESERVE = 0x4000 if sys.platform == "linux" else 0
_FILE_TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8"}
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class StoredSegment:
    """One segment of a file.

    Attributes:
        name: its name.
        tokens: how many it has in each memory layer.
        metadata: what is known of it.
    """

    name: str
    tokens: tuple[int, ...]
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryHeader:
    """What a memory file says about itself; `dtype` by name, segments in order."""

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
        for parts, dtype, width in (
            (("key_scales", "value_scales"), "float32", ()),
            (("keys", "values"), self.dtype, (self.head_dim,)),
        ):
            if parts[0] == "keys" or self.dtype == "int8":
                for layer, count in zip(self.layers, tokens, strict=True):
                    for part in parts:
                        table[tensor_name(layer, part)] = (dtype, (self.kv_heads, count, *width))
        return table


def tensor_name(layer: int, part: str) -> str:
    """The name in the file of a layer's "keys", "values", "key_scales" or "value_scales"."""
    return f"layers.{layer}.{part}"


def read_header(path: PathLike) -> dict[str, Any]:
    """What a memory file holds, read from its header alone, as something that JSON can hold.

    Returns:
        `version`, `fingerprint`, `layers`, `kv_heads`, `head_dim`, `dtype`, `tokens` (in the first memory layer),
        `bytes` (of the file) and `segments`: a list of `name`, `tokens` and `metadata`, in order.

    Raises:
        LlamoryError: there is no such file, it isn't a memory file, or its header is damaged or cut short.
    """
    with _open(path) as file:
        contents, _, _ = _read_header(path, file)
        segments = [
            {"name": each.name, "tokens": each.tokens[0] if each.tokens else 0, "metadata": each.metadata}
            for each in contents.segments
        ]
        return {
            "version": VERSION,
            **{name: value for name, value in asdict(contents).items() if name != "segments"},
            "layers": list(contents.layers),
            "tokens": sum(segment["tokens"] for segment in segments),
            "bytes": os.fstat(file.fileno()).st_size,
            "segments": segments,
        }


# ---- reading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MemoryFile:
    """A mapped memory file: what it says about itself, its tensors by name, and their checksums.

    The tensors are views of a private mapping: nothing is copied, and writing to them would never reach the file.
    """

    path: PathLike
    contents: MemoryHeader
    tensors: dict[str, Tensor]
    checks: dict[str, str]

    def verify(self) -> None:
        """Read all of it once and compare the checksums.

        Raises:
            LlamoryError: a tensor isn't what was written.
        """
        for name, tensor in self.tensors.items():
            if xxhash.xxh3_64_hexdigest(_bytes(tensor)) != self.checks[name]:
                raise LlamoryError(_damaged_message(self.path, name))


def read(path: PathLike) -> MemoryFile:
    """Map a memory file and check its header; its data is checked by `MemoryFile.verify`.

    Raises:
        LlamoryError: as `read_header`.
    """
    with _open(path) as file:
        contents, start, checks = _read_header(path, file)
        # Not safetensors' own mapping: that is refused for files larger than RAM, and opens the path a second time,
        # when another file may have taken its place.
        mapped = _mmap(file)
    tensors = {}
    for name, (dtype, shape) in contents.tensors().items():
        numbers, torch_dtype = math.prod(shape), DTYPES[dtype]
        tensors[name] = (
            torch.frombuffer(mapped, dtype=torch_dtype, count=numbers, offset=start).view(shape)
            if numbers
            else torch.empty(shape, dtype=torch_dtype)  # a view of nothing is refused
        )
        start += numbers * torch_dtype.itemsize
    return MemoryFile(path, contents, tensors, checks)


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
    """What the file says about itself, where its tensors start, and their checksums."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(_LENGTH_BYTES + len(_HEADER_PREFIX))
    length = int.from_bytes(head[:_LENGTH_BYTES], "little")
    is_memory_file = size > _LENGTH_BYTES and _HEADER_PREFIX.startswith(head[_LENGTH_BYTES:])
    if _LENGTH_BYTES + length > size or length > _MAX_HEADER_BYTES:
        if is_memory_file:
            raise LlamoryError(_truncated_message(path))
        raise LlamoryError(f"{path} is not a memory file, or what is left of a damaged one: give another file.")
    raw = (head + file.read(max(0, length - len(_HEADER_PREFIX))))[: _LENGTH_BYTES + length]
    try:
        entries = json.loads(raw[_LENGTH_BYTES:])
        metadata = entries.pop("__metadata__", {})
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        if is_memory_file:
            raise LlamoryError(_damaged_message(path, "its header")) from error
        raise LlamoryError(f"{path} is not a memory file: it isn't even a safetensors file.") from error
    if not is_memory_file:
        raise LlamoryError(f"{path} is a safetensors file, but not of a memory: give a file that `llamory read` made.")
    if (version := metadata.get("version")) != str(VERSION):
        raise LlamoryError(
            f"The memory file {path} has format version {version}, and this llamory reads {VERSION}: "
            "update llamory, or read the documents again."
        )
    if metadata["check"] != _header_check(raw):
        raise LlamoryError(_damaged_message(path, "its header"))
    end = _LENGTH_BYTES + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    if size < end:
        raise LlamoryError(_truncated_message(path))
    if size > end:
        raise LlamoryError(f"The memory file {path} is damaged: something was added at its end.")
    contents = MemoryHeader(
        layers=tuple(json.loads(metadata["layers"])),
        kv_heads=int(metadata["kv_heads"]),
        head_dim=int(metadata["head_dim"]),
        dtype=metadata["dtype"],
        fingerprint=json.loads(metadata["fingerprint"]),
        segments=tuple(
            StoredSegment(each["name"], tuple(each["tokens"]), each["facts"])
            for each in json.loads(metadata["segments"])
        ),
    )
    return contents, _LENGTH_BYTES + length, json.loads(metadata["checks"])


def _truncated_message(path: PathLike) -> str:
    return f"The memory file {path} is cut short: take a whole copy of it, or read the documents again."


def _damaged_message(path: PathLike, part: str) -> str:
    return (
        f"The memory file {path} is damaged ({part} isn't what was written): "
        "take a whole copy of it, or read the documents again."
    )


# ---- writing ---------------------------------------------------------------------------------------------------------


def write(path: PathLike, contents: MemoryHeader, chunks: Callable[[int, str], Iterable[Tensor]]) -> None:
    """Write a memory file, chunk by chunk; until it is whole the old one stays in its place.

    Args:
        path: the file; its folder is made if it is missing, and a link is followed.
        contents: what the file says about itself.
        chunks: gives the chunks of a tensor, by layer and part, in the order of its elements.

    Raises:
        LlamoryError: the path is a folder.
        OSError: the file can't be written; its `filename` is the path, the old file is as it was.
    """
    # A file that was loaded from this path stays whole for whoever has mapped it: the new one has another inode.
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise LlamoryError(f"{path} is a folder; give the path of a file to save the memory in.")
    target.parent.mkdir(parents=True, exist_ok=True)
    with _atomic_write(target) as file:
        checks = dict.fromkeys(contents.tensors(), _CHECKSUM_PLACEHOLDER)
        header = _header(contents, checks)
        file.write(header)
        for name in checks:
            layer, part = name.removeprefix("layers.").split(".")
            check = xxhash.xxh3_64()
            for chunk in chunks(int(layer), part):
                content = _bytes(chunk)
                check.update(content)
                file.write(content)
            checks[name] = check.hexdigest()
        final = _header(contents, checks)
        assert len(final) == len(header)
        file.seek(0)
        file.write(final)


@contextmanager
def _atomic_write(target: Path) -> Iterator[BinaryIO]:
    """A file that takes the target's place at the end, if all went well."""
    partial = target.with_name(f".{target.name}.partial")
    try:
        with _open_exclusive(partial) as file:
            try:
                yield file
                file.flush()
                os.fsync(file.fileno())
                partial.replace(target)
            except BaseException:
                partial.unlink(missing_ok=True)
                raise
        _sync_folder(target.parent)
    except OSError as error:
        if error.filename in (None, str(partial)):
            error.filename, error.filename2 = str(target), None
        raise


@contextmanager
def _open_exclusive(partial: Path) -> Iterator[BinaryIO]:
    """Open a file to write it anew, once no other process writes it.

    Its name is always the same, so a killed run leaves one at most, and the next run writes over it.
    """
    while True:
        with os.fdopen(os.open(partial, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
            if fcntl is not None:
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            # Whoever held the lock may have moved the file to where it belongs: then this is not the partial any more.
            try:
                replaced = not os.path.samestat(partial.stat(), os.fstat(file.fileno()))
            except FileNotFoundError:
                replaced = True
            if replaced:
                continue
            file.truncate()
            yield file
            return


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # the file is in its place; some systems can't be asked to write the folder down too
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _header(contents: MemoryHeader, checks: dict[str, str]) -> bytes:
    """The header with its length in front; as long for any checks."""
    entries: dict[str, Any] = {
        "__metadata__": {
            "format": "llamory memory",
            "check": _CHECKSUM_PLACEHOLDER,
            "version": str(VERSION),
            "fingerprint": json.dumps(contents.fingerprint),
            "layers": json.dumps(contents.layers),
            "dtype": contents.dtype,
            "kv_heads": str(contents.kv_heads),
            "head_dim": str(contents.head_dim),
            "segments": json.dumps(
                [
                    {"name": segment.name, "tokens": segment.tokens, "facts": segment.metadata}
                    for segment in contents.segments
                ]
            ),
            "checks": json.dumps(checks),
        }
    }
    stop = 0
    for name, (dtype, shape) in contents.tensors().items():
        start, stop = stop, stop + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = {"dtype": _FILE_TYPES[dtype], "shape": shape, "data_offsets": [start, stop]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT)
    raw = len(text).to_bytes(_LENGTH_BYTES, "little") + text
    start = _LENGTH_BYTES + len(_HEADER_PREFIX)
    return raw[:start] + _header_check(raw).encode() + raw[start + _CHECKSUM_DIGITS :]


def _header_check(raw: bytes) -> str:
    start = _LENGTH_BYTES + len(_HEADER_PREFIX)
    return xxhash.xxh3_64_hexdigest(raw[:start] + _CHECKSUM_PLACEHOLDER.encode() + raw[start + _CHECKSUM_DIGITS :])


def _bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, without a copy where it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data

"""Memory files: what they hold, how they are mapped and replaced, and which are refused."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llamory.errors import LlamoryError
from llamory.memory import MemoryBank, files, read_header

DTYPES = ("float32", "bfloat16", "float16", "int8")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def program(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints that runs the code."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


# ---- what a file holds -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_is_a_safetensors_file_of_all_segments_in_order(tmp_path, make_bank, dtype):
    bank = make_bank({"a": 3, "b": 0, "c": 5}, dtype=dtype, fingerprint="model")
    bank.reorder(["c", "b", "a"])
    bank.save(tmp_path / "book")
    stored = load_file(tmp_path / "book")
    parts = ("keys", "values", "key_scales", "value_scales") if dtype == "int8" else ("keys", "values")
    assert set(stored) == {f"layers.{layer}.{part}" for layer in (3, 5) for part in parts}
    for layer in (3, 5):
        for part in ("keys", "values"):
            tensor = stored[f"layers.{layer}.{part}"]
            assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, dtype), (2, 8, 4))
            numbers = tensor.float()
            if dtype == "int8":
                numbers *= stored[f"layers.{layer}.{part.removesuffix('s')}_scales"].unsqueeze(-1)
            assert torch.equal(numbers, getattr(bank, part)(layer))
    with safe_open(tmp_path / "book", "pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"], metadata["dtype"]) == ("llamory memory", "1", dtype)
    assert [each["name"] for each in json.loads(metadata["segments"])] == ["c", "b", "a"]


def test_the_header_describes_the_file(tmp_path, make_bank):
    bank = make_bank({"a": 3, "b": 5}, dtype="int8", fingerprint="model")
    bank.set_metadata("b", source="letters/ö.txt")
    bank.save(tmp_path / "book")
    inside = read_header(tmp_path / "book")
    assert inside == {
        "version": 1,
        "fingerprint": "model",
        "layers": [3, 5],
        "kv_heads": 2,
        "head_dim": 4,
        "dtype": "int8",
        "tokens": 8,
        "bytes": (tmp_path / "book").stat().st_size,
        "segments": [
            {"name": "a", "tokens": 3, "metadata": {}},
            {"name": "b", "tokens": 5, "metadata": {"source": "letters/ö.txt"}},
        ],
    }
    assert json.loads(json.dumps(inside)) == inside


@pytest.mark.parametrize("layers", [(), (0,), (7, 2)])
@pytest.mark.parametrize("segments", [{}, {"a": 0}, {"a": 0, "b": 2}])
def test_small_memories_come_back(tmp_path, make_bank, same_content, layers, segments):
    bank = make_bank(segments, layers=layers)
    bank.save(tmp_path / "book")
    assert same_content(MemoryBank.load(tmp_path / "book"), bank)
    assert len(load_file(tmp_path / "book")) == 2 * len(layers)


def test_layers_of_unequal_length_come_back(tmp_path, make_bank, tokens, same_content):
    bank = make_bank({"a": 3, "b": 2})
    bank.append(5, *tokens(4), segment="a")
    bank.save(tmp_path / "book")
    loaded = MemoryBank.load(tmp_path / "book")
    assert (loaded.length(3, "a"), loaded.length(5, "a")) == (3, 7)
    assert same_content(loaded, bank)


def test_dropped_segments_are_not_in_the_file(tmp_path, make_bank):
    bank = make_bank({"a": 1000, "b": 1})
    bank.save(tmp_path / "both")
    bank.drop("a")
    bank.save(tmp_path / "one")
    saved = (tmp_path / "both").stat().st_size - (tmp_path / "one").stat().st_size
    assert saved >= 1000 * 2 * 2 * 2 * 4 * 4


# ---- mapping ---------------------------------------------------------------------------------------------------------


def test_all_documents_of_a_file_are_one_span(tmp_path, make_bank):
    make_bank({f"document {i}": 10 for i in range(30)}).save(tmp_path / "book")
    assert [len(span) for span in MemoryBank.load(tmp_path / "book").spans(5)] == [300]


@on_linux
def test_loading_maps_the_file_and_copies_nothing(tmp_path, make_bank):
    make_bank({"a": 20}).save(tmp_path / "book")
    bank = MemoryBank.load(tmp_path / "book")
    ranges = [
        tuple(int(end, 16) for end in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(tmp_path / "book"))
    ]
    for layer in bank.layers:
        for tensor in (bank.spans(layer)[0].block.keys, bank.spans(layer)[0].block.values):
            assert any(start <= tensor.data_ptr() < stop for start, stop in ranges)


@on_linux
def test_a_memory_larger_than_the_ram_can_be_mapped(tmp_path):
    width = 2 * 4 * 4
    tokens = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // width
    contents = files.MemoryHeader((0,), 2, 4, "float32", "", (files.StoredSegment("a", (tokens,)),))
    header = files._header_bytes(contents, dict.fromkeys(contents.tensors(), "0" * 16))
    with (tmp_path / "book").open("wb") as file:
        file.write(header)
        try:
            file.truncate(len(header) + 2 * tokens * width)  # all holes
        except OSError:
            pytest.skip("the file system has no files with holes of that size")
    bank = MemoryBank.load(tmp_path / "book", verify=False)
    assert bank.length() == tokens
    assert bank.spans(0)[0].block.values[1, -1].tolist() == [0, 0, 0, 0]


def test_a_loaded_memory_grows_without_touching_its_file(tmp_path, make_bank, tokens):
    bank = make_bank({"a": 4, "b": 2})
    bank.save(tmp_path / "book")
    content = (tmp_path / "book").read_bytes()
    loaded = MemoryBank.load(tmp_path / "book")
    for name in ("a", "b", "c"):
        loaded.append(3, *tokens(3, seed=9), segment=name)
    loaded.spans(5)[0].block.keys.zero_()  # nobody should; the mapping is private all the same
    assert (tmp_path / "book").read_bytes() == content
    assert torch.equal(loaded.keys(3, "a"), torch.cat([bank.keys(3, "a"), tokens(3, seed=9)[0]], 1))


def test_a_memory_can_be_saved_over_the_file_it_is_mapped_from(tmp_path, make_bank, same_content):
    make_bank({"a": 40, "b": 2}).save(tmp_path / "book")
    first, second = MemoryBank.load(tmp_path / "book"), MemoryBank.load(tmp_path / "book")
    expected = first.keys(3, "b")
    first.drop("a")
    first.save(tmp_path / "book")
    assert torch.equal(first.keys(3, "b"), expected)
    assert same_content(second, make_bank({"a": 40, "b": 2}))
    assert MemoryBank.load(tmp_path / "book").segments == ("b",)


@pytest.mark.slow
@on_linux
def test_saving_takes_no_second_copy_of_the_memory(tmp_path):
    code = """
import re, sys, torch
from llamory.memory import MemoryBank
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) // 1024
keys = torch.ones(2, 65536, 64)
def bank():
    made = MemoryBank([0, 1, 2], 2, 64, dtype="float32")
    for layer in made.layers:
        made.append(layer, keys, keys)
    return made
bank = bank()
before = peak()
bank.save(sys.argv[1])
print(bank.nbytes // 2**20, peak() - before)
"""
    size, growth = map(int, program(code, tmp_path / "book").split())
    assert size == 192
    assert growth < size / 10


# ---- replacing -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path):
    code = """
import os, random, signal, sys, time, torch
from llamory.memory import MemoryBank
path = sys.argv[1]
versions = []
for number in (1.0, 2.0):
    bank = MemoryBank([0, 1], 2, 64, dtype="float32")
    for layer in bank.layers:
        bank.append(layer, torch.full((2, 2000, 64), number), torch.full((2, 2000, 64), -number), segment=str(number))
    versions.append(bank)
start = time.monotonic()
versions[0].save(path)
duration = time.monotonic() - start
seen, leftovers, chance, rounds = set(), 0, random.Random(0), 0
while rounds < 20 or (rounds < 200 and (len(seen) < 2 or leftovers == 0)):
    rounds += 1
    child = os.fork()
    if child == 0:
        while True:
            for bank in reversed(versions):
                bank.save(path)
    time.sleep(chance.random() * 4 * duration)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    bank = MemoryBank.load(path)
    (name,) = bank.segments
    assert all((bank.keys(layer) == float(name)).all() and bank.length(layer) == 2000 for layer in bank.layers)
    assert all((bank.values(layer) == -float(name)).all() for layer in bank.layers)
    seen.add(name)
    others = [entry for entry in os.listdir(os.path.dirname(path)) if entry != os.path.basename(path)]
    assert len(others) <= 1, others
    leftovers += len(others)
print(len(seen), leftovers)
"""
    seen, leftovers = map(int, program(code, tmp_path / "book").split())
    assert seen == 2 and leftovers > 0  # else no kill came while a file was written, and this has shown nothing
    bank = MemoryBank.load(tmp_path / "book")
    bank.save(tmp_path / "book")
    assert [entry.name for entry in tmp_path.iterdir()] == ["book"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, make_bank, same_content, monkeypatch, error):
    old, new = make_bank({"a": 3}), make_bank({"b": 3})
    old.save(tmp_path / "book")
    chunks = new._tensor_chunks

    def failing(layer, part):
        if (layer, part) == (5, "values"):
            raise error
        return chunks(layer, part)

    monkeypatch.setattr(new, "_tensor_chunks", failing)
    with pytest.raises(error):
        new.save(tmp_path / "book")
    assert same_content(MemoryBank.load(tmp_path / "book"), old)
    assert [entry.name for entry in tmp_path.iterdir()] == ["book"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, make_bank, same_content):
    old, new = make_bank({"a": 3}), make_bank({"b": 30_000})
    old.save(tmp_path / "book")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="book") as refusal:
            new.save(tmp_path / "book")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert refusal.value.filename == str(tmp_path / "book")
    assert same_content(MemoryBank.load(tmp_path / "book"), old)
    assert [entry.name for entry in tmp_path.iterdir()] == ["book"]


def test_concurrent_saves_leave_a_complete_file(tmp_path, make_bank, same_content):
    banks = [make_bank({f"{i}": 500}) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda bank: [bank.save(tmp_path / "book") for _ in range(10)], banks))
    loaded = MemoryBank.load(tmp_path / "book")
    assert any(same_content(loaded, bank) for bank in banks)
    assert [entry.name for entry in tmp_path.iterdir()] == ["book"]


def test_a_missing_folder_is_made_and_a_link_is_followed(tmp_path, make_bank):
    make_bank({"a": 1}).save(tmp_path / "shelf" / "one" / "book")
    (tmp_path / "link").symlink_to(tmp_path / "shelf" / "one" / "book")
    make_bank({"b": 1}).save(str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert MemoryBank.load(tmp_path / "shelf" / "one" / "book").segments == ("b",)


def test_a_path_that_cannot_be_a_file_is_refused(tmp_path, make_bank):
    (tmp_path / "file").write_text("text")
    with pytest.raises(LlamoryError, match="is a folder"):
        make_bank({}).save(tmp_path)
    with pytest.raises(OSError, match="file"):
        make_bank({}).save(tmp_path / "file" / "book")
    assert (tmp_path / "file").read_text() == "text"


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def book(tmp_path, make_bank) -> Path:
    make_bank({"a": 3, "b": 4}, dtype="int8", fingerprint="one").save(tmp_path / "book")
    return tmp_path / "book"


def refusal(path: Path, **wanted) -> str:
    with pytest.raises(LlamoryError) as refused:
        MemoryBank.load(path, **wanted)
    sentence = str(refused.value)
    assert str(path) in sentence and sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.slow
def test_a_flipped_bit_in_any_byte_is_refused(book):
    whole, chance = book.read_bytes(), random.Random(0)
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << chance.randrange(8)
        book.write_bytes(damaged)
        refusal(book)
    book.write_bytes(whole)
    assert MemoryBank.load(book).segments == ("a", "b")


def test_without_verify_only_damage_of_the_header_is_refused(book):
    whole = book.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")
    for place in (*range(0, end, 7), end - 1):
        book.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(LlamoryError):
            MemoryBank.load(book, verify=False)
        with pytest.raises(LlamoryError):
            read_header(book)
    book.write_bytes(whole[:-1] + bytes([whole[-1] ^ 4]))
    assert "layers.5.values" in refusal(book)
    assert MemoryBank.load(book, verify=False).length() == read_header(book)["tokens"] == 7


@pytest.mark.slow
def test_a_file_of_any_other_length_is_refused(book):
    whole = book.read_bytes()
    for length in range(len(whole)):
        book.write_bytes(whole[:length])
        with pytest.raises(LlamoryError, match="cut short" if length > 30 else "book"):
            MemoryBank.load(book, verify=False)
    book.write_bytes(whole + b"\0")
    assert "added at its end" in refusal(book)


def test_files_of_another_kind_are_refused(tmp_path, book):
    save_file({"model.norm.weight": torch.ones(100)}, tmp_path / "weights", metadata={"format": "pt"})
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("Once upon a time there was a memory. " * 100)
    (tmp_path / "zeros").write_bytes(bytes(1000))
    (tmp_path / "list").write_bytes((4).to_bytes(8, "little") + b"[  ]" + bytes(100))
    assert "safetensors file, but not of a memory" in refusal(tmp_path / "weights")
    for name in ("empty", "text", "zeros", "list"):
        assert "not a memory file" in refusal(tmp_path / name)
    assert "not a file" in refusal(tmp_path)
    assert "no memory file" in refusal(tmp_path / "missing")
    assert "no memory file" in refusal(book / "inside")


def test_a_newer_format_is_refused_and_says_so(book):
    book.write_bytes(book.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    assert "format version 2, and this llamory reads 1: update llamory" in refusal(book)


def test_a_memory_of_another_model_layers_or_dtype_is_refused(book):
    assert "made by another model (fingerprint one, not two)" in refusal(book, fingerprint="two")
    assert "read the documents again with this model" in refusal(book, fingerprint="two")
    assert "memory layers 3, 5, not 3, 4" in refusal(book, layers=[3, 4])
    assert "stored as int8, not as bfloat16" in refusal(book, dtype=torch.bfloat16)
    loaded = MemoryBank.load(book, fingerprint="one", layers=[3, 5], dtype="int8")
    assert (loaded.fingerprint, loaded.dtype) == ("one", torch.int8)
    assert MemoryBank.load(book, fingerprint="").fingerprint == "one"


def test_a_memory_of_an_unknown_model_fits_any(tmp_path, make_bank):
    make_bank({"a": 1}).save(tmp_path / "book")
    assert MemoryBank.load(tmp_path / "book", fingerprint="one").fingerprint == ""


def test_several_files_can_be_attached_to_one_memory(tmp_path, make_bank):
    banks = [make_bank({name: 3}, fingerprint="one") for name in "abc"]
    memory = MemoryBank((3, 5), 2, 4, dtype="float32", fingerprint="one")
    for bank in banks:
        bank.save(tmp_path / bank.segments[0])
        memory.attach(MemoryBank.load(tmp_path / bank.segments[0], fingerprint="one"))
    memory.reorder(["c", "a", "b"])
    assert torch.equal(memory.keys(5), torch.cat([banks[i].keys(5) for i in (2, 0, 1)], 1))
    with pytest.raises(LlamoryError, match="already has a segment 'a'"):
        memory.attach(MemoryBank.load(tmp_path / "a"))

"""A shelf keeps whole files within its budget; the least recently used goes first."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.library.memory_cache import ABANDONED_SECONDS, Shelf, parse_size
from llamory.memory import MemoryBank
from processes import heed_interrupts

LAYERS, KIND = [1], "float32"


def bank(tokens: int, fingerprint: str = "me") -> MemoryBank:
    made = MemoryBank(LAYERS, 2, 8, dtype=KIND, fingerprint=fingerprint)
    made.append(1, torch.full((2, tokens, 8), float(tokens)), torch.zeros(2, tokens, 8), segment="document")
    return made


def take(shelf: Shelf, key: str, fingerprint: str = "me") -> MemoryBank | None:
    return shelf.take(key, fingerprint=fingerprint, layers=LAYERS, dtype=KIND)


def put(shelf: Shelf, key: str, tokens: int = 100) -> None:
    """Put, and let the clock of the file system move on."""
    shelf.put(key, bank(tokens))
    time.sleep(0.01)


def size_of_one(folder: Path) -> int:
    shelf = Shelf(folder / "one", 10**9)
    put(shelf, "a")
    return shelf.nbytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GB", 10**10), ("500 MB", 5 * 10**8), ("1.5k", 1500), (123, 123), ("123", 123), ("2T", 2 * 10**12),
        ("1GiB", 2**30), ("2 KiB", 2048), ("0", 0),
    ],
)  # fmt: skip
def test_sizes_are_read(text, size) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "ten", "-1", "1XB", "1 iB", "1e9"])
def test_what_is_no_size_is_one_sentence(text) -> None:
    with pytest.raises(LlamoryError, match="10GB"):
        parse_size(text)


def test_what_was_put_can_be_taken(tmp_path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    assert take(shelf, "a") is None
    assert shelf.put("a", bank(5))
    found = take(shelf, "a")
    assert found is not None
    assert torch.equal(found.keys(1), torch.full((2, 5, 8), 5.0))
    assert take(shelf, "b") is None


def test_the_least_recently_used_goes_first(tmp_path) -> None:
    one = size_of_one(tmp_path)
    shelf = Shelf(tmp_path / "shelf", 3 * one)
    for key in "abc":
        put(shelf, key)
    assert shelf.names() == ["a", "b", "c"]
    take(shelf, "a")
    time.sleep(0.01)
    put(shelf, "d")
    assert shelf.names() == ["c", "a", "d"]
    assert shelf.nbytes <= shelf.budget


def test_what_must_stay_stays(tmp_path) -> None:
    one = size_of_one(tmp_path)
    shelf = Shelf(tmp_path / "shelf", 2 * one)
    for key in "ab":
        put(shelf, key)
    assert not shelf.make_room(one, keep={"a", "b"})
    assert shelf.names() == ["a", "b"]
    assert shelf.make_room(one, keep={"a"})
    assert shelf.names() == ["a"]


def test_what_is_larger_than_the_budget_is_not_kept_and_drives_nothing_out(tmp_path) -> None:
    shelf = Shelf(tmp_path / "shelf", 2 * size_of_one(tmp_path))
    put(shelf, "a")
    assert not shelf.put("b", bank(1000))
    assert shelf.names() == ["a"]


def test_what_others_put_is_seen_in_time(tmp_path, monkeypatch) -> None:
    one, folder = size_of_one(tmp_path), tmp_path / "shelf"
    mine, others = Shelf(folder, 4 * one), Shelf(folder, 4 * one)
    monkeypatch.setattr("llamory.library.memory_cache.TRUSTED_TIMES", 2)
    for key in "abcdef":
        put(mine, key)
        put(others, key.upper())
    put(mine, "g")
    put(mine, "h")
    assert mine.nbytes <= 4 * one


def test_putting_many_does_not_look_at_all_of_them_each_time(tmp_path, monkeypatch) -> None:
    shelf, looked = Shelf(tmp_path / "shelf"), []
    files = Shelf._files
    monkeypatch.setattr(Shelf, "_files", lambda self: looked.append(None) or files(self))
    for number in range(100):
        shelf.put(str(number), bank(1))
    assert len(looked) < 10


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8), budget=st.integers(0, 60_000))
def test_the_budget_always_holds(tmp_path_factory, sizes, budget) -> None:
    shelf = Shelf(tmp_path_factory.mktemp("shelf"), budget)
    for number, tokens in enumerate(sizes):
        shelf.put(str(number), bank(tokens))
        assert sum(path.stat().st_size for path in shelf.folder.iterdir()) <= budget


def test_a_mounted_memory_outlives_its_file(tmp_path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    put(shelf, "a", 50)
    found = take(shelf, "a")
    assert found is not None
    shelf.drop(["a"])
    assert torch.equal(found.keys(1), torch.full((2, 50, 8), 50.0))


def test_another_models_and_damaged_memories_are_never_given(tmp_path, caplog) -> None:
    shelf = Shelf(tmp_path / "shelf")
    put(shelf, "a")
    assert take(shelf, "a", fingerprint="another") is None
    assert not shelf.has("a")
    put(shelf, "b")
    whole = shelf.path("b").read_bytes()
    shelf.path("b").write_bytes(whole[:-7])
    assert take(shelf, "b") is None
    assert not shelf.has("b")
    assert "removed and read again" in caplog.text


def test_what_a_killed_run_left_goes_after_an_hour(tmp_path) -> None:
    shelf = Shelf(tmp_path / "shelf")
    put(shelf, "a")
    new, old = (shelf.folder / f".{name}.safetensors.partial" for name in ("new", "old"))
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - ABANDONED_SECONDS - 1))
    put(Shelf(shelf.folder), "b")  # another run
    assert new.exists()
    assert not old.exists()
    assert shelf.names() == ["a", "b"]


KILLED = """
    import sys
    from pathlib import Path
    import torch
    from llamory.library.memory_cache import Shelf
    from llamory.memory import MemoryBank

    shelf = Shelf(Path(sys.argv[1]), 10**7)
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        made = MemoryBank([1], 2, 64, dtype="float32", fingerprint="me")
        made.append(1, torch.full((2, 2000, 64), float(number)), torch.zeros(2, 2000, 64), segment="document")
        shelf.put(str(number % 7), made)
"""


def test_a_kill_at_any_moment_leaves_whole_files(tmp_path) -> None:
    folder = tmp_path / "shelf"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(folder)]
    for delay in (0.02, 0.07, 0.11):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=heed_interrupts)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in folder.glob("*.safetensors"):
            MemoryBank.load(path, fingerprint="me", verify=True)
    shelf = Shelf(folder, 10**7)
    assert shelf.names()
    assert shelf.nbytes <= shelf.budget

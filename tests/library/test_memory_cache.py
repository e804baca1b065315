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
from llamory.library.memory_cache import STALE_FILE_SECONDS, MemoryCache, memory_key, parse_size
from llamory.memory import MemoryBank
from processes import heed_interrupts

LAYERS, KIND = [1], "float32"


def bank(tokens: int, fingerprint: str = "me") -> MemoryBank:
    made = MemoryBank(LAYERS, 2, 8, dtype=KIND, fingerprint=fingerprint)
    made.append(1, torch.full((2, tokens, 8), float(tokens)), torch.zeros(2, tokens, 8), segment="document")
    return made


def get(cache: MemoryCache, key: str, fingerprint: str = "me") -> MemoryBank | None:
    return cache.get(key, fingerprint=fingerprint, layers=LAYERS, dtype=KIND)


def put(cache: MemoryCache, key: str, tokens: int = 100) -> None:
    """Put, and let the clock of the file system move on."""
    cache.put(key, bank(tokens))
    time.sleep(0.01)


def size_of_one(folder: Path) -> int:
    cache = MemoryCache(folder / "one", 10**9)
    put(cache, "a")
    return cache.nbytes


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
    cache = MemoryCache(tmp_path / "cache")
    assert get(cache, "a") is None
    assert cache.put("a", bank(5))
    found = get(cache, "a")
    assert found is not None
    assert torch.equal(found.keys(1), torch.full((2, 5, 8), 5.0))
    assert get(cache, "b") is None


def test_the_least_recently_used_goes_first(tmp_path) -> None:
    one = size_of_one(tmp_path)
    cache = MemoryCache(tmp_path / "cache", 3 * one)
    for key in "abc":
        put(cache, key)
    assert cache.stored_keys() == ["a", "b", "c"]
    get(cache, "a")
    time.sleep(0.01)
    put(cache, "d")
    assert cache.stored_keys() == ["c", "a", "d"]
    assert cache.nbytes <= cache.budget


def test_what_must_stay_stays(tmp_path) -> None:
    one = size_of_one(tmp_path)
    cache = MemoryCache(tmp_path / "cache", 2 * one)
    for key in "ab":
        put(cache, key)
    assert not cache.evict(one, protected={"a", "b"})
    assert cache.stored_keys() == ["a", "b"]
    assert cache.evict(one, protected={"a"})
    assert cache.stored_keys() == ["a"]


def test_what_is_larger_than_the_budget_is_not_kept_and_drives_nothing_out(tmp_path) -> None:
    cache = MemoryCache(tmp_path / "cache", 2 * size_of_one(tmp_path))
    put(cache, "a")
    assert not cache.put("b", bank(1000))
    assert cache.stored_keys() == ["a"]


def test_what_others_put_is_seen_in_time(tmp_path, monkeypatch) -> None:
    one, folder = size_of_one(tmp_path), tmp_path / "cache"
    mine, others = MemoryCache(folder, 4 * one), MemoryCache(folder, 4 * one)
    monkeypatch.setattr("llamory.library.memory_cache.CALLS_PER_USAGE_SCAN", 2)
    for key in "abcdef":
        put(mine, key)
        put(others, key.upper())
    put(mine, "g")
    put(mine, "h")
    assert mine.nbytes <= 4 * one


def test_putting_many_does_not_look_at_all_of_them_each_time(tmp_path, monkeypatch) -> None:
    cache, looked = MemoryCache(tmp_path / "cache"), []
    files = MemoryCache._files
    monkeypatch.setattr(MemoryCache, "_files", lambda self: looked.append(None) or files(self))
    for number in range(100):
        cache.put(str(number), bank(1))
    assert len(looked) < 10


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 300), min_size=1, max_size=8), budget=st.integers(0, 60_000))
def test_the_budget_always_holds(tmp_path_factory, sizes, budget) -> None:
    cache = MemoryCache(tmp_path_factory.mktemp("cache"), budget)
    for number, tokens in enumerate(sizes):
        cache.put(str(number), bank(tokens))
        assert sum(path.stat().st_size for path in cache.folder.iterdir()) <= budget


def test_a_mounted_memory_outlives_its_file(tmp_path) -> None:
    cache = MemoryCache(tmp_path / "cache")
    put(cache, "a", 50)
    found = get(cache, "a")
    assert found is not None
    cache.delete(["a"])
    assert torch.equal(found.keys(1), torch.full((2, 50, 8), 50.0))


def test_another_models_and_damaged_memories_are_never_given(tmp_path, caplog) -> None:
    cache = MemoryCache(tmp_path / "cache")
    put(cache, "a")
    assert get(cache, "a", fingerprint="another") is None
    assert not cache.has("a")
    put(cache, "b")
    content = cache.path("b").read_bytes()
    cache.path("b").write_bytes(content[:-7])
    assert get(cache, "b") is None
    assert not cache.has("b")
    assert "removed and read again" in caplog.text


def test_what_a_killed_run_left_goes_after_an_hour(tmp_path) -> None:
    cache = MemoryCache(tmp_path / "cache")
    put(cache, "a")
    new, old = (cache.folder / f".{name}.safetensors.partial" for name in ("new", "old"))
    for path in (new, old):
        path.write_bytes(b"half")
    os.utime(old, (0, time.time() - STALE_FILE_SECONDS - 1))
    put(MemoryCache(cache.folder), "b")  # another run
    assert new.exists()
    assert not old.exists()
    assert cache.stored_keys() == ["a", "b"]


def test_the_key_depends_on_the_content_and_the_reader() -> None:
    assert len({memory_key("content", "reader"), memory_key("other", "reader"), memory_key("content", "other")}) == 3


KILLED = """
    import sys
    from pathlib import Path
    import torch
    from llamory.library.memory_cache import MemoryCache
    from llamory.memory import MemoryBank

    cache = MemoryCache(Path(sys.argv[1]), 10**7)
    print("ready", flush=True)
    number = 0
    while True:
        number += 1
        made = MemoryBank([1], 2, 64, dtype="float32", fingerprint="me")
        made.append(1, torch.full((2, 2000, 64), float(number)), torch.zeros(2, 2000, 64), segment="document")
        cache.put(str(number % 7), made)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_whole_files(tmp_path) -> None:
    folder = tmp_path / "cache"
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
    cache = MemoryCache(folder, 10**7)
    assert cache.stored_keys()
    assert cache.nbytes <= cache.budget

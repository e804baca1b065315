"""Free memory is measured within the machine and the container; out-of-memory errors become one sentence."""

import errno
import os

import pytest

from llamory.common import ram
from llamory.errors import LlamoryError


def test_available_ram_is_limited_by_the_machine_and_the_container(monkeypatch, tmp_path):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < ram.available_ram() <= machine
    for name, text in {"max": "5000", "current": "4000", "stat": "anon 3000\ninactive_file 700"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(ram, "_CGROUP", tmp_path)
    assert ram.available_ram() == 1700


def test_require_free_ram_keeps_a_reserve(monkeypatch):
    monkeypatch.setattr(ram, "available_ram", lambda: ram.RESERVED_BYTES + 10)
    ram.require_free_ram(10)
    with pytest.raises(MemoryError):
        ram.require_free_ram(11)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), OSError(errno.ENOMEM, "short")]
)
def test_out_of_memory_errors_become_one_sentence(error):
    with pytest.raises(LlamoryError, match="too little memory for this: use less"), ram.translate_oom("use less"):
        raise error


def test_other_errors_pass_unchanged():
    with pytest.raises(RuntimeError, match="shapes"), ram.translate_oom("use less"):
        raise RuntimeError("shapes do not match")

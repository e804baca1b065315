"""The command line says what is wrong in one sentence, with an exit code that tells whether the user can mend it."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import llamory as package
from llamory.cli.output import show_size, user_message
from llamory.errors import LlamoryError


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Makes `llamory search` fail with the error it is given."""

    def fail_with(error: BaseException) -> None:
        def library(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setitem(sys.modules, "llamory.library", SimpleNamespace(Library=library))

    return fail_with


SEARCH = ("search", "lamps", "--library", "here")


def test_version_is_printed(llamory) -> None:
    assert llamory("--version") == (0, f"llamory {package.__version__}\n", "")


def test_without_arguments_help_is_shown(llamory) -> None:
    ran = llamory()
    assert ran.code == 0
    for verb in ("train", "export", "index", "search", "info"):
        assert f"\n│ {verb} " in ran.out
    assert "…" not in ran.out  # nothing is cut off


def test_python_dash_m_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "llamory", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"llamory {package.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serch"], "Error: No such command 'serch'. Did you mean 'search'?\n"),
        (["search"], "Error: Missing argument 'query'.\n"),
        (["search", "x"], "Error: Missing option '--library'.\n"),
        (["search", "x", "--libary", "y"], "Error: No such option: --libary (Possible options: --library)\n"),
        (["search", "x", "--library", "y", "--top", "many"], "Error: Invalid value for '--top': "),
        (["train", "lara"], "Error: No such command 'lara'. Did you mean 'llara'?\n"),
    ],
)
def test_a_wrong_command_line_is_one_sentence_and_code_2(llamory, arguments: list[str], sentence: str) -> None:
    ran = llamory(*arguments)
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(sentence)
    assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LlamoryError("The lamp is out; light it."), "The lamp is out; light it."),
        (FileNotFoundError(errno.ENOENT, "No such file", "lamp.txt"), "There is no file or folder lamp.txt."),
        (
            ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib"),
            "This needs the package matplotlib, which is not installed: run pip install 'llamory[plot]'.",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "lamp.txt"), "You have no permission to use lamp.txt."),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "lamps"), "lamps can't be used: Is a directory."),
    ],
)
def test_an_error_the_user_can_mend_is_one_sentence_and_code_2(
    llamory, failing, error: Exception, sentence: str
) -> None:
    failing(error)
    assert llamory(*SEARCH) == (2, "", f"Error: {sentence}\n")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "vectors.lance"),
        RuntimeError("LanceError(IO): No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_whoever_reports_it(llamory, failing, error: Exception) -> None:
    failing(error)
    ran = llamory(*SEARCH)
    assert ran.code == 2
    assert ran.err.startswith("Error: The disk is full")


def test_too_little_memory_is_said_for_torch_and_python() -> None:
    import torch

    with pytest.raises(RuntimeError) as too_much:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), too_much.value):
        assert "memory is too small" in str(user_message(error))


def test_a_fault_of_our_own_is_one_line_and_code_1(llamory, failing) -> None:
    failing(ZeroDivisionError("division by zero"))
    ran = llamory(*SEARCH)
    assert ran.code == 1
    assert ran.err.count("\n") == 1
    assert "ZeroDivisionError: division by zero" in ran.err
    assert "--debug" in ran.err


@pytest.mark.parametrize("where", [0, 4])
def test_debug_shows_the_traceback_wherever_the_flag_stands(llamory, failing, where: int) -> None:
    failing(LlamoryError("The lamp is out."))
    ran = llamory(*SEARCH[:where], "--debug", *SEARCH[where:])
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.endswith("Error: The lamp is out.\n")


def test_the_environment_can_ask_for_tracebacks(llamory, failing, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(LlamoryError("The lamp is out."))
    monkeypatch.setenv("LLAMORY_DEBUG", "1")
    assert "Traceback" in llamory(*SEARCH).err


def test_a_query_may_look_like_a_flag_after_two_dashes(llamory, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    library = SimpleNamespace(search=lambda query, *_, **__: asked.append(query) or [])
    monkeypatch.setitem(sys.modules, "llamory.library", SimpleNamespace(Library=lambda *_, **__: library))
    assert llamory("search", "--library", "here", "--", "--debug").code == 0
    assert asked == ["--debug"]


def test_ctrl_c_is_short_and_code_130(llamory, failing) -> None:
    failing(KeyboardInterrupt())
    assert llamory(*SEARCH) == (130, "", "Interrupted.\n")


def test_quiet_silences_progress_but_not_errors(llamory, monkeypatch: pytest.MonkeyPatch) -> None:
    def library(*_: object, **__: object) -> None:
        print("reading ...", file=sys.stderr)
        raise LlamoryError("The lamp is out.")

    monkeypatch.setitem(sys.modules, "llamory.library", SimpleNamespace(Library=library))
    assert "reading" in llamory(*SEARCH).err
    assert llamory(*SEARCH, "--quiet").err == "Error: The lamp is out.\n"


def test_a_reader_that_leaves_early_is_no_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "llamory", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.stderr == ""


def test_libraries_are_quiet_unless_debugging_or_told_otherwise(llamory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSFORMERS_VERBOSITY", raising=False)
    llamory("--debug")
    assert "TRANSFORMERS_VERBOSITY" not in os.environ
    llamory()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    llamory()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"


def test_sizes_are_shown_with_a_unit() -> None:
    sizes = (999, 1500, 20_000_000, 3_210_000_000)
    assert [show_size(size) for size in sizes] == ["999 bytes", "1.5 kB", "20.0 MB", "3.2 GB"]


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&-", ">&- 2>&- <&-"])
def test_a_standard_stream_may_be_closed(closed: str) -> None:
    command = f"{sys.executable} -m llamory --version {closed}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")

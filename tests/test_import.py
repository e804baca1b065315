"""Importing llamory and asking for help stay light."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "datasets", "lancedb", "numpy", "sentence_transformers", "peft", "pyarrow"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after running the code."""
    program = f"import sys\n{code}\nsys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return {name.partition(".")[0] for name in done.stderr.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import llamory",
        "import llamory.models.base",
        "import llamory.cli",
        "from llamory.llara import LlaraTemplate",
    ],
)
def test_import_loads_no_heavy_library(code: str) -> None:
    modules = modules_after(code)
    assert "llamory" in modules
    assert not modules & HEAVY


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["search", "--help"], ["index", "--help"]])
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    code = f"""
from llamory.cli import main
try:
    main({arguments})
except SystemExit as end:
    assert end.code == 0, end.code
"""
    assert not modules_after(code) & HEAVY

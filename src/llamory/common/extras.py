"""The optional packages of each extra, and one sentence where one is missing."""

from __future__ import annotations

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from llamory.errors import LlamoryError

# Import names of each extra in pyproject.toml.
EXTRAS = {
    "train": ("accelerate", "datasets", "bm25s", "stopwordsiso"),
    "eval": ("bm25s", "pytrec_eval", "scipy"),
    "plot": ("matplotlib",),
    "ray": ("ray",),
    "gguf": ("gguf",),
    "mteb": ("mteb",),
}


def require(extra: str) -> None:
    """Check that the modules of an extra are installed, without importing them; else raise LlamoryError."""
    for name in EXTRAS[extra]:
        found = None
        with suppress(ImportError, ValueError):  # ValueError: sys.modules holds None for a blocked module
            found = find_spec(name)
        if found is None:
            raise LlamoryError(_sentence(name, extra))


def import_extra(name: str) -> ModuleType:
    """Import a module of an extra, such as "matplotlib.figure"; raise LlamoryError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        if (sentence := explain_import_error(error)) is None:
            raise
        raise LlamoryError(sentence) from error


def explain_import_error(error: ImportError) -> str | None:
    """The sentence for a missing optional module; None if the error is about another module."""
    name = (error.name or "").partition(".")[0]
    extra = next((extra for extra, modules in EXTRAS.items() if name in modules), None)
    return None if extra is None else _sentence(name, extra)


def _sentence(name: str, extra: str) -> str:
    return f"This needs the package {name}, which is not installed: run pip install 'llamory[{extra}]'."

"""LLARA: a LLaMA learns passage embeddings without labels (Li et al. 2023, arXiv:2312.15503)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamory.llara.modeling import NewLlamaModel, PreLlamaModel, PreModel
    from llamory.llara.template import LlaraTemplate

__all__ = ["LlaraTemplate", "NewLlamaModel", "PreLlamaModel", "PreModel"]


def __getattr__(name: str) -> Any:
    # Importing the package stays cheap: torch is loaded with the first model class that is asked for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"llamory.llara.{'template' if name == 'LlaraTemplate' else 'modeling'}"), name)

"""LongLLaMA: a LLaMA whose memory layers see all that was read before (Tworkowski et al. 2023, arXiv:2307.03170)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamory.longllama.cache import LongLlamaCache
    from llamory.longllama.causal import LongLlamaForCausalLM
    from llamory.longllama.configuration import LongLlamaConfig
    from llamory.longllama.modeling import LongLlamaModel

__all__ = ["LongLlamaCache", "LongLlamaConfig", "LongLlamaForCausalLM", "LongLlamaModel"]

_HOMES = {"LongLlamaConfig": "configuration", "LongLlamaCache": "cache", "LongLlamaForCausalLM": "causal"}


def __getattr__(name: str) -> Any:
    # Importing the package stays cheap: torch is loaded with the first class that is asked for.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'modeling')}"), name)

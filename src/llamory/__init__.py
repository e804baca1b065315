"""llamory: retrieval and long-term memory for LLaMA-family models."""

from llamory.models import register_longllama as _register_longllama

__version__ = "0.1.0"

_register_longllama()

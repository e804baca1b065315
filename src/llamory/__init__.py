"""llamory: retrieval and long-term memory for LLaMA-family models."""

from llamory.models.registration import register as _register

__version__ = "0.1.0"

_register()

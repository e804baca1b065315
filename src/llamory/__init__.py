"""llamory: retrieval and long-term memory for LLaMA-family models."""

__version__ = "0.1.0"

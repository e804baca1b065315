"""LLARA checkpoints as embedding models: load, encode, whiten, export in the format of Sentence Transformers."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llamory.embedding.encoder import embed_passages, embed_query, fingerprint, resolve_chunk_size

__all__ = ["embed_passages", "embed_query", "fingerprint", "resolve_chunk_size"]


def __getattr__(name: str) -> Any:
    # Importing the package stays cheap: torch and transformers are loaded at the first use of a function.
    if name in __all__:
        from llamory.embedding import encoder

        return getattr(encoder, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

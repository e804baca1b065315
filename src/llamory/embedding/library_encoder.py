"""What a library asks of its embedding model: vectors, a tokenizer to cut passages with, and who it is."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 32
DEFAULT_CHUNK_SIZE = 256


def embed_passages(
    embedder: SentenceTransformer,
    texts: list[str],
    advance: Callable[[int], None] = lambda _: None,
    *,
    bf16: bool = False,
) -> np.ndarray:
    """Embed passages: a LLARA model's without padding, another model's in batches of similar length.

    Args:
        embedder: the model.
        texts: at least one passage.
        advance: is told how many passages each batch had.
        bf16: compute in bfloat16: up to three times faster where the processor knows it, at three digits less.

    Returns:
        float32 vectors (passages, dimension), in the order of the texts.
    """
    import numpy as np
    import torch

    from llamory.embedding.encoder import FlatEncoder
    from llamory.embedding.pipeline import escape_slot_tokens

    texts = escape_slot_tokens(embedder, texts)
    if (encoder := FlatEncoder.from_embedder(embedder)) is not None:
        with torch.autocast(embedder.device.type, torch.bfloat16, enabled=bf16):
            return encoder.encode(texts, "document", advance)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    batches = []
    for start in range(0, len(texts), BATCH_SIZE):
        batch = [texts[i] for i in order[start : start + BATCH_SIZE]]
        with torch.autocast(embedder.device.type, torch.bfloat16, enabled=bf16):
            batches.append(embedder.encode_document(batch, batch_size=BATCH_SIZE, show_progress_bar=False))
        advance(len(batch))
    vectors = np.concatenate(batches).astype(np.float32)
    return vectors[np.argsort(order)]


def embed_query(embedder: SentenceTransformer, query: str) -> np.ndarray:
    """Embed a query: a float32 vector (dimension,)."""
    vector: np.ndarray = embed_queries(embedder, [query])[0]
    return vector


def embed_queries(embedder: SentenceTransformer, queries: list[str], *, bf16: bool = False) -> np.ndarray:
    """Embed queries: float32 vectors (queries, dimension). `bf16` as for `embed_passages`."""
    import torch

    from llamory.embedding.encoder import FlatEncoder
    from llamory.embedding.pipeline import escape_slot_tokens

    texts = escape_slot_tokens(embedder, queries)
    with torch.autocast(embedder.device.type, torch.bfloat16, enabled=bf16):
        if (encoder := FlatEncoder.from_embedder(embedder)) is not None:
            return encoder.encode(texts, "query")
        return embedder.encode_query(texts, show_progress_bar=False).astype("float32")


def chunk_tokenizer(embedder: SentenceTransformer) -> PreTrainedTokenizerBase:
    """The model's tokenizer, as transformers knows it."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = embedder.tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer


def resolve_chunk_size(embedder: SentenceTransformer, requested: int | None) -> int:
    """How long passages may be, in tokens, so that the model reads each to its end.

    Args:
        embedder: the model.
        requested: the length asked for; by default 256, or less where the model has room for less.

    Raises:
        LlamoryError: the model has no room for the length asked for.
    """
    limit = embedder.max_seq_length
    if limit is None or not math.isfinite(limit):
        return requested or DEFAULT_CHUNK_SIZE
    prompt = embedder.preprocess([""], task="document")["input_ids"].shape[-1]
    max_chunk_size = limit - prompt
    if requested is not None and requested > max_chunk_size:
        raise LlamoryError(
            f"Passages of {requested} tokens don't fit the model, which reads {limit} with {prompt} of them for its "
            f"prompt; choose a passage length of at most {max_chunk_size}."
        )
    return requested or min(DEFAULT_CHUNK_SIZE, max_chunk_size)


def fingerprint(embedder: SentenceTransformer) -> str:
    """A short hash of all that makes a model's vectors its own: weights, modules and prompts."""
    import torch

    from llamory.models.adapters import merged

    int_types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    # Sums of the weights' bits: exact, the same on every device, and as fast as memory can be read.
    sums: dict[str, Any] = {}
    for name, make in merged(embedder, embedder.state_dict().items()):
        weight = make()
        bits = weight.detach().contiguous().reshape(-1).view(int_types[weight.element_size()])
        sums[name] = [list(weight.shape), int(bits.sum(dtype=torch.int64))]
    state = {
        "weights": sums,
        "modules": [type(module).__name__ for module in embedder],
        "prompts": embedder.prompts,
        "chat_template": getattr(embedder.tokenizer, "chat_template", None),
    }
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]

"""Texts to vectors with any embedder; those of LLARA without padding, several times as fast on uneven texts.

`FlatEncoder` limits a batch by its tokens and concatenates its texts; the last layer computes the slot tokens only.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamory.embedding.cpu_kernels import linear, swiglu
from llamory.embedding.export_tokenizer import SEGMENT_SEPARATOR
from llamory.errors import LlamoryError
from llamory.llara.attention import flat_attention
from llamory.llara.layout import SequenceLayout, find_layout
from llamory.llara.template import LlaraTemplate, slot_tokens
from llamory.models.adapters import merged

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerBase

DEFAULT_CHUNK_SIZE = 256
BATCH_SIZE = 32  # texts of a batch of Sentence Transformers
# Tokens of a flat batch: on a CPU few enough for its caches, elsewhere enough to keep the device busy.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 32768
TOKENIZER_BATCH_SIZE = 256

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # frequencies depend on the longest text of a batch
_FINGERPRINTS: WeakKeyDictionary[nn.Module, tuple[Any, str]] = WeakKeyDictionary()


def embed_passages(
    embedder: SentenceTransformer,
    texts: list[str],
    advance: Callable[[int], None] = lambda _: None,
    *,
    dtype: str | torch.dtype | None = None,
) -> np.ndarray:
    """Embed at least one passage: float32 vectors (passages, dimension).

    `advance` gets the number of passages of each finished batch; `dtype`, such as "bfloat16", is that of autocast.
    """
    texts = escape_slot_tokens(embedder, texts)
    with _autocast(embedder, dtype):
        if (encoder := FlatEncoder.from_embedder(embedder)) is not None:
            return encoder.encode(texts, "document", advance)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
        batches = []
        for start in range(0, len(texts), BATCH_SIZE):
            batch = [texts[i] for i in order[start : start + BATCH_SIZE]]
            batches.append(embedder.encode_document(batch, batch_size=BATCH_SIZE, show_progress_bar=False))
            advance(len(batch))
    vectors = np.concatenate(batches).astype(np.float32)
    return vectors[np.argsort(order)]


def embed_query(embedder: SentenceTransformer, query: str, *, dtype: str | torch.dtype | None = None) -> np.ndarray:
    """Embed a query: a float32 vector (dimension,). `dtype` as for `embed_passages`."""
    return embed_queries(embedder, [query], dtype=dtype)[0]


def embed_queries(
    embedder: SentenceTransformer, queries: list[str], *, dtype: str | torch.dtype | None = None
) -> np.ndarray:
    """Embed queries: float32 vectors (queries, dimension). `dtype` as for `embed_passages`."""
    texts = escape_slot_tokens(embedder, queries)
    with _autocast(embedder, dtype):
        if (encoder := FlatEncoder.from_embedder(embedder)) is not None:
            return encoder.encode(texts, "query")
        return embedder.encode_query(texts, show_progress_bar=False).astype("float32")


def _autocast(embedder: SentenceTransformer, dtype: str | torch.dtype | None) -> AbstractContextManager[Any]:
    torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return torch.autocast(embedder.device.type, torch_dtype, enabled=torch_dtype is not None)


def llara_template(embedder: SentenceTransformer) -> LlaraTemplate | None:
    """The template of a LLARA embedder; None for any other."""
    config: Any = getattr(embedder[0], "config", None)
    return LlaraTemplate.from_config(config) if getattr(config, "model_type", None) == "llama" else None


def is_llara(embedder: SentenceTransformer) -> bool:
    """Whether an embedder is a LLARA model."""
    return llara_template(embedder) is not None


def escape_slot_tokens(embedder: SentenceTransformer, texts: list[str]) -> list[str]:
    """Rewrite what a LLARA embedder refuses to read: a slot token such as `<s1>` in a text becomes `< s1>`."""
    if (template := llara_template(embedder)) is None:
        return texts
    for token in slot_tokens(template.slots):
        texts = [text.replace(token, f"< {token[1:]}") for text in texts]
    return [text.replace(SEGMENT_SEPARATOR, "") for text in texts]


def chunk_tokenizer(embedder: SentenceTransformer) -> PreTrainedTokenizerBase:
    """The embedder's tokenizer as one of transformers."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tokenizer = embedder.tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer) if isinstance(tokenizer, Tokenizer) else tokenizer


def resolve_chunk_size(embedder: SentenceTransformer, requested: int | None) -> int:
    """Tokens of a chunk: as requested, or else 256 or what the embedder reads if that is less.

    Raises LlamoryError if the requested size exceeds the embedder's limit.
    """
    limit = embedder.max_seq_length
    if limit is None or not math.isfinite(limit):
        return requested or DEFAULT_CHUNK_SIZE
    prompt = embedder.preprocess([""], task="document")["input_ids"].shape[-1]
    max_chunk_size = limit - prompt
    if requested is not None and requested > max_chunk_size:
        problem = f"Chunks of {requested} tokens don't fit the model, which reads {limit} with a prompt of {prompt}"
        raise LlamoryError(f"{problem}; choose a chunk size of at most {max_chunk_size}.")
    return requested or min(DEFAULT_CHUNK_SIZE, max_chunk_size)


def fingerprint(embedder: SentenceTransformer) -> str:
    """A short hash of all that an embedder's vectors depend on; weights are read again only after they changed."""
    parts = {
        "modules": [type(module).__name__ for module in embedder],
        "prompts": embedder.prompts,
        "chat_template": getattr(embedder.tokenizer, "chat_template", None),
    }
    versions = [(name, tensor.data_ptr(), tensor._version) for name, tensor in embedder.state_dict().items()]
    state = (versions, json.dumps(parts, sort_keys=True))
    if embedder not in _FINGERPRINTS or _FINGERPRINTS[embedder][0] != state:
        digest = hashlib.sha256(json.dumps({"weights": _bit_sums(embedder), **parts}, sort_keys=True).encode())
        _FINGERPRINTS[embedder] = (state, digest.hexdigest()[:16])
    return _FINGERPRINTS[embedder][1]


def _bit_sums(embedder: SentenceTransformer) -> dict[str, Any]:
    """Shape and sum of the bits of each weight: exact, the same on every device, as fast as memory is read."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums: dict[str, Any] = {}
    for name, materialize in merged(embedder, embedder.state_dict().items()):
        weight = materialize()
        bits = weight.detach().contiguous().reshape(-1).view(words[weight.element_size()])
        sums[name] = [list(weight.shape), int(bits.sum(dtype=torch.int64))]
    return sums


class FlatEncoder:
    """Encodes texts with the modules of a LLARA embedder; see `from_embedder`."""

    def __init__(self, embedder: SentenceTransformer, template: LlaraTemplate) -> None:
        self._embedder = embedder
        self._slots = template.slots
        self._model: LlamaModel = embedder[0].auto_model

    @classmethod
    def from_embedder(cls, embedder: SentenceTransformer) -> FlatEncoder | None:
        """The encoder of a LLARA embedder of stock modules; None for any other embedder."""
        from sentence_transformers.base.modules.transformer import Transformer
        from sentence_transformers.sentence_transformer.modules import WordWeights

        if len(embedder) < 3 or type(embedder[0]) is not Transformer or type(embedder[1]) is not WordWeights:
            return None
        model = embedder[0].auto_model
        if type(model) is not LlamaModel or not _supports_flat_batches(model) or any(embedder.prompts.values()):
            return None
        template = LlaraTemplate.from_config(model.config)
        weighted = embedder[1].emb_layer.weight.flatten().nonzero().flatten().tolist()
        return cls(embedder, template) if template is not None and set(weighted) == set(template.slot_ids) else None

    def encode(
        self, texts: Sequence[str], task: str = "document", advance: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """Float32 vectors (texts, dimension) of texts without slot tokens for a task, "document" or "query"."""
        from sentence_transformers.util import truncate_embeddings

        self._embedder.eval()
        batches, order = [], []
        token_budget = CPU_BATCH_TOKENS if self._embedder.device.type == "cpu" else GPU_BATCH_TOKENS
        with torch.inference_mode():
            ids = self._token_ids(texts, task)
            for indices in _batches([len(row) for row in ids], token_budget):
                batches.append(self._encode([ids[i] for i in indices], task).float().cpu())
                order += indices
                advance(len(indices))
            joined = torch.cat(batches)
            vectors = torch.empty_like(joined).index_copy(0, torch.tensor(order), joined)
            if self._embedder.truncate_dim is not None:
                vectors = truncate_embeddings(vectors, self._embedder.truncate_dim)
        return vectors.numpy()

    def _token_ids(self, texts: Sequence[str], task: str) -> list[Tensor]:
        """The ids (length,) of each text with its prompt, as Sentence Transformers makes them."""
        ids: list[Tensor] = [torch.empty(0)] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), TOKENIZER_BATCH_SIZE):
            indices = order[start : start + TOKENIZER_BATCH_SIZE]
            features = self._embedder.preprocess([texts[i] for i in indices], task=task)
            lengths = features["attention_mask"].sum(1).tolist()
            for i, row, length in zip(indices, features["input_ids"], lengths, strict=True):
                ids[i] = row[:length] if self._embedder.tokenizer.padding_side == "right" else row[-length:]
        return ids

    def _encode(self, ids: list[Tensor], task: str) -> Tensor:
        """(texts, dimension) of the texts' ids: the model, then the other modules on the slots only."""
        device = self._embedder.device
        layout, flat = _layout([len(row) for row in ids], device), torch.cat(ids).to(device)
        ends = layout.offsets + layout.lengths("main")
        output_indices = (ends[:, None] + torch.arange(-self._slots, 0, device=device)).flatten()
        features: dict[str, Any] = {
            "token_embeddings": slot_states(self._model, flat, layout, output_indices).unflatten(0, (len(ids), -1)),
            "input_ids": flat[output_indices].unflatten(0, (len(ids), -1)),
            "attention_mask": torch.ones(len(ids), self._slots, dtype=torch.long, device=device),
            "task": task,  # read by a Router after the pooling
        }
        for module in list(self._embedder)[1:]:
            features = module(features)
        return features["sentence_embedding"]


def slot_states(model: LlamaModel, ids: Tensor, layout: SequenceLayout, output_indices: Tensor) -> Tensor:
    """(K, hidden) last hidden states of the tokens `output_indices` (K,) of a flat batch of ids (N,)."""
    x = model.embed_tokens(ids)
    rotary = model.rotary_emb(x[None], layout.position_ids[None])
    for layer in model.layers[:-1]:
        x = _feed_forward(layer, linear(layer.self_attn.o_proj, _attend(layer, x, rotary, layout), add=x))
    layer = model.layers[-1]
    attended = _attend(layer, x, rotary, layout)[output_indices]
    return model.norm(_feed_forward(layer, linear(layer.self_attn.o_proj, attended, add=x[output_indices])))


def _attend(layer: Any, x: Tensor, rotary: tuple[Tensor, Tensor], layout: SequenceLayout) -> Tensor:
    """(N, heads * head_dim), a layer's attention before its output projection."""
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    query, key, value = (
        linear(projection, normed).view(1, len(x), -1, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotary)
    return flat_attention(attention, query, key, value, layout).flatten(2)[0]


def _feed_forward(layer: Any, x: Tensor) -> Tensor:
    mlp, normed = layer.mlp, layer.post_attention_layernorm(x)
    return linear(mlp.down_proj, swiglu(mlp.gate_proj, mlp.up_proj, normed), add=x)


def _supports_flat_batches(model: LlamaModel) -> bool:
    config = model.config
    implementation = (config._attn_implementation or "sdpa").split("|")[-1]
    fixed_rope = config.rope_parameters["rope_type"] not in _LENGTH_DEPENDENT_ROPE
    return config.hidden_act == "silu" and fixed_rope and (implementation == "sdpa" or "flash" in implementation)


def _batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Indices of the texts of each batch, longest first, at most `token_budget` tokens (or one text) in each."""
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and tokens + lengths[i] > token_budget:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += lengths[i]
    if batch:
        yield batch


def _layout(lengths: Sequence[int], device: torch.device) -> SequenceLayout:
    """The layout of plain causal segments, one after the other."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).to(device)
    return find_layout(mask.long(), None, mask)

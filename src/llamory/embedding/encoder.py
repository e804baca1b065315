"""Texts to vectors without padding: what a LLARA embedder's `encode` gives, several times as fast on uneven texts.

Sentence Transformers fills every batch up to its longest text. Here a batch is a number of tokens, not of texts, laid
out one after the other: nothing is padded, no mask is made, and what a batch computes fits into the processor's cache.
After its attention, the last layer works for the slot tokens alone, as nothing else is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llamory.embedding.cpu_kernels import linear, swiglu
from llamory.llara.attention import flat_attention
from llamory.llara.layout import SegmentLengths, SequenceLayout
from llamory.llara.template import LlaraTemplate

if TYPE_CHECKING:
    import numpy as np
    from sentence_transformers import SentenceTransformer

# Tokens of one batch: on a CPU few enough for its caches, elsewhere enough to keep the device busy.
CPU_BATCH_TOKENS = 2048
GPU_BATCH_TOKENS = 32768
TOKENIZER_BATCH_SIZE = 256

# Those whose positions depend on the longest text of a batch.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class FlatEncoder:
    """Encodes texts with the modules of a LLARA embedder. `of` says whether an embedder is one."""

    def __init__(self, embedder: SentenceTransformer, template: LlaraTemplate) -> None:
        self._embedder = embedder
        self._slots = template.slots
        self._model: LlamaModel = embedder[0].auto_model

    @classmethod
    def from_embedder(cls, embedder: SentenceTransformer) -> FlatEncoder | None:
        """The encoder of a LLARA embedder of stock modules; None for every other embedder."""
        from sentence_transformers.base.modules.transformer import Transformer
        from sentence_transformers.sentence_transformer.modules import WordWeights

        if len(embedder) < 3 or type(embedder[0]) is not Transformer or type(embedder[1]) is not WordWeights:
            return None
        model = embedder[0].auto_model
        if type(model) is not LlamaModel or not _supports_flat_batches(model) or any(embedder.prompts.values()):
            return None
        template = LlaraTemplate.from_config(model.config)
        if template is None:
            return None
        weighted = embedder[1].emb_layer.weight.flatten().nonzero().flatten().tolist()
        if set(weighted) != set(template.summarize_slot_ids + template.predict_slot_ids):
            return None
        return cls(embedder, template)

    def encode(
        self, texts: Sequence[str], task: str = "document", advance: Callable[[int], None] = lambda _: None
    ) -> np.ndarray:
        """Encode texts.

        Args:
            texts: at least one text; none may contain a slot token.
            task: "document" or "query".
            advance: is told how many texts each batch had.

        Returns:
            float32 vectors (texts, dimension), in the order of the texts.
        """
        from sentence_transformers.util import truncate_embeddings

        self._embedder.eval()
        parts, order = [], []
        with torch.inference_mode():
            ids = self._token_ids(texts, task)
            for indices in _batches([len(row) for row in ids], self._token_budget()):
                parts.append(self._encode([ids[i] for i in indices], task).float().cpu())
                order += indices
                advance(len(indices))
            vectors = torch.empty_like(joined := torch.cat(parts)).index_copy(0, torch.tensor(order), joined)
            if self._embedder.truncate_dim is not None:
                vectors = truncate_embeddings(vectors, self._embedder.truncate_dim)
        return vectors.numpy()

    def _token_budget(self) -> int:
        return CPU_BATCH_TOKENS if self._embedder.device.type == "cpu" else GPU_BATCH_TOKENS

    def _token_ids(self, texts: Sequence[str], task: str) -> list[Tensor]:
        """The ids (length,) of each text with its prompts, as Sentence Transformers makes them."""
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
        """(texts, dimension) of some texts' ids: the model's part, then the modules after it on the slots alone."""
        device = self._embedder.device
        layout, flat = _layout([len(row) for row in ids], device), torch.cat(ids).to(device)
        last = layout.offsets + layout.lengths("main")
        output_indices = (last[:, None] + torch.arange(-self._slots, 0, device=device)).flatten()
        features: dict[str, Any] = {
            "token_embeddings": slot_states(self._model, flat, layout, output_indices).unflatten(0, (len(ids), -1)),
            "input_ids": flat[output_indices].unflatten(0, (len(ids), -1)),
            "attention_mask": torch.ones(len(ids), self._slots, dtype=torch.long, device=device),
            "task": task,  # a Router after the pooling asks for it
        }
        for module in list(self._embedder)[1:]:
            features = module(features)
        return features["sentence_embedding"]


def slot_states(model: LlamaModel, ids: Tensor, layout: SequenceLayout, output_indices: Tensor) -> Tensor:
    """Run a LLaMA over a flat batch and give the last hidden states of some of its tokens.

    Args:
        model: the model, without dropout.
        ids: (N,) the batch's token ids.
        layout: its segments.
        output_indices: (K,) flat index of the tokens whose states are wanted.

    Returns:
        (K, hidden)
    """
    x = model.embed_tokens(ids)
    rotary = model.rotary_emb(x[None], layout.position_ids[None])
    for layer in model.layers[:-1]:
        x = _feed_forward(layer, linear(layer.self_attn.o_proj, _attend(layer, x, rotary, layout), add=x))
    layer = model.layers[-1]
    attended = _attend(layer, x, rotary, layout)[output_indices]
    return model.norm(_feed_forward(layer, linear(layer.self_attn.o_proj, attended, add=x[output_indices])))


def _attend(layer: Any, x: Tensor, rotary: tuple[Tensor, Tensor], layout: SequenceLayout) -> Tensor:
    """(N, heads * head_dim) what a layer's attention gives, before its output projection."""
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
    return (
        config.hidden_act == "silu"
        and config.rope_parameters["rope_type"] not in _LENGTH_DEPENDENT_ROPE
        and (implementation == "sdpa" or "flash" in implementation)
    )


def _batches(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Places of texts, longest first, of about as many tokens as the token_budget; equal ones stay together."""
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
    """Segments that are plain causal, one after the other."""
    total, longest = sum(lengths), max(lengths)
    sizes = torch.tensor(lengths)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    positions = torch.arange(total) - (sizes.cumsum(0) - sizes)[segments]
    none = torch.empty(0, 0, dtype=torch.long)
    return SequenceLayout(
        shape=(len(lengths), longest),
        index=(segments * longest + positions).to(device),
        position_ids=positions.to(device),
        segment_ids=segments.to(device),
        segments=tuple(SegmentLengths(shared=length, summary=0, tail=0) for length in lengths),
        summarize_slots=none,
        summarize_segments=none,
        predict_slots=none,
        predict_segments=none,
    )

"""Which documents in memory a question is about: those in whose memory the question itself is likeliest.

Query likelihood (Ponte and Croft 1998; with a language model Sachan et al. 2022, arXiv:2204.07496), from memories: no
token of a document is read again. A reader with many documents in one softmax may take another document's fact of the
same kind for the one that is asked for; the names in a question tell the documents apart long before the answer does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.longllama.cache import LongLlamaCache
from llamory.memory import MemoryBank

if TYPE_CHECKING:
    from llamory.longllama import LongLlamaForCausalLM

# Documents whose question is so many times less likely than the best one's aren't answered from.
DEFAULT_FOCUS = 100.0
_AT_ONCE = 16


@torch.no_grad()
def question_likelihoods(
    model: LongLlamaForCausalLM, question: Sequence[int], memory: MemoryBank, documents: Sequence[str]
) -> Tensor:
    """Log-likelihood of a question's tokens with one document at a time in memory.

    Args:
        model: the model.
        question: its tokens; the first one isn't predicted.
        memory: with a segment for each of the documents.
        documents: their names.

    Returns:
        (documents,) in float64, in nats: the sum of ln p(token | tokens before, document).
    """
    found = []
    for start in range(0, len(documents), _AT_ONCE):
        names = documents[start : start + _AT_ONCE]
        ids = torch.tensor([list(question)] * len(names), device=model.device)
        cache = LongLlamaCache(model.config, [only(memory, [name]) for name in names])
        logits = model(ids, past_key_values=cache).logits[:, :-1].float()
        tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        found.append(-tokens.view(len(names), -1).double().sum(1).cpu())
    return torch.cat(found)


def choose(
    model: LongLlamaForCausalLM,
    question: Sequence[int],
    memory: MemoryBank,
    documents: Sequence[str],
    focus: float,
) -> list[str]:
    """The documents to answer from, in their order.

    Args:
        model, question, memory, documents: as for `question_likelihoods`.
        focus: left out is what makes the question so many times less likely than the best document does; 0: nothing.
    """
    question = list(question)[-model.config.max_position_embeddings :]
    if not focus or len(documents) < 2 or len(question) < 2:
        return list(documents)
    likelihoods = question_likelihoods(model, question, memory, documents)
    least = float(likelihoods.max()) - math.log(focus)
    return [name for name, each in zip(documents, likelihoods.tolist(), strict=True) if each >= least]


def only(memory: MemoryBank, documents: Sequence[str]) -> MemoryBank:
    """A bank with these documents of a memory, in this order; it shares their blocks."""
    bank = MemoryBank(
        memory.layers,
        memory.kv_heads,
        memory.head_dim,
        dtype=memory.dtype,
        device=memory.device,
        fingerprint=memory.fingerprint,
    )
    bank.mount(memory, documents)
    return bank

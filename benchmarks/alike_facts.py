"""Facts that are alike: the loss of answers about documents that hold many, and the share that is right to the end.

    python recipes/document_facts.py MOUNTED.jsonl --texts DOCUMENTS --documents 12
    python benchmarks/alike_facts.py MOUNTED.jsonl [--model reader] [--num-negatives 40] [--negative-weight 1 30]

Every question is answer_mask by itself, with its document in memory, row by row as it was read apart: alone, and beside rows
of the other documents, each of which counts as so many of its kind in the softmax.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import logging

from llamory.longllama.loading import load_long_model
from llamory.longllama.losses import IGNORE_INDEX
from llamory.models.base import load_tokenizer
from llamory.training.instruct.batches import (
    DocumentExamples,
    HiddenStateCache,
    MemorySplit,
    build_context,
    collate_frozen_contexts,
)
from llamory.training.instruct.dataset import InstructFormat, Lengths, load_instructions

MAX_TOKENS, UNLIMITED_TOKENS = 16_384, 1 << 40  # tokens


@torch.no_grad()
def measure(model: Any, batch: dict[str, Any], states: HiddenStateCache) -> tuple[float, float]:
    """Mean loss of the answers' tokens, and the share of answers whose tokens are all the likeliest."""
    read = states.get(model.model, batch["context_ids"], batch["context_lengths"])
    hidden = model.model(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        contexts=batch["contexts"],
        context_weights=batch.get("context_weights"),
        context_states=read,
        context_lengths=batch["context_lengths"],
    ).last_hidden_state
    losses, right = [], []
    for row, targets in zip(hidden, batch["shift_labels"], strict=True):
        answer_mask = targets != IGNORE_INDEX
        logits = model.lm_head(row[answer_mask]).float()
        losses.append(cross_entropy(logits, targets[answer_mask], reduction="none"))
        right.append(bool((logits.argmax(-1) == targets[answer_mask]).all()))
    return float(torch.cat(losses).mean()), sum(right) / len(right)


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="reader")
    parser.add_argument("--num-negatives", type=int, default=40, help="of other documents")
    parser.add_argument(
        "--negative-weight", type=float, nargs="+", default=[1, 30], help="what each of these counts as"
    )
    options = parser.parse_args()
    logging.set_verbosity_error()
    tokenizer = load_tokenizer(options.model)
    model = load_long_model(options.model, dtype=torch.bfloat16)
    window = model.config.max_position_embeddings
    instruct_format, lengths = InstructFormat(post_question_text=""), Lengths(MAX_TOKENS, MAX_TOKENS, MAX_TOKENS)
    examples = DocumentExamples(load_instructions(options.data, tokenizer, instruct_format, lengths))
    split = MemorySplit(window, window, MAX_TOKENS, "memory")
    documents = [build_context(examples[number], split, random.Random(0)) for number in range(len(examples))]
    states = HiddenStateCache(sum(len(each.rows) for each in documents))
    for rows, negative_weight in [
        (0, 1.0),
        *((options.num_negatives, negative_weight) for negative_weight in options.negative_weight),
    ]:
        settings: dict[str, Any] = {
            "query_token_budget": UNLIMITED_TOKENS,
            "negatives": rows,
            "negative_weight": (negative_weight, negative_weight),
        }
        batch = collate_frozen_contexts(documents, tokenizer.pad_token_id, **settings, rng=random.Random(0))
        loss, share = measure(model, batch, states)
        sys.stdout.write(f"{rows} other rows, counting {negative_weight:g} times: loss {loss:.2f}, right {share:.0%}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

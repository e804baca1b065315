"""How much of what it could answer a reader loses among other documents: the loss of answers, by size of the memory.

    python recipes/hidden_facts.py PLAIN.jsonl --as plain --texts DOCUMENTS --num-documents 60
    python benchmarks/drowned_facts.py PLAIN.jsonl --model base --model reader [--num-documents 8]

A document with facts in it is in memory, the questions are local. Beside it eight rows of other documents are in
memory, each of which counts as so many of its kind in the softmax, so that they stand for a memory of that size. With
`--model base` and other models without memory layers of their own, memory is in the layers of the packaged reader.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from llamory.longllama.loading import load_long_model
from llamory.longllama.losses import IGNORE_INDEX
from llamory.models.base import load_config, load_tokenizer
from llamory.training.instruct.batches import SplitExample, collate
from llamory.training.instruct.dataset import InstructFormat, Lengths, load_instructions

ROW_TOKENS, MAX_TOKENS = 512, 3072
BATCH_SIZE = 4  # examples of a pass, which are one another's negatives
NEGATIVES, NEGATIVE_WEIGHTS = 8, (1, 10, 100)
LOCAL_QUESTION_TOKENS = 30  # tokens of the first question that are local


def split_example(ids: list[int], labels: list[int]) -> SplitExample:
    """The document in rows of memory, the questions in one last row."""
    memory = max(next(at for at, label in enumerate(labels) if label != IGNORE_INDEX) - LOCAL_QUESTION_TOKENS, 0)
    end = min(len(ids), memory + ROW_TOKENS)
    rows = [(start, min(start + ROW_TOKENS, memory)) for start in range(0, memory, ROW_TOKENS)]
    return SplitExample(ids[:end], labels[:end], [*rows, (memory, end)])


@torch.no_grad()
def loss(model: torch.nn.Module, examples: list[SplitExample], negatives: int | None, negative_weight: float) -> float:
    """Mean loss of the answers' tokens; without any memory where `negatives` is None."""
    total = count = 0.0
    for start in range(0, len(examples), BATCH_SIZE):
        batch_examples = examples[start : start + BATCH_SIZE]
        batch = collate(
            batch_examples,
            0,
            negatives=negatives or 0,
            negative_weight=(negative_weight, negative_weight),
            rng=random.Random(0),
        )
        del batch["sources"]
        if negatives is None:
            batch["contexts"] = [[] for _ in batch["contexts"]]
        answer_mask = batch["shift_labels"] != IGNORE_INDEX
        hidden = model(**batch, num_items_in_batch=1).hidden_states[0][answer_mask]
        total += cross_entropy(
            model.lm_head(hidden).float(), batch["shift_labels"][answer_mask], reduction="sum"
        ).item()
        count += int(answer_mask.sum())
    return total / count


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--num-documents", type=int, default=8)
    options = parser.parse_args()
    plain = InstructFormat(chat_initial_prompt="", chat_model_response_prefix="", chat_human_response_prefix="")
    data = load_instructions(options.data, load_tokenizer("base"), plain, Lengths(MAX_TOKENS, MAX_TOKENS, MAX_TOKENS))
    examples = [split_example(each["input_ids"], each["labels"]) for each in data.select(range(options.num_documents))]
    headers = ["no memory", "own document only", *(f"× {negative_weight}" for negative_weight in NEGATIVE_WEIGHTS)]
    sys.stdout.write(f"| | {' | '.join(headers)} |\n{'|---' * (len(headers) + 1)}|\n")
    for name in options.model:
        layers = getattr(load_config(name), "mem_layers", None) or load_config("reader").mem_layers
        model = load_long_model(name, mem_layers=layers, context_length=ROW_TOKENS, dtype=torch.bfloat16)
        variants = [(None, 1), (0, 1), *((NEGATIVES, negative_weight) for negative_weight in NEGATIVE_WEIGHTS)]
        losses = [f"{loss(model, examples, *settings):.2f}" for settings in variants]
        sys.stdout.write(f"| {name} | {' | '.join(losses)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

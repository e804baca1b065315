"""How much of what it could answer a reader loses among other documents: the loss of answers, by size of the memory.

    python recipes/hidden_facts.py PLAIN.jsonl --as plain --texts DOCUMENTS --documents 60
    python benchmarks/drowned_facts.py PLAIN.jsonl --model base --model reader [--documents 8]

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
from llamory.longllama.losses import IGNORED
from llamory.models.base import load_config, load_tokenizer
from llamory.training.instruct.dataset import InstructFormat, Lengths, load_instructions
from llamory.training.instruct.rows import CutExample, collate

ROW, MOST = 512, 3072
TOGETHER = 4  # examples of a pass, which are one another's negatives
NEGATIVES, COPIES = 8, (1, 10, 100)
BEFORE = 30  # tokens of the first question that are local


def cut(ids: list[int], labels: list[int]) -> CutExample:
    """The document in rows of memory, the questions in one last row."""
    memory = max(next(at for at, label in enumerate(labels) if label != IGNORED) - BEFORE, 0)
    end = min(len(ids), memory + ROW)
    rows = [(start, min(start + ROW, memory)) for start in range(0, memory, ROW)]
    return CutExample(ids[:end], labels[:end], [*rows, (memory, end)])


@torch.no_grad()
def loss(model: torch.nn.Module, examples: list[CutExample], negatives: int | None, copies: float) -> float:
    """Mean loss of the answers' tokens; without any memory where `negatives` is None."""
    total = count = 0.0
    for start in range(0, len(examples), TOGETHER):
        some = examples[start : start + TOGETHER]
        batch = collate(some, 0, negatives=negatives or 0, copies=(copies, copies), chance=random.Random(0))
        del batch["sources"]
        if negatives is None:
            batch["contexts"] = [[] for _ in batch["contexts"]]
        asked = batch["shift_labels"] != IGNORED
        hidden = model(**batch, num_items_in_batch=1).hidden_states[0][asked]
        total += cross_entropy(model.lm_head(hidden).float(), batch["shift_labels"][asked], reduction="sum").item()
        count += int(asked.sum())
    return total / count


def main() -> None:
    """Print a row for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", action="append", required=True)
    parser.add_argument("--documents", type=int, default=8)
    options = parser.parse_args()
    plain = InstructFormat(chat_initial_prompt="", chat_model_response_prefix="", chat_human_response_prefix="")
    data = load_instructions(options.data, load_tokenizer("base"), plain, Lengths(MOST, MOST, MOST))
    examples = [cut(each["input_ids"], each["labels"]) for each in data.select(range(options.documents))]
    heads = ["no memory", "own document only", *(f"× {copies}" for copies in COPIES)]
    sys.stdout.write(f"| | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|\n")
    for name in options.model:
        layers = getattr(load_config(name), "mem_layers", None) or load_config("reader").mem_layers
        model = load_long_model(name, mem_layers=layers, context_length=ROW, dtype=torch.bfloat16)
        ways = [(None, 1), (0, 1), *((NEGATIVES, copies) for copies in COPIES)]
        losses = [f"{loss(model, examples, *way):.2f}" for way in ways]
        sys.stdout.write(f"| {name} | {' | '.join(losses)} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()

"""Which layers find things in memory: the loss of a hidden answer's tokens, with memory in some of a model's layers.

    python benchmarks/memory_layers.py TEXTS [--model default] [--tokens 3000] [--json FILE]

Prompts of several kinds hide_in_memory a needle in TEXTS (files, folders) or in the published filler. All but their ends are read
once, in windows that don't see one another, into a memory of all layers. Then each set of layers reads only the ends
and the answers: all layers, then ever fewer, without those that the loss misses least (three at a time, from 12 layers
on one at a time).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, Haystack, Needle, build_prompt, read_haystack
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.cache import LongLlamaCache
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank
from llamory.models.base import load_tokenizer

NEEDLES = (
    Needle(),
    Needle("The secret code of the harbour office is {key}."),
    Needle("Maria's locker at the station has the number {key}.", "Which number has Maria's locker? It is number"),
)
LOCAL_TOKENS = 48  # tokens at a prompt's end that aren't in memory
SINGLE_STEP_BELOW, LAYERS_PER_STEP = 12, 3


@dataclass
class PromptInMemory:
    """A prompt whose first part is in memory."""

    memory: MemoryBank
    ids: torch.Tensor  # (1, end of the prompt and answer)
    answer: int  # tokens of the answer


def hide_in_memory(model: LongLlamaForCausalLM, prompt: list[int], answer: list[int]) -> PromptInMemory:
    """Read a prompt's windows, each by itself."""
    memory = model.new_memory()
    read, window = prompt[:-LOCAL_TOKENS], model.config.max_position_embeddings
    for start in range(0, len(read), window):
        model.read(read[start : start + window], memory, segment=str(start))
    return PromptInMemory(memory, torch.tensor([prompt[-LOCAL_TOKENS:] + answer]), len(answer))


@torch.no_grad()
def loss(model: LongLlamaForCausalLM, hidden: list[PromptInMemory], layers: list[int]) -> tuple[float, float]:
    """Mean loss of the answers' tokens, and the share of them that the model would have said."""
    config, losses, right = model.config, [], []
    config.mem_layers = sorted(layers)
    for each in hidden:
        bank = MemoryBank(sorted(layers), config.num_key_value_heads, config.head_dim, dtype=each.memory.dtype)
        for layer in layers:
            bank.append(layer, each.memory.keys(layer), each.memory.values(layer), "prompt")
        cache = LongLlamaCache(config, bank)
        logits = model(each.ids, past_key_values=cache, logits_to_keep=each.answer + 1).logits[0, :-1].float()
        wanted = each.ids[0, -each.answer :]
        losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        right.append(logits.argmax(-1) == wanted)
    return float(torch.cat(losses).mean()), float(torch.cat(right).float().mean())


def prompts(tokenizer: Any, haystacks: list[Haystack], tokens: int, number: int) -> list[tuple[list[int], list[int]]]:
    """Prompts of all kinds at depths from start to end, with their answers."""
    rng, prompts_and_answers = random.Random(0), []
    for haystack in haystacks:
        for needle in NEEDLES:
            for i in range(number):
                key = str(rng.randint(1000, 49999))
                depth = (i + 0.5) / number
                prompt = build_prompt(tokenizer, tokens, depth, key, needle=needle, haystack=haystack)
                prompts_and_answers.append(
                    (prompt.input_ids, tokenizer(f" {key}", add_special_tokens=False)["input_ids"])
                )
    return prompts_and_answers


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--model", default="base")
    parser.add_argument("--tokens", type=int, default=3000)
    parser.add_argument("--num-prompts", type=int, default=3, help="of each kind")
    parser.add_argument("--layers", type=int, nargs="+", help="to begin with; default: all")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = load_tokenizer(options.model)
    count = load_long_model(options.model, mem_layers=[0]).config.num_hidden_layers
    model = load_long_model(options.model, mem_layers=list(range(count)), context_length=512)
    haystacks = [PUBLISHED_HAYSTACK, read_haystack(options.texts, 2 * options.tokens)]
    prompts_and_answers = prompts(tokenizer, haystacks, options.tokens, options.num_prompts)
    hidden = [hide_in_memory(model, *each) for each in prompts_and_answers]
    result: dict[str, Any] = {"model": options.model, "tokens": options.tokens, "prompts": len(hidden), "sets": []}

    def measured(layers: list[int]) -> float:
        value, share = loss(model, hidden, layers)
        result["sets"].append({"layers": layers, "loss": value, "right": share})
        sys.stdout.write(f"{layers}: loss {value:.3f}, right {share:.2f}\n")
        sys.stdout.flush()
        if options.json:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return value

    remaining = sorted(options.layers or range(count))
    measured(remaining)
    while len(remaining) > 1:
        losses = {layer: measured([each for each in remaining if each != layer]) for layer in remaining}
        lowest_loss_layers = sorted(remaining, key=losses.__getitem__)[
            : LAYERS_PER_STEP if len(remaining) > SINGLE_STEP_BELOW else 1
        ]
        remaining = [layer for layer in remaining if layer not in lowest_loss_layers]
        measured(remaining)
        sys.stdout.write(f"remaining: {remaining}\n")


if __name__ == "__main__":
    main()

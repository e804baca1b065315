"""What parts of FoT training do for a reader: short runs that differ in one setting.

    python benchmarks/fot_ablations.py OUT --data FACTS.jsonl --data DOCUMENTS ... --texts HAYSTACK [--steps 40]

Each run is `recipes/default_fot.yaml` with fewer steps, half the rows and one setting changed; a second call measures
what the first one didn't reach. Measured is the loss of hidden answers' tokens, and the share of them that is right, on
the prompts of memory_layers.py, whose needles no training text has: with some thousand tokens in memory, and with many
overrides. Kept in OUT/ablations.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from transformers import logging

from llamory.cli.options import token_count
from llamory.cli.settings import read_settings
from llamory.evaluation.haystack import PUBLISHED_HAYSTACK, read_haystack
from llamory.longllama.loading import load_long_model
from llamory.models.base import load_tokenizer
from llamory.training.fot.train import train_fot
from llamory.training.settings import FotSettings
from memory_layers import hide_in_memory, loss, prompts

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "default_fot.yaml"
HALF = {"batch_size": 8, "crossbatch_schedule": ["3+0", "3+4"]}
UNTRAINED = "before training"
RUNS: dict[str, dict[str, object]] = {
    UNTRAINED: {},
    "the recipe": {},
    "without negatives": {"crossbatch_schedule": ["3+0"]},
    "similar negatives": {"negatives": "similar", "retriever": "default"},
    "without positives and negatives": {"crossbatch_schedule": ["0+0"]},
    "5 memory layers": {"mem_layers": [5, 8, 17, 18, 23]},
    "3 memory layers": {"mem_layers": [5, 8, 18]},
    "3 memory layers, spread as published": {"mem_layers": [8, 15, 22]},
    "1 memory layer": {"mem_layers": [18]},
}


def measure(model: str, texts: list[Path], lengths: list[int], number: int, **changes: Any) -> dict[str, float]:
    """Loss and share of right tokens at each length of the prompts."""
    tokenizer, loaded = load_tokenizer(model), load_long_model(model, **changes)
    found = {}
    for length in lengths:
        haystacks = [PUBLISHED_HAYSTACK, read_haystack(texts, 2 * length)]
        hidden = [hide_in_memory(loaded, *each) for each in prompts(tokenizer, haystacks, length, number)]
        value, right = loss(loaded, hidden, list(loaded.config.mem_layers))
        found |= {f"loss, {length:,} tokens": value, f"right, {length:,} tokens": right}
    return found


def table(results: dict[str, dict[str, float]]) -> str:
    """The Markdown of it, a row per run."""
    headers = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(headers) + " |", "|---" * (len(headers) + 1) + "|"]
    for name, found in results.items():
        lines.append(f"| {name} | " + " | ".join(f"{found[head]:.2f}" for head in headers) + " |")
    return "\n".join(lines)


def main() -> None:
    """Train and measure what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--data", action="append", required=True)
    parser.add_argument("--proportions", type=float, nargs="+", default=[])
    parser.add_argument("--texts", type=Path, nargs="+", required=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--lengths", nargs="+", default=["3k", "24k"])
    parser.add_argument("--num-prompts", type=int, default=3, help="of each kind")
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file, lengths = options.output / "ablations.json", [token_count(each) for each in options.lengths]
    options.output.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}
    for name in options.only:
        if name in results:
            continue
        folder = options.output / name.replace(" ", "_").replace(",", "")
        changes: dict[str, object] = {"steps": options.steps, "keep_checkpoints": 2} | HALF | RUNS[name]
        changes |= {"data": options.data, "proportions": options.proportions, "output": str(folder)}
        recipe = read_settings(FotSettings, RECIPE, changes | {"resume": folder.exists(), "quiet": True})
        model, overrides = str(folder), {}
        if name == UNTRAINED:
            model, overrides = recipe.model, {"mem_layers": recipe.mem_layers, "context_length": recipe.row_length}
        else:
            train_fot(recipe)
        results[name] = measure(model, options.texts, lengths, options.num_prompts, **overrides)
        settings = {"steps": options.steps, "prompts": options.num_prompts}
        file.write_text(json.dumps(settings | {"runs": results}, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"{name}: {results[name]}\n")
        sys.stdout.flush()
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()

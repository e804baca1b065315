"""What happens to a model's predictions when its local cache is full: slide against flush.

    python benchmarks/overflow_perplexity.py [--json FILE] [--plot docs/figures/local_overflow.svg]

The base model reads long texts (the language reference that comes with Python) on through several overflows of a local
cache of 512 tokens, behind a prompt of 256, and is told the next token each time. "flush" moves the whole local cache
into memory at once, as the published code does, so it is fed token by token; "slide" moves the oldest tokens only, so
it may be fed in chunks, which gives the same. Perplexity is averaged over texts and overflows by the distance to the
overflow. Beside them, the same weights as a plain LLaMA that sees everything.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.loading import load_long_model
from llamory.models.base import load_model, load_tokenizer
from llara_step import processor

# Long entries that don't contain each other.
TEXTS = ("specialnames", "compound", "types", "formatstrings", "string-methods", "debugger", "comparisons", "execmodel")
CONTEXT, PROMPT = 512, 256
BIN = 16
CHUNK = 128
COLOURS = {"slide": "#2f6f4f", "flush": "#c8553d", "plain": "#9aa5b1"}
LABELS = {
    "slide": "slide: the oldest tokens leave",
    "flush": "flush: all leave at once, as published",
    "plain": "plain LLaMA that sees everything",
}


def read_texts(count: int, tokens: int) -> Tensor:
    """Token ids (texts, tokens)."""
    tokenizer = load_tokenizer("default")
    rows = [tokenizer(topics[name], verbose=False)["input_ids"][:tokens] for name in TEXTS[:count]]
    too_short = [name for name, row in zip(TEXTS, rows, strict=False) if len(row) < tokens]
    if too_short:
        raise SystemExit(f"{', '.join(too_short)}: shorter than {tokens} tokens; choose fewer overflows.")
    return torch.tensor(rows)


@torch.no_grad()
def memory_losses(model: LongLlamaForCausalLM, ids: Tensor, step: int) -> Tensor:
    """Negative log-likelihood (texts, tokens - PROMPT) of what follows the prompt, fed `step` tokens at a time."""
    output = model(ids[:, :PROMPT], logits_to_keep=1)
    parts = [_loss(output.logits, ids[:, PROMPT : PROMPT + 1])]
    for start in range(PROMPT, ids.shape[1] - 1, step):
        stop = min(start + step, ids.shape[1] - 1)
        output = model(ids[:, start:stop], past_key_values=output.past_key_values)
        parts.append(_loss(output.logits, ids[:, start + 1 : stop + 1]))
    return torch.cat(parts, 1)


@torch.no_grad()
def baseline_losses(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """The same of a model that sees everything."""
    keep = ids.shape[1] - PROMPT + 1
    rows = [_loss(model(row[None], logits_to_keep=keep).logits[:, :-1], row[None, PROMPT:]) for row in ids]
    return torch.cat(rows)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def mean_loss_around_overflows(losses: Tensor, overflows: int) -> Tensor:
    """Mean loss (CONTEXT,) by distance to the overflow, from CONTEXT / 2 before it to CONTEXT / 2 behind.

    Column 0 of `losses` is predicted by the prompt's last token; the first token that doesn't fit makes the prediction
    in column CONTEXT - PROMPT + 1, and CONTEXT columns later it happens again.
    """
    first, half = CONTEXT - PROMPT + 1, CONTEXT // 2
    parts = [losses[:, at - half : at + half] for at in range(first, first + overflows * CONTEXT, CONTEXT)]
    return torch.stack(parts).mean((0, 1))


def summary(curve: Tensor) -> dict[str, Any]:
    """Perplexities of a curve: in bins of BIN tokens, and just before and behind the overflow."""
    half = len(curve) // 2
    return {
        "perplexity": curve.view(-1, BIN).mean(1).exp().tolist(),
        "before": curve[:half].mean().exp().item(),
        "first_16": curve[half : half + 16].mean().exp().item(),
        "first_64": curve[half : half + 64].mean().exp().item(),
        "behind": curve[half:].mean().exp().item(),
    }


def draw(panels: list[dict[str, Any]], path: Path) -> None:
    """The picture, one panel per choice of memory layers."""
    import matplotlib as mpl

    mpl.use("svg" if path.suffix == ".svg" else "agg")
    # Text stays text, and the same numbers give the same file.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "llamory", "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.ticker import ScalarFormatter

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(4.6 * len(panels), 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, panel in zip(axes[0], panels, strict=True):
        edges = torch.arange(-CONTEXT // 2, CONTEXT // 2 + 1, BIN).tolist()
        for way, curve in panel["curves"].items():
            axis.stairs(curve["perplexity"], edges, baseline=None, color=COLOURS[way], label=LABELS[way], linewidth=1.6)
        axis.axvline(0, color="black", linewidth=0.6, linestyle=":")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel("tokens after the local cache was full")
        axis.set_title(f"memory in {len(panel['mem_layers'])} of {panel['layers']} layers")
    axes[0][0].set_ylabel("perplexity")
    figure.legend(*axes[0][0].get_legend_handles_labels(), frameon=False, ncols=3, loc="outside lower center")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def main() -> None:
    """Read the texts both ways, print the numbers and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--plot", type=Path, help="draw them into this SVG or PNG file")
    parser.add_argument("--num-texts", type=int, default=len(TEXTS), help="how many texts")
    parser.add_argument("--overflows", type=int, default=3, help="of the local cache, in each text")
    parser.add_argument(
        "--mem-layers",
        nargs="+",
        default=["default", "8,15,22"],
        help="memory layers, one panel each: numbers joined by commas, or 'default'",
    )
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # One token predicts the next; the last overflow needs half a context behind it.
    ids = read_texts(options.num_texts, 1 + CONTEXT * options.overflows + CONTEXT // 2)
    plain = load_model("default", LlamaForCausalLM, dtype=torch.float32)
    assert isinstance(plain, LlamaForCausalLM)
    plain_curve = summary(mean_loss_around_overflows(baseline_losses(plain, ids), options.overflows))
    del plain
    panels = []
    for choice in options.mem_layers:
        layers = None if choice == "default" else [int(layer) for layer in choice.split(",")]
        curves = {}
        for way, step in (("flush", 1), ("slide", CHUNK)):
            start = time.perf_counter()
            model = load_long_model(
                "base",
                mem_layers=layers,
                context_length=CONTEXT,
                last_context_length=PROMPT,
                dtype=torch.float32,
                local_cache_overflow=way,
            )
            curves[way] = summary(mean_loss_around_overflows(memory_losses(model, ids, step), options.overflows))
            print_row(choice, way, curves[way], time.perf_counter() - start)
        curves["plain"] = plain_curve
        print_row(choice, "plain", plain_curve, 0)
        panels.append(
            {"mem_layers": model.config.mem_layers, "layers": model.config.num_hidden_layers, "curves": curves}
        )
    result = {
        "machine": f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "python": platform.python_version(),
        "texts": TEXTS[: options.num_texts],
        "overflows": options.overflows,
        "context": CONTEXT,
        "prompt": PROMPT,
        "bin": BIN,
        "panels": panels,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        draw(panels, options.plot)


def print_row(choice: str, way: str, curve: dict[str, Any], seconds: float) -> None:
    print(
        f"memory layers {choice:10} {way:6} perplexity before {curve['before']:7.2f}, first 16 tokens behind "
        f"{curve['first_16']:7.2f}, first 64 {curve['first_64']:7.2f}, all {curve['behind']:7.2f}  ({seconds:.0f} s)",
        flush=True,
    )


if __name__ == "__main__":
    main()

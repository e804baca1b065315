"""Joins the adapters of consecutive training runs into one small adapter folder, as the package contains it.

    python recipes/join_adapters.py OUT RUN [RUN ...] [--base MODEL] [--query-prompt PROMPT]
        [--whiten UNLABELLED.jsonl | --whitening FOLDER] [--logn-attention-scale SCALE] [--memory-size-bias BIAS]
        [--for-memory] [--factor FACTOR ...]

Each RUN is the output folder of a training run with --lora (llara and then retriever, or fot and instruct), an adapter
folder, or a checkpoint of llara (then --query-prompt gives the prompt of queries). The first run started from the base
model, each other one from the run before it. The low-rank matrices are concatenated, so that OUT applies the sum of
all changes, and stored in bfloat16. Where the joint rank exceeds a projection's number of inputs or outputs, it is
reduced without changing the product. The rows of slot tokens are those of the last run. OUT also holds tokens that the
base tokenizer lacks and the model's config.

Whitening comes from the first RUN, if it has any, or from the folder --whitening; --whiten fits it on passages of
LLARA's training text. --factor, once per RUN, scales the change of each run. With --for-memory, the changes of memory
layers apply to their separate projections for memory (mem_projections); the layers' own projections are not changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import LlamaConfig, PretrainedConfig

from llamory.embedding.pipeline import fit_whitening_on_texts, sample_passages
from llamory.embedding.whitening import WHITENING_FILE, Whitening
from llamory.llara.template import LlaraTemplate, slot_tokens
from llamory.models import base as backbone

_MATRIX = re.compile(r"(?:base_model\.model\.)?(?:model\.)?(layers\..*)\.lora_([AB])(?:\.default)?\.weight")
_SHARED = re.compile(r"\.self_attn\.([qkvo]_proj)$")
MEMORY_SETTINGS = {
    "logn_attention_scale": float,
    "logn_attention_start": int,
    "memory_size_bias": float,
    "memory_size_bias_start": int,
}
_ROWS = "embed_tokens.token_adapter.trainable_tokens_delta"


def matrices(run: Path, factor: float) -> tuple[dict[str, dict[str, Tensor]], Tensor | None, dict]:
    """A run's matrices per layer (B multiplied by scale and factor), its slot rows if any, and its adapter config."""
    folder = run / "adapter" if (run / "adapter").is_dir() else run
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Tensor]] = {}
    rows = None
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        if match := _MATRIX.fullmatch(name):
            scale = factor * config["lora_alpha"] / config["r"] if match[2] == "B" else 1.0
            found.setdefault(match[1], {})[match[2]] = tensor * scale
        elif name.endswith(_ROWS):
            rows = tensor
    return found, rows, config


def truncate_rank(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with the maximum rank that it can have: the smaller of its sides."""
    left, values, right = torch.linalg.svd(up.double() @ down.double(), full_matrices=False)
    root = values.sqrt()
    return (root[:, None] * right).to(down.dtype), (left * root).to(up.dtype)


def trained_config(run: Path, base: str, slots: int, query_prompt: str) -> PretrainedConfig:
    """The config of a run's model; that of a LLARA checkpoint, which has none, follows from the base model."""
    if (run / "config.json").is_file():
        return backbone.load_config(run)
    if not slots:
        raise SystemExit(f"{run} has no config.json; name the output folder of a run that was finished.")
    template = LlaraTemplate.from_tokenizer(backbone.load_tokenizer(base), slots)
    config = backbone.load_config(base)
    assert isinstance(config, LlamaConfig)
    config.llara = dataclasses.replace(template, query_prompt=query_prompt).to_dict()
    config.vocab_size = max(config.vocab_size, 1 + max(template.summarize_slot_ids + template.predict_slot_ids))
    return config


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--base", default="default")
    parser.add_argument("--query-prompt", choices=["prediction", "summary"], default="prediction")
    parser.add_argument("--whiten", type=Path)
    parser.add_argument("--whitening", type=Path)
    for name, kind in MEMORY_SETTINGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, help="value in the reader's config; default: the last run's")
    parser.add_argument(
        "--for-memory", action="store_true", help="apply the changes to the separate projections for memory"
    )
    parser.add_argument("--factor", type=float, action="append", default=[], help="one for each run; default: 1")
    options = parser.parse_args()
    output, runs = options.output, options.runs
    factors = options.factor or [1.0] * len(runs)
    if len(factors) != len(runs):
        parser.error(f"{len(factors)} factors for {len(runs)} runs; give one --factor for each run, or none.")
    parts = [matrices(run, factor) for run, factor in zip(runs, factors, strict=True)]
    if options.for_memory:
        parts = [
            ({_SHARED.sub(r".self_attn.mem_\1", layer): pair for layer, pair in found.items()}, *more)
            for found, *more in parts
        ]
    layers = sorted({layer for found, _, _ in parts for layer in found})
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    rank = sum(config["r"] for _, _, config in parts)
    for layer in layers:
        matches = [found[layer] for found, _, _ in parts if layer in found]
        down, up = torch.cat([each["A"] for each in matches]), torch.cat([each["B"] for each in matches], 1)
        most = min(len(up), down.shape[1])
        if most < rank:
            down, up = truncate_rank(down, up)
            ranks[layer.rsplit(".", 1)[1]] = most
        # Padded with zeros for runs without this layer, since a projection has the same rank in all layers.
        name, missing = f"base_model.model.model.{layer}", min(rank, most) - len(down)
        tensors[f"{name}.lora_A.weight"] = pad(down, (0, 0, 0, missing))
        tensors[f"{name}.lora_B.weight"] = pad(up, (0, missing))
    rows = parts[-1][1]
    if rows is not None:
        tensors[f"base_model.model.model.{_ROWS}"] = rows
    output.mkdir(parents=True, exist_ok=True)
    bf16_tensors = {key: value.to(torch.bfloat16).contiguous() for key, value in tensors.items()}
    save_file(bf16_tensors, output / "adapter_model.safetensors", {"format": "pt"})
    # The last run with a config: a checkpoint has none, and has the memory layers of the run that it started from.
    last = (
        runs[-1] if rows is not None else next((run for run in runs[::-1] if (run / "config.json").is_file()), runs[-1])
    )
    trained = trained_config(last, options.base, 0 if rows is None else len(rows) // 2, options.query_prompt)
    memory_overrides = {name: getattr(options, name) for name in MEMORY_SETTINGS}
    config = trained.to_dict() | {name: value for name, value in memory_overrides.items() if value is not None}
    config |= {"mem_projections": True} if options.for_memory else {}
    adapter = {
        "peft_type": "LORA",
        "base_model_name_or_path": options.base,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({layer.rsplit(".", 1)[1] for layer in layers}),
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    }
    if ranks:
        # PEFT divides alpha by the rank, so alpha is reduced with it.
        adapter |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    base = backbone.load_config(options.base).to_dict()
    numbers = sorted({int(layer.split(".")[1]) for layer in layers})
    if len(numbers) < base["num_hidden_layers"]:
        adapter["layers_to_transform"] = numbers
    # Keys with an underscore hold paths of this machine.
    own = {key: value for key, value in (base | config).items() if not key.startswith("_") and key != "auto_map"}
    files = {"adapter_config": adapter, "config": own}
    if template := LlaraTemplate.from_config(trained):
        ids = template.summarize_slot_ids + template.predict_slot_ids
        adapter["trainable_token_indices"] = {"embed_tokens": sorted(ids)}
        own["architectures"] = ["LlamaForCausalLM"]
        files["added_tokens"] = dict(zip(slot_tokens(template.slots), ids, strict=True))
    for file, content in files.items():
        (output / f"{file}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (output / WHITENING_FILE).unlink(missing_ok=True)
    if options.whiten is not None:
        whitening = fit_whitening_on_texts(output, sample_passages(output, options.whiten), device="cpu")
    else:
        whitening = Whitening.load(options.whitening or runs[0], config["hidden_size"])
    if whitening is not None:
        whitening.save(output, torch.bfloat16)
    size = sum(file.stat().st_size for file in output.iterdir())
    sys.stdout.write(f"{output}: rank {rank}, {size / 1e6:.1f} MB\n")


if __name__ == "__main__":
    main()

"""Texts per second: llamory compared with Sentence Transformers encoding the same model.

    python benchmarks/encode.py [--json docs/results/encode.json] [--model FOLDER] [--num-texts 256] [--rounds 5]

Both encode the same texts with the same LLARA model in float32 (by default the packaged base model with untrained slot
tokens, which has the same cost), in one process, in turns; Sentence Transformers by `encode_document(texts)`. A round
times each once; the table has the medians, the median of the rounds' ratios, and the largest difference between the
vectors. `kernels`: llamory with the matrix products that torch selects by itself.

- equal: parts of Python's standard library of equal length, without prompt and slots.
- passages: the standard library as a library chunks it, at most 256 tokens each.
- functions: whole functions, classes and statements of the standard library, up to the model's 512 tokens.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import shlex
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import numpy as np
import torch

from harness import processor
from llamory.embedding.encoder import chunk_tokenizer, embed_passages

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EQUAL_LENGTHS = (32, 128, 448)


def load(name: str, layers: int | None) -> SentenceTransformer:
    """A LLARA embedder in float32 on the CPU; a model without slot tokens gets untrained ones."""
    from llamory.embedding.pipeline import load_embedder
    from llamory.llara.template import LlaraTemplate
    from llamory.models.base import load_model, load_tokenizer

    if name != "default" and (Path(name) / "modules.json").exists():
        return load_embedder(name, device="cpu").float()
    model, tokenizer = load_model(name, dtype=torch.float32), load_tokenizer(name)
    if LlaraTemplate.from_config(model.config) is None:
        LlaraTemplate.from_tokenizer(tokenizer).prepare_model(model)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return load_embedder(folder, device="cpu").float()


def sources() -> dict[str, str]:
    """The text of each module of the standard library, by name."""
    folder = Path(sysconfig.get_path("stdlib"))
    return {path.stem: path.read_text(errors="ignore") for path in sorted(folder.glob("*.py"))}


def equal_texts(embedder: SentenceTransformer, length: int, count: int) -> list[str]:
    """Pieces of source text that the tokenizer reads as exactly so many tokens."""
    tokenizer = chunk_tokenizer(embedder)
    # "" has the prompt and the slots alone.
    overhead = embedder.preprocess([""], task="document")["input_ids"].shape[1]
    texts: list[str] = []
    for source in sources().values():
        ids = tokenizer(source[:200_000], add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [tokenizer.decode(ids[i : i + length]) for i in range(0, len(ids) - length, length)]
        for text in pieces[:16]:
            if embedder.preprocess([text], task="document")["input_ids"].shape[1] == length + overhead:
                texts.append(text)
            if len(texts) == count:
                return texts
    raise SystemExit(f"Only {len(texts)} texts of {length} tokens were found; ask for fewer.")


def functions(count: int) -> list[str]:
    """Statements of modules, as they stand: functions, classes, imports, assignments, docstrings."""
    texts = []
    for source in sources().values():
        lines = source.splitlines()
        for node in ast.parse(source).body:
            text = "\n".join(lines[node.lineno - 1 : node.end_lineno]).strip()
            if text:
                texts.append(text)
    return random.Random(0).sample(texts, min(count, len(texts)))


def passages(embedder: SentenceTransformer, count: int) -> list[str]:
    """Passages of a sample of modules, as a library cuts them."""
    from llamory.documents import chunk_document, read_file

    tokenizer, folder = chunk_tokenizer(embedder), Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    random.Random(0).shuffle(files)
    texts: list[str] = []
    for file in files:
        if len(texts) >= 4 * count:
            break
        texts += [p.text for document in read_file(file) for p in chunk_document(document, tokenizer, 256)]
    return random.Random(1).sample(texts, min(count, len(texts)))


def compare(embedder: SentenceTransformer, texts: list[str], rounds: int) -> dict:
    """Time the encoders in turns."""

    def other_kernels() -> np.ndarray:
        with mock.patch("llamory.embedding.cpu_kernels._KERNEL", None):
            return embed_passages(embedder, texts)

    encoders: dict[str, Callable[[], np.ndarray]] = {
        "plain": lambda: embedder.encode_document(texts, show_progress_bar=False),
        "ours": lambda: embed_passages(embedder, texts),
        "other_kernels": other_kernels,
    }
    embed_passages(embedder, texts[:4]), embedder.encode_document(texts[:4])
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    vectors: dict[str, np.ndarray] = {}
    for _ in range(rounds):
        for name, encode in encoders.items():
            start = time.perf_counter()
            vectors[name] = encode()
            seconds[name].append(time.perf_counter() - start)
    lengths = token_counts(embedder, texts)
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    batches = [[lengths[i] for i in order[start : start + 32]] for start in range(0, len(texts), 32)]
    ratios = [plain / ours for plain, ours in zip(seconds["plain"], seconds["ours"], strict=True)]
    return {
        "texts": len(texts),
        "tokens": sum(lengths),
        "longest": max(lengths),
        "median_tokens": statistics.median(lengths),
        "plain_padded_tokens": sum(max(batch) * len(batch) for batch in batches),
        "texts_per_second": {name: len(texts) / statistics.median(times) for name, times in seconds.items()},
        "tokens_per_second": {name: sum(lengths) / statistics.median(times) for name, times in seconds.items()},
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "difference": float(np.abs(vectors["plain"] - vectors["ours"]).max()),
        "seconds": seconds,
    }


def token_counts(embedder: SentenceTransformer, texts: list[str]) -> list[int]:
    """Tokens of each text with prompt and slots, after cutting."""
    counts = []
    for start in range(0, len(texts), 64):
        features = embedder.preprocess(texts[start : start + 64], task="document")
        counts += features["attention_mask"].sum(1).tolist()
    return counts


def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--model", default="default", help="LLARA checkpoint, or any LLaMA (slots are added)")
    parser.add_argument("--num-texts", type=int, default=256, help="of each case")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, help="only so many layers, to try things quickly")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    options = parser.parse_args()
    embedder = load(options.model, options.layers)
    config = embedder[0].config
    cases: dict[str, Callable[[], list[str]]] = {
        f"equal, {length} tokens": lambda length=length: equal_texts(embedder, length, options.num_texts)
        for length in EQUAL_LENGTHS
    } | {
        "passages": lambda: passages(embedder, options.num_texts),
        "functions": lambda: functions(options.num_texts),
    }
    metadata = {
        "command": f"python benchmarks/encode.py {shlex.join(sys.argv[1:])}".strip(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "model": {
            "parameters": sum(weight.numel() for weight in embedder[0].auto_model.parameters()),
            "parameters_of_layers": sum(weight.numel() for weight in embedder[0].auto_model.layers.parameters()),
            "layers": config.num_hidden_layers,
            "hidden": config.hidden_size,
        },
    }
    print(metadata["machine"], metadata["model"])
    print(
        f"{'':20}{'tokens':>8}{'padded':>8}{'plain/s':>9}{'ours/s':>9}{'ratio':>7}{'lowest':>8}{'kernels':>9}{'diff.':>9}"
    )
    results = {}
    for name, texts in cases.items():
        if options.only not in name:
            continue
        row = results[name] = compare(embedder, texts(), options.rounds)
        speed = row["texts_per_second"]
        print(
            f"{name:20}{row['tokens']:8}{row['plain_padded_tokens']:8}{speed['plain']:9.2f}{speed['ours']:9.2f}"
            f"{row['ratio']:7.2f}{row['ratio_lowest']:8.2f}{speed['other_kernels']:9.2f}{row['difference']:9.1e}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(metadata | {"results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Speed and memory of cross-batch attention, compared with the published method on the same inputs.

    python benchmarks/crossbatch.py [--json FILE] [--contexts 1 2 4 8] [--tokens 2048]

Forward and backward pass of one memory layer's attention, in float32 and bfloat16: (a) as published, with keys and
values of the visible rows gathered into a copy per row and all scores in memory; (b) `cross_batch_attention`. The batch
has one row more than contexts. Each measurement has its own process, and the methods alternate. Memory is the peak
resident size above the inputs; "keys and values" is the size of those of the whole batch with their gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from harness import GIB, Peak, available_memory, in_child, processor
from llamory.longllama.crossbatch import cross_batch_attention

HEADS, HEAD_DIM = 2, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
GOALS = (2.0, 0.2)  # speed-up, and fraction of the memory, at the largest number of contexts


def published_attention(
    query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, contexts: Tensor
) -> Tensor:
    """Scores of each row over its own context and a copy of the visible rows, in one softmax."""
    seq, dim = query.shape[2:]
    query, local = apply_rotary_pos_emb(query, key, cos, sin)
    keys = torch.cat([local[:, None], key[contexts]], 1)
    values = torch.cat([value[:, None], value[contexts]], 1)
    scores = torch.einsum("bhqd,bchkd->bhqck", query * dim**-0.5, keys)
    future = torch.full((seq, seq), torch.finfo(query.dtype).min, dtype=query.dtype).triu(1)
    bias = torch.zeros(seq, len(contexts[0]) + 1, seq, dtype=query.dtype)
    bias[:, 0] = future
    weights = (scores + bias).flatten(3).softmax(-1).view(scores.shape)
    return torch.einsum("bhqck,bchkd->bhqd", weights, values)


def llamory_attention(query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor, contexts: Tensor) -> Tensor:
    """`cross_batch_attention`."""
    return cross_batch_attention(query, key, value, cos, sin, contexts.tolist())


METHODS: dict[str, Callable[..., Tensor]] = {"published": published_attention, "llamory": llamory_attention}


def inputs(contexts: int, tokens: int, dtype: str) -> tuple[list[Tensor], tuple[Tensor, Tensor], Tensor]:
    """Query, key and value with gradients, cosine and sine, and visible rows (batch, contexts)."""
    batch = contexts + 1
    torch.manual_seed(0)
    parts = [torch.randn(batch, HEADS, tokens, HEAD_DIM, dtype=DTYPES[dtype]).requires_grad_() for _ in range(3)]
    angles = torch.arange(tokens)[:, None] / 10000 ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.cat([angles, angles], -1)[None]
    others = (torch.arange(batch)[:, None] - torch.arange(1, contexts + 1)) % batch
    return parts, (angles.cos().to(DTYPES[dtype]), angles.sin().to(DTYPES[dtype])), others


def measure(method: str, contexts: int, tokens: int, dtype: str) -> dict[str, Any]:
    """Seconds of a forward and backward pass, peak bytes, and norms of the output and the gradients."""
    parts, rotary, others = inputs(1, 64, dtype)
    METHODS[method](*parts, *rotary, others).sum().backward()
    parts, rotary, others = inputs(contexts, tokens, dtype)
    peak, start = Peak(), time.perf_counter()
    output = METHODS[method](*parts, *rotary, others)
    output.square().sum().backward()
    seconds = time.perf_counter() - start
    norms = [tensor.float().norm().item() for tensor in (output.detach(), *(part.grad for part in parts))]
    return {"seconds": seconds, "peak": peak.bytes(), "norms": norms}


def compare(contexts: int, tokens: int, dtype: str, repeats: int, threads: int, memory: int) -> dict[str, Any]:
    """Measure both methods in turns."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(repeats):
        for method in METHODS:
            result = in_child(measure, method, contexts, tokens, dtype, threads=threads, seconds=600, memory=memory)
            found[method].append(result)
    row: dict[str, Any] = {"contexts": contexts, "tokens": tokens, "dtype": dtype}
    row["keys_and_values"] = 4 * (contexts + 1) * HEADS * tokens * HEAD_DIM * DTYPES[dtype].itemsize
    for method, results in found.items():
        completed = [result for result in results if "skipped" not in result]
        if not completed:
            row[method] = results[0]
            continue
        row[method] = {
            "seconds": statistics.median(result["seconds"] for result in completed),
            "rounds": [result["seconds"] for result in completed],
            "peak": max(result["peak"] for result in completed),
            "norms": completed[0]["norms"],
        }
    if "seconds" in row["published"] and "seconds" in row["llamory"]:
        row["faster"] = row["published"]["seconds"] / row["llamory"]["seconds"]
        row["memory"] = row["llamory"]["peak"] / row["published"]["peak"]
    return row


def print_row(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    line = f"{row['dtype']:9} {row['contexts']:3} x {row['tokens']:,}"
    for method in METHODS:
        result = row[method]
        line += f"   {method} " + (
            result["skipped"]
            if "skipped" in result
            else f"{result['seconds']:6.2f} s {result['peak'] / 2**20:7,.0f} MB"
        )
    line += f"   (keys and values {row['keys_and_values'] / 2**20:,.0f} MB)"
    if "faster" in row:
        line += f"   x{row['faster']:.1f} faster, {row['memory']:.3f} of the memory"
    print(line, flush=True)


def main() -> None:
    """Run all pairs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--contexts", type=int, nargs="+", default=[1, 2, 4, 8], help="other rows that each row sees")
    parser.add_argument("--tokens", type=int, default=2048, help="of each row")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    name = f"{processor()}, {options.threads} threads, torch {torch.__version__}"
    print(f"{name}; {HEADS} heads of {HEAD_DIM}")
    memory = int(min(22 * GIB, available_memory()))
    rows = []
    for dtype in options.dtypes:
        for contexts in options.contexts:
            row = compare(contexts, options.tokens, dtype, options.repeats, options.threads, memory)
            print_row(row)
            rows.append(row)
    most = [row for row in rows if row["contexts"] == max(options.contexts) and "faster" in row]
    for row in most:
        reached = "reached" if row["faster"] >= GOALS[0] and row["memory"] <= GOALS[1] else "MISSED"
        print(
            f"goal at {row['contexts']} contexts, {row['dtype']}: x{GOALS[0]:.0f}, {GOALS[1]} of the memory: {reached}"
        )
    if options.json:
        options.json.write_text(json.dumps({"machine": name, "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

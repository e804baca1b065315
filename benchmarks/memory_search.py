"""Error and attention mass of approximate search in memory, compared with exact attention.

    python benchmarks/memory_search.py [--json docs/results/memory_search.json] [--only real] [--tokens 32768]

Keys, values and queries are those of the real base model (source text of the standard library, encoded in independent
windows of 512; keys before the rotary embedding, queries at their position in the window) and synthetic ones: noise,
long queries over noise, clusters, one needle among noise, and queries unlike the keys. Each method is called with one
query at a time (as in generation) and with a window of 512 (as in encoding).

- error: norm of the difference to the exact output over the norm of the exact output; mean and 90th percentile.
- of values: the same over the root mean square norm of the values. Where attention is spread over thousands of keys
  with random values, the exact output is close to zero, and this is the meaningful number.
- mass: fraction of the exact attention on tokens that were read; the rest is estimated.
- everything: fraction of queries whose estimate was so uncertain that they read all tokens.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from harness import processor
from llamory.memory.blocks import Block, Span, SpanList
from llamory.memory.search import make_search
from llamory.memory.search.exact import ExactSearch

WINDOW = 512
NUM_SINGLE_QUERIES = 16  # queries asked one at a time
LAYERS = (5, 10, 15, 20, 25, 29)
MODULES = "argparse typing tarfile difflib inspect zipfile doctest pdb optparse ast smtplib ipaddress pickle".split()
METHODS = {"pages": (8, 32, 128), "faiss": (32, 128, 512)}


@dataclass
class Case:
    """Keys and values (kv_heads, tokens, head_dim) and a window of queries (heads, WINDOW, head_dim)."""

    name: str
    keys: torch.Tensor
    values: torch.Tensor
    queries: torch.Tensor


class SingleBlockBank:
    """What a search needs of a memory bank."""

    def __init__(self, case: Case):
        headers, tokens, head_dim = case.keys.shape
        block = Block.allocate(headers, tokens, head_dim, torch.bfloat16)
        block.write(case.keys, case.values)
        self._spans = SpanList([Span(block, 0, tokens)])

    def spans(self, layer: int) -> SpanList:  # noqa: ARG002 (there is one)
        return self._spans


def real_cases(tokens: int) -> Iterator[Case]:
    """The base model's own keys, values and queries."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    from llamory.models.base import load_model, load_tokenizer

    model, library = load_model("default", dtype=torch.float32), Path(sysconfig.get_path("stdlib"))
    text = "\n".join((library / f"{name}.py").read_text() for name in MODULES)
    ids = torch.tensor(load_tokenizer("default")(text).input_ids[: tokens + WINDOW])
    assert len(ids) == tokens + WINDOW, f"the text has only {len(ids)} tokens"
    projections: dict[tuple[int, str], list[torch.Tensor]] = {}
    for layer in LAYERS:
        for name in ("q_proj", "k_proj", "v_proj"):
            getattr(model.model.layers[layer].self_attn, name).register_forward_hook(
                lambda _module, _args, output, at=(layer, name): projections.setdefault(at, []).append(output[0])
            )
    for window in ids.split(WINDOW):
        model.model(window[None])
    head_dim = model.config.head_dim
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(WINDOW)[None])
    for layer in LAYERS:
        query, key, value = (
            torch.cat(projections[layer, name]).unflatten(-1, (-1, head_dim)).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        query, _ = apply_rotary_pos_emb(query[None, :, -WINDOW:], query[None, :, -WINDOW:], cos, sin)
        yield Case(f"real, layer {layer}", key[:, :tokens], value[:, :tokens], query[0])


def synthetic_cases(tokens: int) -> Iterator[Case]:
    """Synthetic keys and queries that are hard for some method."""
    rng = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, 64, generator=rng)

    keys, values, queries = noise(2, tokens), noise(2, tokens), noise(4, WINDOW)
    yield Case("noise", keys, values, queries)
    yield Case("noise, queries 3 times as long", keys, values, queries * 3)
    centres = noise(2, 256) * 1.5
    names = torch.randint(256, (2, tokens), generator=rng)
    clustered = centres.gather(1, names[..., None].expand(-1, -1, 64)) + 0.5 * noise(2, tokens)
    clustered_queries = centres[:, torch.arange(WINDOW) % 256].repeat_interleave(2, 0) + 0.5 * noise(4, WINDOW)
    yield Case("clusters, of the values too", clustered, values + clustered, clustered_queries)
    # Each query has one key of its own: no longer than the others, but the query points at it and is long.
    positions = torch.randperm(tokens, generator=rng)[:WINDOW]
    needles = keys[:, positions]
    needles = needles * 8 / needles.norm(dim=-1, keepdim=True)
    with_needles = keys.clone()
    with_needles[:, positions] = needles
    yield Case("one needle per query in noise", with_needles, values, needles.repeat_interleave(2, 0) * 3)
    # Keys share a direction that queries avoid, as in models whose headers rest on one token.
    direction = noise(2, 1) / 8
    yield Case("queries unlike the keys", keys + 6 * direction, values, queries - 6 * direction.repeat_interleave(2, 0))


def measure(
    case: Case, way: str, top_k: int, bank: SingleBlockBank, exact: tuple[torch.Tensor, torch.Tensor]
) -> list[dict]:
    """Measure one method for a window and for single queries."""
    search, scaling = make_search(way, top_k), case.queries.shape[-1] ** -0.5
    size = case.values.bfloat16().float().square().sum(-1).mean(-1).sqrt()
    size = size.repeat_interleave(len(case.queries) // len(size))[:, None]
    rows = []
    for kind, chosen in (
        ("window", [torch.arange(WINDOW)]),
        ("alone", torch.arange(0, WINDOW, WINDOW // NUM_SINGLE_QUERIES).split(1)),
    ):
        results_with_stats = [search.attend_with_stats(case.queries[None, :, at], bank, 0, scaling) for at in chosen]
        start = time.perf_counter()
        for at in chosen:
            search.attend(case.queries[None, :, at], bank, 0, scaling)
        seconds = (time.perf_counter() - start) / len(chosen)
        output, lse, read_lse = (torch.cat(tensors, 2)[0] for tensors in zip(*results_with_stats, strict=True))
        expected, expected_sum = (tensor[:, torch.cat(list(chosen))] for tensor in exact)
        difference = (output - expected).norm(dim=-1)
        relative = difference / expected.norm(dim=-1)
        rows.append(
            {
                "case": case.name,
                "way": way,
                "top_k": top_k,
                "queries": kind,
                "error_mean": relative.mean().item(),
                "error_p90": relative.flatten().quantile(0.9).item(),
                "error_of_values": (difference / size).mean().item(),
                "log_sum_error": (lse - expected_sum).abs().mean().item(),
                "mass_found": (read_lse - expected_sum).exp().clamp_max(1).mean().item(),
                "read_everything": (read_lse == lse).float().mean().item(),
                "milliseconds": seconds * 1e3,
            }
        )
    return rows


@torch.inference_mode()
def main() -> None:
    """Measure all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--only", default="", help="the cases whose name contains this")
    parser.add_argument("--tokens", type=int, default=32768, help="of memory")
    options = parser.parse_args()
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    print(f"{machine}; {options.tokens} tokens of memory, bfloat16")
    headers = f"{'error':>7}{'p90':>7}{'of values':>10}{'mass':>7}{'everything':>11}{'ms':>9}"
    print(f"{'':32}{'':6}{'top_k':>6} {'queries':8}{headers}")
    results: list[dict] = []
    cases = (case for make in (real_cases, synthetic_cases) for case in _only(make, options))
    for case in cases:
        bank = SingleBlockBank(case)
        output, lse = ExactSearch().attend(case.queries[None], bank, 0, case.queries.shape[-1] ** -0.5)
        for way, counts in METHODS.items():
            for top_k in counts:
                for row in measure(case, way, top_k, bank, (output[0], lse[0])):
                    results.append(row)
                    print(
                        f"{row['case']:32}{row['way']:6}{row['top_k']:6} {row['queries']:8}{row['error_mean']:7.3f}"
                        f"{row['error_p90']:7.3f}{row['error_of_values']:10.4f}{row['mass_found']:7.3f}"
                        f"{row['read_everything']:11.3f}{row['milliseconds']:9.2f}"
                    )
    if options.json:
        metadata = {"machine": machine, "command": command, "tokens": options.tokens}
        options.json.write_text(json.dumps(metadata | {"results": results}, indent=1) + "\n")


def _only(make: object, options: argparse.Namespace) -> Iterator[Case]:
    if make is real_cases and options.only and not options.only.startswith("real"):
        return
    for case in make(options.tokens):  # type: ignore[operator]
        if options.only in case.name:
            yield case


if __name__ == "__main__":
    main()

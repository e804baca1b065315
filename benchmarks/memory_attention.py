"""Speed and memory of attention to a long memory: the published method, llamory, and a plain LLaMA with a full cache.

    python benchmarks/memory_attention.py [--json FILE] [--only WORDS] [--lengths 4096 16384]

All methods have the same weights in float32: (a) the published method, eager (its default) and with SDPA, memory in
bfloat16 (`harness.ReferenceLongLlama`); (b) llamory with exact search; (c) llamory with pages; (d) stock LLaMA. Each
measurement has its own process, and the methods take turns within a repeat. Decoding starts with a local context of
half a window and a sampled memory with the mean and covariance of the model's own keys and values; prefill encodes a
prompt (real text for the base model) and computes the last token's logits. (a) also computes the logits of the whole
prompt, as the published code does; these are reported separately. Memory is the peak resident size above the loaded
model.

For pages the table has the relative error of the attention output and the attention mass on the pages that are read. A
model with random weights has nearly uniform attention, so that mass is small.

The floor of a decoding step is the time to read what any exact method must read (weights, local context, memory) at the
bandwidth measured in the same run; the floor of a prefill is the time of the matrix products that any exact method must
compute, at the measured rates.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from harness import (
    GIB,
    CachedKeysValues,
    Peak,
    ReferenceLongLlama,
    available_memory,
    in_child,
    processor,
    product_rate,
    read_rate,
)
from llamory.longllama import LongLlamaCache, LongLlamaConfig, LongLlamaForCausalLM
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank
from llamory.memory.search import Search, make_search
from llamory.memory.search.pages import PagesSearch
from llamory.models.base import load_model, load_tokenizer

# ---- methods ---------------------------------------------------------------------------------------------------------
METHODS = {
    "published": "(a) published, its default (eager)",
    "published-sdpa": "(a) published, its SDPA variant",
    "exact": "(b) llamory, exact",
    "pages": "(c) llamory, pages",
    "stock": "(d) stock LLaMA, full cache",
}
SAMPLE_TOKENS = 2048
SAMPLE_CHUNK_TOKENS = 16384


@dataclass(frozen=True)
class Case:
    """A model that all methods run.

    Attributes:
        name: what it is called.
        context: tokens of a window.
        mem_layers: the memory layers; None for the model's own.
        pretrained: whether it is the packaged base model, or one with random weights.
    """

    name: str
    context: int
    mem_layers: tuple[int, ...] | None
    pretrained: bool

    @property
    def last(self) -> int:
        """Tokens of the last window, and of the local context when decoding starts; it must not overflow."""
        return self.context // 2

    def long_model(self, search: str = "exact") -> LongLlamaForCausalLM:
        """The model as a LongLLaMA."""
        if self.pretrained:
            model = load_long_model(
                "base",
                mem_layers=self.mem_layers,
                context_length=self.context,
                last_context_length=self.last,
                mem_search=search,
                dtype=torch.float32,
            )
            return model.eval()
        torch.manual_seed(0)
        config = LongLlamaConfig(
            vocab_size=32000,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=6,
            num_attention_heads=4,
            max_position_embeddings=self.context,
            last_context_length=self.last,
            mem_layers=list(self.mem_layers or ()),
            mem_search=search,
        )
        return LongLlamaForCausalLM(config).eval()

    def stock_model(self) -> LlamaForCausalLM:
        """The same weights as a plain LLaMA."""
        if self.pretrained:
            model = load_model("default", LlamaForCausalLM, dtype=torch.float32)
            assert isinstance(model, LlamaForCausalLM)
            return model.eval()
        long = self.long_model()
        config = {key: value for key, value in long.config.to_dict().items() if key in LlamaConfig().to_dict()}
        model = LlamaForCausalLM(LlamaConfig(**config | {"model_type": "llama"}))
        model.load_state_dict(long.state_dict())
        return model.eval()

    def ids(self, count: int, seed: int = 0) -> Tensor:
        """Token ids (1, count): real text for the pretrained model, random ids for the random one."""
        if not self.pretrained:
            return torch.randint(3, 32000, (1, count), generator=torch.Generator().manual_seed(seed))
        text = library_text(9 * count + 100_000 * seed)[100_000 * seed :]
        ids = torch.tensor(load_tokenizer("default")(text, verbose=False)["input_ids"])
        # The library has some megabytes of text; longer prompts go round.
        return ids.repeat(-(-count // len(ids)))[None, :count]


def library_text(characters: int) -> str:
    """The first characters of the Python standard library's source, file after file."""
    parts, total = [], 0
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(file.read_text(errors="ignore"))
        total += len(parts[-1])
        if total >= characters:
            break
    return "\n\n".join(parts)[:characters]


@dataclass(frozen=True)
class KeyValueStatistics:
    """Means and covariances of a model's keys and values, for sampling.

    Attributes:
        layers: per memory layer, for keys and for values: means (kv_heads, 1, head_dim) and the Cholesky factors of
            the covariances (kv_heads, head_dim, head_dim).
    """

    layers: dict[int, tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]

    @classmethod
    def measure(cls, case: Case, path: Path) -> dict[str, Any]:
        """Encode some tokens and write the statistics of their memory to a file."""
        model = case.long_model()
        bank = model.read(case.ids(SAMPLE_TOKENS)[0])
        layers = {layer: (_moments(bank.keys(layer)), _moments(bank.values(layer))) for layer in bank.layers}
        torch.save(layers, path)
        return {"tokens": SAMPLE_TOKENS}

    @classmethod
    def load(cls, path: Path) -> KeyValueStatistics:
        """Load what `measure` wrote."""
        return cls(torch.load(path))

    def sample(self, layer: int, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values, (kv_heads, some tokens, head_dim), until there are `tokens` in all."""
        generator = torch.Generator().manual_seed(layer)
        for start in range(0, tokens, SAMPLE_CHUNK_TOKENS):
            parts = []
            for mean, factor in self.layers[layer]:
                shape = (len(mean), min(SAMPLE_CHUNK_TOKENS, tokens - start), mean.shape[-1])
                noise = torch.randn(shape, generator=generator)
                parts.append(torch.baddbmm(mean, noise, factor.transpose(1, 2)))
            yield parts[0], parts[1]


def _moments(tensor: Tensor) -> tuple[Tensor, Tensor]:
    mean = tensor.mean(1, keepdim=True)
    centred = (tensor - mean).double()
    covariance = centred.transpose(1, 2) @ centred / tensor.shape[1]
    ridge = 1e-6 * covariance.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] + 1e-12
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(tensor.shape[2], dtype=torch.double))
    return mean, factor.float()


class Method(Protocol):
    """One method of reading with memory."""

    def read(self, ids: Tensor) -> Tensor:
        """Encode a prompt (1, length); returns the logits of its last token."""

    def fill(self, statistics: KeyValueStatistics, tokens: int) -> None:
        """Put sampled tokens into memory."""

    def step(self, ids: Tensor) -> Tensor:
        """Continue with one token (1, 1); returns its logits."""


class PublishedMethod:
    """(a) The published method."""

    def __init__(self, case: Case, sdpa: bool):
        model = case.long_model()
        layers = list(model.config.mem_layers or ())
        self.method = ReferenceLongLlama(model, mem_layers=layers, context=case.context, last=case.last, sdpa=sdpa)
        self.hidden: Tensor | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.hidden = None
        self.method.memory, self.method.local = {}, {}
        self.hidden = self.method.read(ids)
        return self.method.head(self.hidden[:, -1:])

    def all_logits(self) -> Tensor:
        """Logits of the whole prompt, which the published code computes although only the last are used."""
        assert self.hidden is not None
        return self.method.head(self.hidden)

    def fill(self, statistics: KeyValueStatistics, tokens: int) -> None:
        for layer, moments in statistics.layers.items():
            buffers = [torch.empty(1, len(mean), tokens, mean.shape[-1], dtype=torch.bfloat16) for mean, _ in moments]
            for start, sampled in zip(
                range(0, tokens, SAMPLE_CHUNK_TOKENS), statistics.sample(layer, tokens), strict=True
            ):
                for buffer, part in zip(buffers, sampled, strict=True):
                    buffer[0, :, start : start + SAMPLE_CHUNK_TOKENS] = part
            self.method.memory[layer] = CachedKeysValues(buffers[0], buffers[1], torch.zeros(1, 1, tokens, 1))

    def step(self, ids: Tensor) -> Tensor:
        return self.method.step(ids)


class LlamoryMethod:
    """(b) and (c) llamory."""

    def __init__(self, case: Case, search: str):
        self.model = case.long_model(search)
        self.cache: LongLlamaCache | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.cache = LongLlamaCache(self.model.config, [self.model.model.new_memory()])
        return self._forward(ids)

    def fill(self, statistics: KeyValueStatistics, tokens: int) -> None:
        assert self.cache is not None
        for layer in statistics.layers:
            for keys, values in statistics.sample(layer, tokens):
                self.cache.memory[0].append(layer, keys, values)

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits


class BaselineMethod:
    """(d) A plain LLaMA with the full cache of all layers."""

    def __init__(self, case: Case):
        self.model = case.stock_model()
        self.cache: DynamicCache | None = None

    def read(self, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self._forward(ids)

    def fill(self, statistics: KeyValueStatistics, tokens: int) -> None:
        assert self.cache is not None
        # Its layers all have a cache; only the number of tokens matters here, so they may all be like one.
        sampled = list(zip(*statistics.sample(next(iter(statistics.layers)), tokens), strict=True))
        for cached in self.cache.layers:
            cached.keys, cached.values = (
                torch.cat([existing, *(part[None] for part in parts)], 2)
                for existing, parts in zip((cached.keys, cached.values), sampled, strict=True)
            )

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits


def make(case: Case, method: str) -> Method:
    """Make one of `METHODS`."""
    if method.startswith("published"):
        return PublishedMethod(case, sdpa=method == "published-sdpa")
    return BaselineMethod(case) if method == "stock" else LlamoryMethod(case, method)


# ---- measurements ----------------------------------------------------------------------------------------------------

WARMUP_STEPS = 2
MIN_STEPS = 3


def prefill(case: Case, method: str, length: int) -> dict[str, Any]:
    """Encode a prompt: seconds, peak bytes above the loaded model, and the last logits."""
    method_instance = make(case, method)
    ids = case.ids(length)
    method_instance.read(ids[:, : case.context + 2 * case.last])  # libraries allocate once
    method_instance.read(ids[:, :2])
    peak, start = Peak(), time.perf_counter()
    logits = method_instance.read(ids)
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "peak": peak.bytes()}
    result["logits"] = logits.flatten().tolist()
    if isinstance(method_instance, PublishedMethod):
        start = time.perf_counter()
        try:
            method_instance.all_logits()
            result["all_logits_seconds"] = time.perf_counter() - start
            result["all_logits_peak"] = peak.bytes()
        except RuntimeError:  # more than the process may take
            result["all_logits_seconds"] = result["all_logits_peak"] = None
    return result


def decode(case: Case, method: str, length: int, statistics_file: Path, steps: int, seconds: float) -> dict[str, Any]:
    """Decode with a sampled memory of `length` tokens: seconds of each step and peak bytes."""
    method_instance = make(case, method)
    ids = case.ids(case.last + WARMUP_STEPS + steps)
    method_instance.read(ids[:, : case.last])
    method_instance.step(ids[:, :1])
    method_instance.read(ids[:, : case.last])
    peak = Peak()
    method_instance.fill(KeyValueStatistics.load(statistics_file), length)
    peak.restart()
    times: list[float] = []
    for step in range(WARMUP_STEPS + steps):
        token = ids[:, case.last + step : case.last + step + 1]
        start = time.perf_counter()
        method_instance.step(token)
        times.append(time.perf_counter() - start)
        if sum(times) > seconds and len(times) >= MIN_STEPS:
            break
    warmup = min(WARMUP_STEPS, len(times) - 2)
    result: dict[str, Any] = {"first_step": times[0], "steps": times[warmup:], "peak": peak.bytes()}
    if method == "pages":
        assert isinstance(method_instance, LlamoryMethod) and method_instance.cache is not None
        comparison = Comparison()
        comparison.install(method_instance.model)
        method_instance.step(ids[:, :1])
        result["quality"] = comparison.summary()
    return result


def quality(case: Case, length: int) -> dict[str, Any]:
    """Error of pages on real keys: encode `length` tokens exactly, then compare in a last window and while decoding."""
    method_instance = LlamoryMethod(case, "exact")
    ids = case.ids(length + case.last + 16)
    comparison = Comparison()
    bank = method_instance.model.read(ids[0, :length])
    cache = method_instance.model.memory_cache(bank)
    result = {}
    with torch.no_grad():
        comparison.install(method_instance.model)
        method_instance.model(ids[:, length : length + case.last], past_key_values=cache, logits_to_keep=1)
        result["reading"] = comparison.summary()
        comparison = Comparison()
        comparison.install(method_instance.model)
        for step in range(length + case.last, ids.shape[1]):
            method_instance.model(ids[:, step : step + 1], past_key_values=cache)
        result["decoding"] = comparison.summary()
    return result


def machine(case: Case, lengths: list[int]) -> dict[str, Any]:
    """The machine's bandwidth for the bytes of a step, and its rate of matrix products."""
    config = case.long_model().config
    return {
        "read_rates": {length: read_rate(decode_bytes(case, config, length)) for length in lengths},
        "float32": product_rate(torch.float32),
        "bfloat16": product_rate(torch.bfloat16),
    }


# ---- floors ----------------------------------------------------------------------------------------------------------


def layer_weights(config: LongLlamaConfig) -> int:
    """Weights of the matrices of one layer."""
    attention = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    return config.hidden_size * (attention + 3 * config.intermediate_size)


def decode_bytes(case: Case, config: LongLlamaConfig, length: int) -> int:
    """Bytes that an exact step must read: weights and local context in float32, memory in bfloat16."""
    weights = layer_weights(config) * config.num_hidden_layers + config.vocab_size * config.hidden_size
    per_token = 2 * config.num_key_value_heads * config.head_dim
    local = config.num_hidden_layers * per_token * case.last
    return 4 * (weights + local) + 2 * len(config.mem_layers or ()) * per_token * length


def prefill_seconds(case: Case, config: LongLlamaConfig, length: int, float32: float, bfloat16: float) -> float:
    """Seconds of the matrix products that an exact prefill needs.

    What goes into memory needs the layers up to the last memory layer only, and of that one no more than the keys and
    values. Attention to memory is counted at the faster of the two rates, as memory is kept in bfloat16.
    """
    last_memory = max(config.mem_layers or [0])
    memory_tokens = max(length - case.last, 0)
    local_tokens = length - memory_tokens
    keys = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    linear = (
        memory_tokens * (layer_weights(config) * last_memory + keys)
        + local_tokens * layer_weights(config) * config.num_hidden_layers
    )
    windows = [min(case.context, memory_tokens - start) for start in range(0, memory_tokens, case.context)]
    width = config.num_attention_heads * config.head_dim
    local = (
        sum(window * window / 2 for window in windows) * last_memory
        + local_tokens * local_tokens / 2 * config.num_hidden_layers
    )
    memory_products, tokens_in_memory = 0.0, 0
    layers = len(config.mem_layers or ())
    for window in windows:
        memory_products += window * tokens_in_memory * (layers - 1)
        tokens_in_memory += window
    memory_products += local_tokens * tokens_in_memory * layers
    local_flops = 2 * (linear + config.vocab_size * config.hidden_size) + 4 * width * local
    return local_flops / float32 + 4 * width * memory_products / max(float32, bfloat16)


# ---- pages against exact ---------------------------------------------------------------------------------------------


class Comparison:
    """A search that answers exactly and records the error of pages."""

    def __init__(self) -> None:
        self.exact: Search = make_search("exact")
        self.pages = PagesSearch()
        self.errors: dict[int, list[Tensor]] = {}
        self.found: list[Tensor] = []

    def install(self, model: Any) -> None:
        """Replace a model's search."""
        model.model._memory_search()
        model.model._search = (model.model._search[0], self)

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`."""
        output, lse = self.exact.attend(query, bank, layer, scaling)
        guess, _, read_lse = self.pages.attend_with_stats(query, bank, layer, scaling)
        error = (guess - output).float().norm(dim=-1) / output.float().norm(dim=-1)
        self.errors.setdefault(layer, []).append(error.flatten())
        self.found.append((read_lse - lse).exp().flatten())
        return output, lse

    def summary(self) -> dict[str, float]:
        """Relative error of the output over all queries, heads and layers, and attention mass found."""
        layers = [torch.cat(errors) for errors in self.errors.values()]
        errors = torch.cat(layers)
        return {
            "error": errors.mean().item(),
            "error_95": errors.sort().values[int(0.95 * (len(errors) - 1))].item(),
            "error_worst_layer": max(layer.mean().item() for layer in layers),
            "found": torch.cat(self.found).mean().item(),
        }


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {"prefill": prefill, "decode": decode, "quality": quality}

# ---- runs ------------------------------------------------------------------------------------------------------------

CASES = [
    Case("hidden 256, 6 layers, 3 with memory", context=2048, mem_layers=(1, 3, 5), pretrained=False),
    Case("SmolLM2-135M, 30 layers, 25 with memory", context=512, mem_layers=None, pretrained=True),
]
LENGTHS = [4096, 16384, 65536, 262144]
MEASURES = ("decode", "prefill", "quality")
QUALITY_TOKENS = 16384
SLOW = 8.0  # seconds of a measurement from which it isn't repeated
LIMITS = {False: 450.0, True: 90.0}  # seconds; a random model's, the real model's; what would take longer is left out
DECODE_SECONDS = 20.0  # in which a measurement makes its steps, at least three

Results = dict[str, dict[str, Any]]


class Benchmark:
    """Runs measurements, skips those that would take too long, and collects results."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.memory = int(min(options.memory_limit * GIB, available_memory()))
        # Per case, measure and method: seconds at each length so far.
        self.elapsed: dict[tuple[str, str, str], dict[int, float]] = {}

    def child(self, function: Callable[..., dict], *args: Any) -> dict[str, Any]:
        """One measurement in a fresh process."""
        seconds = 2 * max(time_limit_of(case, self.options) for case in CASES) + 60
        return in_child(function, *args, threads=self.options.threads, seconds=seconds, memory=self.memory)

    def rounds(self, case: Case, measure: str, length: int, config: LongLlamaConfig, *args: Any) -> Results:
        """Measure all methods at one length, in turns, `repeats` times."""
        collected: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        slow: set[str] = set()
        for _ in range(self.options.repeats):
            for method in METHODS:
                if method in slow or method not in self.options.ways:
                    continue
                reason = self.skip_reason(case, measure, method, length, config)
                start = time.perf_counter()
                result = (
                    {"skipped": reason} if reason else self.child(MEASUREMENTS[measure], case, method, length, *args)
                )
                duration = time.perf_counter() - start
                collected[method].append(result)
                if duration > SLOW or "skipped" in result:
                    slow.add(method)
                if "skipped" not in result:
                    work = result["seconds"] if measure == "prefill" else sum(result["steps"]) + result["first_step"]
                    self.elapsed.setdefault((case.name, measure, method), {})[length] = work
        return {method: merge_rounds(results) for method, results in collected.items() if results}

    def skip_reason(self, case: Case, measure: str, method: str, length: int, config: LongLlamaConfig) -> str | None:
        """Why a measurement is skipped; None if it isn't."""
        if measure == "prefill" and method.startswith("published"):
            logits = 4 * length * config.vocab_size
            scores = 3 * 4 * config.num_attention_heads * case.context * length if method == "published" else 0
            if max(logits, scores) > self.memory:
                what = "the prompt's logits" if logits > scores else "a window's scores"
                return f"{what} alone take {max(logits, scores) / GIB:.0f} GiB"
        estimate = estimate_seconds(
            self.elapsed.get((case.name, measure, method), {}), length, linear=measure == "decode"
        )
        if estimate > time_limit_of(case, self.options):
            return f"left out: would take about {estimate:.0f} s"
        return None


def time_limit_of(case: Case, options: argparse.Namespace) -> float:
    """Maximum seconds of one measurement of a case."""
    return LIMITS[case.pretrained] if options.time_limit is None else options.time_limit


def estimate_seconds(elapsed: dict[int, float], length: int, linear: bool) -> float:
    """Estimate the seconds for a length from shorter ones; 0 if there is none."""
    if not elapsed:
        return 0.0
    *before, last = sorted(elapsed.items())
    per_token = growth = last[1] / last[0]
    if linear:
        return per_token * length
    # Reading costs each token its share of the layers, and of what was read before.
    growth = 0.5 * per_token / last[0]
    if before:
        growth = max(0.0, (per_token - before[-1][1] / before[-1][0]) / (last[0] - before[-1][0]))
    return (per_token + growth * (length - last[0])) * length


def merge_rounds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge the results of several rounds: medians of times, maxima of peaks."""
    completed = [result for result in results if "skipped" not in result]
    if not completed:
        return results[0]
    whole = dict(completed[-1])
    if "steps" in whole:
        steps = [statistics.median(result["steps"]) for result in completed]
        whole |= {"seconds": statistics.median(steps), "rounds": steps}
        whole["first_step"] = statistics.median(result["first_step"] for result in completed)
        del whole["steps"]
    else:
        seconds = [result["seconds"] for result in completed]
        whole |= {"seconds": statistics.median(seconds), "rounds": seconds}
    return whole | {"peak": max(result["peak"] for result in completed)}


def get_seconds(results: Results, method: str) -> float | None:
    return results.get(method, {}).get("seconds")


def print_rows(measure: str, length: int, results: Results, floor: float) -> None:
    """A table of one length."""
    what = "tokens of memory" if measure == "decode" else "tokens"
    print(f"\n  {measure}, {length:,} {what}; floor {per(measure, length, floor)}")
    for method, result in results.items():
        if "skipped" in result:
            print(f"    {METHODS[method]:34} {result['skipped']}")
            continue
        seconds = result["seconds"]
        line = f"    {METHODS[method]:34} {per(measure, length, seconds)}  {seconds / floor:5.1f} times the floor"
        line += f"  {result['peak'] / 2**20:8,.0f} MB"
        for other in ("published", "published-sdpa"):
            base = get_seconds(results, other)
            if base and method != other:
                line += f"  x{base / seconds:.1f} {'default' if other == 'published' else 'SDPA'}"
        print(line)
        if result.get("all_logits_peak"):
            seconds, peak = seconds + result["all_logits_seconds"], result["all_logits_peak"] / 2**20
            print(f"    {'':34} with the logits of the whole prompt {seconds:.1f} s, {peak:,.0f} MB")
        if "quality" in result:
            print(f"    {'':34} {format_quality(result['quality'])}")


def per(measure: str, length: int, seconds: float) -> str:
    return f"{seconds * 1000:9.2f} ms/token" if measure == "decode" else f"{length / seconds:9,.0f} tokens/s"


def format_quality(quality: dict[str, float]) -> str:
    """The error of pages in words."""
    text = f"output off by {quality['error']:.2%} (95%: {quality['error_95']:.2%})"
    text += f", worst layer {quality['error_worst_layer']:.2%}"
    return f"{text}; found {quality['found']:.1%} of the attention"


def differences(results: Results) -> dict[str, float]:
    """Largest difference of the last logits from those of (a)."""
    logits = {method: torch.tensor(result.pop("logits")) for method, result in results.items() if "logits" in result}
    reference = next((logits[method] for method in ("published", "published-sdpa", "exact") if method in logits), None)
    if reference is None:
        return {}
    return {method: (each - reference).abs().max().item() for method, each in logits.items() if method != "stock"}


def goals(measured: dict[tuple[str, int], Results]) -> list[tuple[str, float, float, bool]]:
    """The goals: description, goal, measured value, and whether it is reached."""
    found: list[tuple[str, float, float, bool]] = []

    def value(measure: str, length: int, method: str, key: str = "seconds") -> float | None:
        return measured.get((measure, length), {}).get(method, {}).get(key)

    def ratio(text: str, least: float, above: float | None, below: float | None, at_most: bool = False) -> None:
        if above is not None and below:
            reached = above / below
            found.append((text, least, reached, reached <= least if at_most else reached >= least))

    for length, exactly, pages in ((262144, 12, 60), (65536, 10, 20)):
        default = value("decode", length, "published")
        ratio(f"decode at {length:,}: exact against (a)", exactly, default, value("decode", length, "exact"))
        ratio(f"decode at {length:,}: pages against (a)", pages, default, value("decode", length, "pages"))
    long = 65536
    exact, pages_seconds = value("prefill", long, "exact"), value("prefill", long, "pages")
    ratio(f"prompt of {long:,}: exact against (a) SDPA", 3, value("prefill", long, "published-sdpa"), exact)
    ratio(f"prompt of {long:,}: exact against (a)", 12, value("prefill", long, "published"), exact)
    ratio(f"prompt of {long:,}: pages against exact", 3, exact, pages_seconds)
    for method in ("published-sdpa", "published"):
        for key, name in (("peak", "without its logits"), ("all_logits_peak", "with its logits")):
            text = f"prompt of {long:,}: memory of exact to (a) {'SDPA ' if method != 'published' else ''}{name}"
            ratio(text, 0.1, value("prefill", long, "exact", "peak"), value("prefill", long, method, key), at_most=True)
    for method in ("exact", "pages"):
        peak = value("prefill", 262144, method, "peak")
        if peak is not None:
            found.append((f"prompt of 262,144: GiB with {method}", 4, peak / GIB, peak <= 4 * GIB))
    ratio(
        "decode with pages at 262,144 to 4,096", 1.5,
        value("decode", 262144, "pages"), value("decode", 4096, "pages"), at_most=True,
    )  # fmt: skip
    return found


def run_case(bench: Benchmark, case: Case, folder: Path) -> dict[str, Any]:
    """All measurements of one model."""
    options = bench.options
    print(f"\n{case.name}: windows of {case.context}")
    config = case.long_model().config
    statistics_file = folder / f"{case.context}.pt"
    bench.child(KeyValueStatistics.measure, case, statistics_file)
    speed = bench.child(machine, case, options.lengths)
    reads = ", ".join(
        f"{decode_bytes(case, config, length) / 2**20:,.0f} MB at {rate / 1e9:.1f} GB/s"
        for length, rate in speed["read_rates"].items()
    )
    rates = " and ".join(f"{speed[dtype] / 1e9:,.0f} GFLOP/s in {dtype}" for dtype in ("float32", "bfloat16"))
    print(f"  this machine reads {reads}; matrix products {rates}")
    measured: dict[tuple[str, int], Results] = {}
    rows = []
    for measure in ("decode", "prefill"):
        for length in options.lengths if measure in options.measures else []:
            if measure == "decode":
                floor = decode_bytes(case, config, length) / speed["read_rates"][length]
                args: tuple = (statistics_file, options.steps, DECODE_SECONDS)
            else:
                floor = prefill_seconds(case, config, length, speed["float32"], speed["bfloat16"])
                args = ()
            results = measured[measure, length] = bench.rounds(case, measure, length, config, *args)
            row = {"measure": measure, "length": length, "floor_seconds": floor, "ways": results}
            row["logits_off"] = differences(results)
            print_rows(measure, length, results, floor)
            if row["logits_off"]:
                print(
                    "    logits off by " + ", ".join(f"{method} {off:.1e}" for method, off in row["logits_off"].items())
                )
            rows.append(row)
    outcome: dict[str, Any] = {"case": case.name, "machine": speed, "measurements": rows}
    if "quality" in options.measures:
        length = min(QUALITY_TOKENS, max(options.lengths))
        outcome["quality"] = {"tokens": length} | bench.child(quality, case, length)
        print(f"\n  pages against exact, after {length:,} tokens were read")
        for when in ("reading", "decoding"):
            if when in outcome["quality"]:
                print(f"    {when:10} {format_quality(outcome['quality'][when])}")
    names = ("goal", "wanted", "measured", "reached")
    outcome["goals"] = [dict(zip(names, goal, strict=True)) for goal in goals(measured)]
    for goal in outcome["goals"]:
        reached = "reached" if goal["reached"] else "MISSED"
        print(f"  goal: {goal['goal']:62} {goal['wanted']:5}  measured {goal['measured']:7.2f}  {reached}")
    return outcome


def main() -> None:
    """Run the cases and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=3, help="rounds; slow measurements have one")
    parser.add_argument("--steps", type=int, default=16, help="timed decoding steps per round")
    parser.add_argument("--only", default="", help="run the models whose name contains this")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens of memory, and of prompts")
    parser.add_argument("--ways", nargs="+", choices=METHODS, default=list(METHODS), help="which ways to run")
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES), help="what to measure")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each measurement")
    parser.add_argument("--memory-limit", type=float, default=24, help="GiB that a measurement may take")
    parser.add_argument("--time-limit", type=float, help="seconds that a measurement may take (450, base model 90)")
    options = parser.parse_args()
    # OpenMP reads it when a process starts; torch is format_quality, too.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.lengths.sort()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    name = f"{processor()}, {options.threads} threads, torch {torch.__version__}"
    print(name)
    bench, outcomes = Benchmark(options), []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            if options.only in case.name:
                outcomes.append(run_case(bench, case, Path(folder)))
    print(f"\n{(time.perf_counter() - start) / 60:.1f} minutes")
    if options.json:
        options.json.write_text(json.dumps({"machine": name, "results": outcomes}, indent=1) + "\n")


if __name__ == "__main__":
    main()

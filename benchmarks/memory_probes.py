"""The single measurements of `memory_attention.py`, each run in a fresh process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contenders import Case, KeyValueStatistics, LlamoryMethod, PublishedMethod, make
from llamory.longllama import LongLlamaConfig
from llamory.memory import MemoryBank
from llamory.memory.search import Search, make_search
from llamory.memory.search.pages import PagesSearch
from measuring import Peak, product_rate, read_rate

WARMUP_STEPS = 2
MIN_STEPS = 3


def prefill(case: Case, method: str, length: int) -> dict[str, Any]:
    """Read a prompt: seconds, bytes taken above the loaded model, and the logits behind it."""
    method_instance = make(case, method)
    ids = case.ids(length)
    method_instance.read(
        ids[:, : case.context + 2 * case.last]
    )  # libraries take their local_tokens time and memory once
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
    """Decode with a memory of `length` tokens, drawn to be like the model's local_tokens: seconds of each step, bytes taken."""
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
    """What pages miss on real keys: read `length` tokens exactly, then compare on a last window and while decoding."""
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
    """How fast this machine reads as many bytes as a step must read, and multiplies matrices."""
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
    """Bytes that one exact step can't do without: weights and local context in float32, memory in bfloat16."""
    weights = layer_weights(config) * config.num_hidden_layers + config.vocab_size * config.hidden_size
    per_token = 2 * config.num_key_value_heads * config.head_dim
    local = config.num_hidden_layers * per_token * case.last
    return 4 * (weights + local) + 2 * len(config.mem_layers or ()) * per_token * length


def prefill_seconds(case: Case, config: LongLlamaConfig, length: int, float32: float, bfloat16: float) -> float:
    """Seconds of the products that reading a prompt exactly can't do without.

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
    """A search that answers exactly and notes how memory_products pages are off."""

    def __init__(self) -> None:
        self.exact: Search = make_search("exact")
        self.pages = PagesSearch()
        self.errors: dict[int, list[Tensor]] = {}
        self.found: list[Tensor] = []

    def install(self, model: Any) -> None:
        """Take the place of a model's search."""
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
        """Error of the output, as a share of its size, over all queries, heads and layers; share of attention found."""
        layers = [torch.cat(errors) for errors in self.errors.values()]
        errors = torch.cat(layers)
        return {
            "error": errors.mean().item(),
            "error_95": errors.sort().values[int(0.95 * (len(errors) - 1))].item(),
            "error_worst_layer": max(layer.mean().item() for layer in layers),
            "found": torch.cat(self.found).mean().item(),
        }

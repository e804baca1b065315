"""The single measurements of `memory_attention.py`, each run in a fresh process."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from contenders import Case, Likeness, Ours, Published, make
from llamory.longllama import LongLlamaConfig
from llamory.memory import MemoryBank
from llamory.memory.search.base import Search, make_search
from llamory.memory.search.pages import PagesSearch
from measuring import Peak, product_rate, read_rate

WARM_STEPS = 2
LEAST_STEPS = 3


def prefill(case: Case, way: str, length: int) -> dict[str, Any]:
    """Read a prompt: seconds, bytes taken above the loaded model, and the logits behind it."""
    contender = make(case, way)
    ids = case.ids(length)
    contender.read(ids[:, : case.context + 2 * case.last])  # libraries take their own time and memory once
    contender.read(ids[:, :2])
    peak, start = Peak(), time.perf_counter()
    logits = contender.read(ids)
    result: dict[str, Any] = {"seconds": time.perf_counter() - start, "peak": peak.bytes()}
    result["logits"] = logits.flatten().tolist()
    if isinstance(contender, Published):
        start = time.perf_counter()
        try:
            contender.all_logits()
            result["all_logits_seconds"] = time.perf_counter() - start
            result["all_logits_peak"] = peak.bytes()
        except RuntimeError:  # more than the process may take
            result["all_logits_seconds"] = result["all_logits_peak"] = None
    return result


def decode(case: Case, way: str, length: int, likeness: Path, steps: int, seconds: float) -> dict[str, Any]:
    """Decode with a memory of `length` tokens, drawn to be like the model's own: seconds of each step, bytes taken."""
    contender = make(case, way)
    ids = case.ids(case.last + WARM_STEPS + steps)
    contender.read(ids[:, : case.last])
    contender.step(ids[:, :1])
    contender.read(ids[:, : case.last])
    peak = Peak()
    contender.fill(Likeness.load(likeness), length)
    peak.restart()
    times: list[float] = []
    for step in range(WARM_STEPS + steps):
        token = ids[:, case.last + step : case.last + step + 1]
        start = time.perf_counter()
        contender.step(token)
        times.append(time.perf_counter() - start)
        if sum(times) > seconds and len(times) >= LEAST_STEPS:
            break
    warm = min(WARM_STEPS, len(times) - 2)
    result: dict[str, Any] = {"first_step": times[0], "steps": times[warm:], "peak": peak.bytes()}
    if way == "pages":
        assert isinstance(contender, Ours) and contender.cache is not None
        comparison = Comparison()
        comparison.watch(contender.model)
        contender.step(ids[:, :1])
        result["quality"] = comparison.summary()
    return result


def quality(case: Case, length: int) -> dict[str, Any]:
    """What pages miss on real keys: read `length` tokens exactly, then compare on a last window and while decoding."""
    contender = Ours(case, "exact")
    ids = case.ids(length + case.last + 16)
    comparison = Comparison()
    bank = contender.model.read(ids[0, :length])
    cache = contender.model.memory_cache(bank)
    result = {}
    with torch.no_grad():
        comparison.watch(contender.model)
        contender.model(ids[:, length : length + case.last], past_key_values=cache, logits_to_keep=1)
        result["reading"] = comparison.summary()
        comparison = Comparison()
        comparison.watch(contender.model)
        for step in range(length + case.last, ids.shape[1]):
            contender.model(ids[:, step : step + 1], past_key_values=cache)
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
    ahead = max(length - case.last, 0)
    own = length - ahead
    keys = 2 * config.hidden_size * config.num_key_value_heads * config.head_dim
    linear = (
        ahead * (layer_weights(config) * last_memory + keys) + own * layer_weights(config) * config.num_hidden_layers
    )
    windows = [min(case.context, ahead - start) for start in range(0, ahead, case.context)]
    width = config.num_attention_heads * config.head_dim
    local = sum(window * window / 2 for window in windows) * last_memory + own * own / 2 * config.num_hidden_layers
    far, seen = 0.0, 0
    layers = len(config.mem_layers or ())
    for window in windows:
        far += window * seen * (layers - 1)
        seen += window
    far += own * seen * layers
    slow = 2 * (linear + config.vocab_size * config.hidden_size) + 4 * width * local
    return slow / float32 + 4 * width * far / max(float32, bfloat16)


# ---- pages against exact ---------------------------------------------------------------------------------------------


class Comparison:
    """A search that answers exactly and notes how far pages are off."""

    def __init__(self) -> None:
        self.exact: Search = make_search("exact")
        self.pages = PagesSearch()
        self.errors: dict[int, list[Tensor]] = {}
        self.found: list[Tensor] = []

    def watch(self, model: Any) -> None:
        """Take the place of a model's search."""
        model.model._memory_search()
        model.model._search = (model.model._search[0], self)

    def attend(self, query: Tensor, bank: MemoryBank, layer: int, scaling: float) -> tuple[Tensor, Tensor]:
        """See `Search.attend`."""
        output, log_sum = self.exact.attend(query, bank, layer, scaling)
        guess, _, read_sum = self.pages.attend_and_tell(query, bank, layer, scaling)
        error = (guess - output).float().norm(dim=-1) / output.float().norm(dim=-1)
        self.errors.setdefault(layer, []).append(error.flatten())
        self.found.append((read_sum - log_sum).exp().flatten())
        return output, log_sum

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

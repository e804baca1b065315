"""How fast and how lean is a long memory: the published method, ours, and a plain LLaMA that keeps everything?

    python benchmarks/memory_attention.py [--json FILE] [--only WORDS] [--lengths 4096 16384]

All ways run on the same weights in float32: (a) the published code's method, its default and its SDPA variant
(`published_way.py`, memory in bfloat16), (b) ours reading all of memory, (c) ours with pages, (d) stock LLaMA with its
full cache. Every measurement has a process of its own; repeats go round the ways, so that a drift of the machine hits
all alike. Decoding starts behind a local context of half a window, with a memory that is drawn to be like the model's
own keys and values; prefill reads a prompt (real text for the base model) and computes the last token's logits. (a)
also computes the logits of the whole prompt as the published code does; their time and memory are shown apart. Memory
is what is resident at most, above the loaded model.

Of pages it is said how far the attention output is off from the exact one, as a share of its size, and how much of the
attention falls on pages that are read. A model with random weights looks everywhere alike, so that share is small, and
so is what the other pages' means leave out.

The floor of a decoding step is the time to read what any exact method must read (weights, local context, memory) at the
rate at which the same run read a buffer of that size; the floor of a prefill is the time of the products that any exact
method must compute at the rates of matrix products in the same run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import memory_probes as probes
from contenders import METHODS, Case, KeyValueStatistics
from llamory.longllama import LongLlamaConfig
from measuring import GIB, available_memory, in_child, processor

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
    """Runs measurements, guesses which would take too long, and keeps what came out."""

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
        """All ways at one length, `repeats` times around."""
        collected: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
        slow: set[str] = set()
        for _ in range(self.options.repeats):
            for method in METHODS:
                if method in slow or method not in self.options.ways:
                    continue
                reason = self.skip_reason(case, measure, method, length, config)
                start = time.perf_counter()
                result = (
                    {"skipped": reason} if reason else self.child(getattr(probes, measure), case, method, length, *args)
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
        """Why a measurement isn't worth its time, if so."""
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
    """Seconds that one measurement of a case may take."""
    return LIMITS[case.pretrained] if options.time_limit is None else options.time_limit


def estimate_seconds(elapsed: dict[int, float], length: int, linear: bool) -> float:
    """How many seconds a length will take by those before it; 0 where nothing is known."""
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
    """The results of several rounds as one: medians of times, the highest of peaks."""
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
    """How far the logits behind a prompt are from those of (a), at most."""
    logits = {method: torch.tensor(result.pop("logits")) for method, result in results.items() if "logits" in result}
    reference = next((logits[method] for method in ("published", "published-sdpa", "exact") if method in logits), None)
    if reference is None:
        return {}
    return {method: (each - reference).abs().max().item() for method, each in logits.items() if method != "stock"}


def goals(measured: dict[tuple[str, int], Results]) -> list[tuple[str, float, float, bool]]:
    """What was to be reached: description, goal, what was measured, whether it is reached."""
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
    speed = bench.child(probes.machine, case, options.lengths)
    reads = ", ".join(
        f"{probes.decode_bytes(case, config, length) / 2**20:,.0f} MB at {rate / 1e9:.1f} GB/s"
        for length, rate in speed["read_rates"].items()
    )
    rates = " and ".join(f"{speed[dtype] / 1e9:,.0f} GFLOP/s in {dtype}" for dtype in ("float32", "bfloat16"))
    print(f"  this machine reads {reads}; matrix products {rates}")
    measured: dict[tuple[str, int], Results] = {}
    rows = []
    for measure in ("decode", "prefill"):
        for length in options.lengths if measure in options.measures else []:
            if measure == "decode":
                floor = probes.decode_bytes(case, config, length) / speed["read_rates"][length]
                args: tuple = (statistics_file, options.steps, DECODE_SECONDS)
            else:
                floor = probes.prefill_seconds(case, config, length, speed["float32"], speed["bfloat16"])
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
        outcome["quality"] = {"tokens": length} | bench.child(probes.quality, case, length)
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

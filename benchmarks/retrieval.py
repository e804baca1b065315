"""The retrieval table: each set with each model and BM25; nDCG@10 and Recall@100 with 95% intervals.

    python benchmarks/retrieval.py OUT SET [SET ...] --model NAME=MODEL [...] --mean-pooling NAME=MODEL [...]

A SET is a folder of `llamory dataset`, whose test split is used; a MODEL is anything that `llamory eval retrieval`
accepts. Results are written to OUT/SET.json, and a second call measures only what is missing. A set with fewer queries
or documents than the sample size is used as a whole.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

METRICS = ("nDCG@10", "Recall@100")


def evaluate(options: argparse.Namespace, data: Path, names: dict[str, str]) -> dict[str, Any]:
    """The results of `llamory eval retrieval` on a set, under the table's names."""
    work = options.output / "work" / data.name
    work.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable,
        "-m",
        "llamory",
        "eval",
        "retrieval",
        str(data / "test"),
        "--output",
        str(work),
        "--bf16",
    ]
    command += ["--max-length", str(options.max_length), "--json"]
    for flag, file in (("queries", "queries.jsonl"), ("documents", "corpus.jsonl")):
        available = (data / "test" / file).read_text(encoding="utf-8").count("\n")
        command += [f"--num-{flag}", str(min(getattr(options, flag), available))]
    for flag, entries in (("--model", options.model), ("--mean-pooling", options.mean_pooling)):
        for entry in entries:
            command += [flag, entry.partition("=")[2]]
    process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if process.returncode:
        sys.exit(process.returncode)
    result: dict[str, Any] = json.loads(process.stdout)
    result["settings"]["data"] = f"{data.name}/test"
    result["runs"] = {names.get(name, name): facts for name, facts in result["runs"].items()}
    for entry in result["differences"]:
        entry |= {side: names.get(entry[side], entry[side]) for side in ("model", "minus")}
    return result


def cell(entry: dict[str, Any], metric: str, sign: str = "") -> str:
    """A value with its interval."""
    low, high = entry["intervals"][metric]
    return f"{entry[metric]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def table(results: dict[str, dict[str, Any]], order: list[str]) -> str:
    """The Markdown table, one row per model."""
    headers = [f"{name}, {metric}" for name in results for metric in METRICS]
    lines = ["| | " + " | ".join(headers) + " |", "|---" * (len(headers) + 1) + "|"]
    for name in order:
        cells = [cell(result["runs"][name], metric) for result in results.values() for metric in METRICS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure what is missing, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("sets", type=Path, nargs="+")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--mean-pooling", action="append", default=[])
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--max-length", type=int, default=256)
    options = parser.parse_args()
    names = {model: name for name, _, model in (entry.partition("=") for entry in options.model)}
    names |= {f"mean of {model}": name for name, _, model in (entry.partition("=") for entry in options.mean_pooling)}
    results = {}
    for data in options.sets:
        results[data.name] = result = evaluate(options, data, names)
        (options.output / f"{data.name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(table(results, ["BM25", *names.values()]) + "\n\n")
    for data, result in results.items():
        for entry in result["differences"]:
            sys.stdout.write(f"{data}: {entry['model']} minus {entry['minus']}: {cell(entry, 'nDCG@10', '+')}\n")


if __name__ == "__main__":
    main()

"""The passkey table: the base model and the reader, with exact and approximate search, for prompts of up to 1M tokens.

    python benchmarks/passkey.py OUT [--texts DOCUMENTS] [--only NAME ...] [--max-prompt-length 256k] [--json FILE]
        [--figures FOLDER]

Each run is `llamory eval passkey` into OUT/NAME, cell by cell, and is resumed. Lengths above --max-prompt-length are
left for a later call. Windows are encoded independently, except in the runs "in order", where each window attends to
those before it, as in the paper. Runs with other search budgets have five depths. With --texts the other haystacks and
secrets are run too, with all of memory and with `--evidence-ratio 100`, as `llamory ask` does. All results in OUT are
printed as a table, written as JSON and plotted: a heat map of each run on the published prompt, and accuracy by length
with the published line of LongLLaMA-3B (arXiv:2307.03170, section 5.2).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "llamory"

from matplotlib import pyplot as plt  # noqa: E402

from llamory.cli.options import token_count  # noqa: E402
from llamory.evaluation.passkey import PasskeyResult, PasskeyResultsFile  # noqa: E402
from llamory.evaluation.plots import draw_heat_map  # noqa: E402

LENGTHS = ("4k", "8k", "16k", "32k", "64k", "128k", "256k", "1M")
OTHER_LENGTHS = ("4k", "16k", "64k")
BUDGET_LENGTHS = ("16k", "64k", "256k")
PUBLISHED = {18_000: 1.0, 100_000: 0.945, 256_000: 0.73}  # LongLLaMA 3B
DEPTHS, OTHER_DEPTHS = "10", "5"


@dataclass(frozen=True)
class Run:
    """A model, how it reads, and what is hidden."""

    model: str
    flags: tuple[str, ...] = ()
    lengths: tuple[str, ...] = LENGTHS
    depths: str = DEPTHS
    published: bool = True
    independent_documents: bool = True


def runs(options: argparse.Namespace) -> dict[str, Run]:
    """All runs, by name."""
    runs_by_name = {
        "base model": Run(options.base, lengths=LENGTHS[:5]),
        "reader, exact": Run(options.reader),
        "reader, pages": Run(options.reader, ("--mem-search", "pages")),
        "reader, 128 best": Run(options.reader, best(128)),
        "base model, in order": Run(
            options.base, lengths=LENGTHS[:2], depths=OTHER_DEPTHS, independent_documents=False, published=False
        ),
        "reader, in order": Run(
            options.reader, lengths=LENGTHS[:3], depths=OTHER_DEPTHS, independent_documents=False, published=False
        ),
    }
    budgets = {f"reader, {tokens} best": best(tokens) for tokens in (1, 2, 8, 32, 512, 2048)}
    for pages in (1, 2, 8):
        budgets[f"reader, {pages} pages"] = ("--mem-search", "pages", "--mem-top-k", str(pages))
    for name, flags in budgets.items():
        runs_by_name[name] = Run(options.reader, flags, BUDGET_LENGTHS, OTHER_DEPTHS, published=False)
    texts = tuple(word for path in options.texts for word in ("--haystack", str(path)))
    if texts:
        for model in ("base", "reader"):
            lengths = OTHER_LENGTHS[: None if model == "reader" else 1]
            for key in ("number", "name", "date", "sentence"):
                flags = (*texts, "--key", key)
                name = f"{model}, real text, {key}"
                runs_by_name[name] = Run(getattr(options, model), flags, lengths, OTHER_DEPTHS, published=False)
                if model == "reader":
                    runs_by_name[f"{name}, focused"] = replace(
                        runs_by_name[name], flags=(*flags, "--evidence-ratio", "100")
                    )
    return runs_by_name


def best(tokens: int) -> tuple[str, ...]:
    """Flags for attention to the best tokens of memory only, as in the paper."""
    return ("--mem-search", "faiss", "--mem-top-k-attention", "--mem-top-k", str(tokens))


def measure(name: str, run: Run, options: argparse.Namespace) -> None:
    """Run the missing cells of a run."""
    lengths = [length for length in run.lengths if token_count(length) <= token_count(options.max_prompt_length)]
    if not lengths:
        return
    command = [sys.executable, "-m", "llamory", "eval", "passkey", run.model, *run.flags]
    command += ["--independent-documents"] if run.independent_documents else []
    command += ["--lengths", ",".join(lengths), "--depths", run.depths, "--trials", "1", "--bf16"]
    command += ["--output", str(folder(name, options))]
    process = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)
    if process.returncode:
        sys.exit(process.returncode)


def folder(name: str, options: argparse.Namespace) -> Path:
    """The folder of a run."""
    run_folder: Path = options.output / name.replace(", ", "_").replace(" ", "_")
    return run_folder


def found(name: str, options: argparse.Namespace) -> PasskeyResult | None:
    """The cells of a run so far."""
    file = folder(name, options) / "passkey.json"
    if not file.exists():
        return None
    return PasskeyResultsFile(file).results["memory"]


def mean_by_length(result: PasskeyResult) -> dict[int, tuple[float, float, float]]:
    """For each complete length: fractions of keys and of digits found, seconds per prompt."""
    by_length = {}
    for length in result.lengths:
        cells = [cell for cell in result.cells if cell.length == length]
        if len(cells) < len(result.depths):
            continue
        figures = [(cell.accuracy, cell.digits, cell.seconds) for cell in cells]
        found_, digits, seconds = (sum(each) / len(cells) for each in zip(*figures, strict=True))
        by_length[length] = (found_, digits, seconds)
    return by_length


def table(results: dict[str, PasskeyResult]) -> str:
    """The Markdown table of keys found."""
    lengths = sorted({length for result in results.values() for length in result.lengths})
    headers = [f"{length >> 20}M" if length >= 1 << 20 else f"{length >> 10}k" for length in lengths]
    lines = ["| | " + " | ".join(headers) + " |", "|---" * (len(headers) + 1) + "|"]
    for name, result in results.items():
        measured = mean_by_length(result)
        cells = [f"{measured[length][0]:.0%}" if length in measured else "" for length in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict[str, PasskeyResult], all_runs: dict[str, Run], target: Path) -> None:
    """Draw the heat maps and the line plot of the published prompt."""
    shown = {name: result for name, result in results.items() if all_runs[name].published}
    if not shown:
        return
    draw_heat_map(target / "passkey.png", "Passkeys found", [result.panel(name) for name, result in shown.items()])
    figure, axes = plt.subplots(figsize=(7.5, 3.4), layout="constrained")
    for name, result in shown.items():
        points = mean_by_length(result)
        axes.plot(list(points), [100 * each[0] for each in points.values()], marker="o", markersize=4, label=name)
    published = [100 * share for share in PUBLISHED.values()]
    axes.plot(list(PUBLISHED), published, "--s", color="#666666", markersize=4, label="LongLLaMA 3B, as published")
    axes.set_xscale("log", base=2)
    ticks = [token_count(length) for length in LENGTHS]
    axes.set_xticks(ticks, LENGTHS)
    axes.set(xlabel="tokens of the prompt", ylabel="passkeys found, %", ylim=(-3, 103))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target / "passkey.svg", metadata={"Date": None})


def main() -> None:
    """Measure what is missing; print, write and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default="base")
    parser.add_argument("--reader", default="reader")
    parser.add_argument("--texts", type=Path, nargs="+", default=[])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--max-prompt-length", default=LENGTHS[-1])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figures", type=Path)
    options = parser.parse_args()
    all_runs = runs(options)
    for name, run in all_runs.items():
        if options.only is None or name in options.only:
            measure(name, run, options)
    results = {name: result for name in all_runs if (result := found(name, options)) is not None}
    sys.stdout.write(table(results) + "\n")
    if options.json:
        written: dict[str, Any] = {}
        for name, result in results.items():
            lines = {
                str(length): {"found": one, "digits": two, "seconds": round(three, 1)}
                for length, (one, two, three) in mean_by_length(result).items()
            }
            missed = [[cell.length, cell.depth] for cell in result.cells if cell.accuracy < 1]
            written[name] = {"by length": lines, "missed at length and depth": missed}
        options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    if options.figures:
        draw(results, all_runs, options.figures)


if __name__ == "__main__":
    main()

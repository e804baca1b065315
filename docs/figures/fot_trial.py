"""Draws the loss with memory and without over the steps of the FoT trial, from what the run noted.

python docs/figures/fot_trial.py        reads docs/results/fot_trial.json, writes docs/figures/fot_trial.png
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HERE = Path(__file__).parent
LINES = {"loss_without_memory": ("without memory", "#d55e00", "s"), "loss_with_memory": ("with memory", "#0072b2", "o")}


def main() -> None:
    """Draw."""
    curve = json.loads((HERE.parent / "results" / "fot_trial.json").read_text())["curve"]
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for key, (name, colour, mark) in LINES.items():
        axes.plot([at["step"] for at in curve], [at[key] for at in curve], color=colour, marker=mark, label=name)
    axes.set_xlabel("Steps of 8,192 tokens")
    axes.set_ylabel("Next-token loss of held-out modules")
    axes.set_title("A trial of FoT training on SmolLM2-135M", loc="left", fontweight="bold")
    axes.grid(color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(HERE / "fot_trial.png", dpi=110)


if __name__ == "__main__":
    main()

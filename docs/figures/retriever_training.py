"""Draws how the packaged retriever was trained: its losses, step by step.

    python docs/figures/retriever_training.py [--take NAME RUN ...]

draws docs/results/retriever_training.json into docs/figures/retriever_training.svg. `--take` first puts the log of a
training run's folder (its newest checkpoint) into that file, under a name: llara, tuned or base.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "llamory"

from matplotlib import pyplot as plt  # noqa: E402

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "retriever_training.json"
BAGS = {"ar_loss": "next token", "bow_summarize_loss": "words of the passage", "bow_predict_loss": "words that follow"}
TUNED = {"tuned": "LLARA first", "base": "the base model as it is"}


def logged(run: Path) -> list[dict[str, float]]:
    """The log of a run, without what no curve needs."""
    newest = max(run.glob("checkpoint-*"), key=lambda folder: int(folder.name.rsplit("-", 1)[1]))
    state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
    wanted = ("step", "loss", *BAGS)
    return [{key: entry[key] for key in wanted if key in entry} for entry in state["log_history"] if "loss" in entry]


def draw(runs: dict[str, list[dict[str, float]]], file: Path) -> None:
    """Two panels: LLARA's three losses, and the contrastive loss of both fine-tunings."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for key, label in BAGS.items():
        entries = [entry for entry in runs.get("llara", []) if key in entry]
        left.plot([entry["step"] for entry in entries], [entry[key] for entry in entries], label=label)
    left.set(title="LLARA, without labels", xlabel="steps", ylabel="loss, nats per token or word")
    for name, label in TUNED.items():
        entries = runs.get(name, [])
        right.plot([entry["step"] for entry in entries], [entry["loss"] for entry in entries], label=label)
    right.set(title="Fine-tuning on pairs", xlabel="steps", ylabel="contrastive loss")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    """Take up logs, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", nargs=2, action="append", default=[], metavar=("NAME", "RUN"))
    options = parser.parse_args()
    runs = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    runs |= {name: logged(Path(run)) for name, run in options.take}
    RESULTS.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    draw(runs, HERE / "retriever_training.svg")


if __name__ == "__main__":
    main()

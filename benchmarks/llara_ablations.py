"""What parts of LLARA pretraining do for retrieval: short runs that differ in one setting, nDCG@10 on dev parts.

    python benchmarks/llara_ablations.py OUT --set descriptions [--set ...] --texts UNLABELLED.jsonl [--steps 50]

Each run is `recipes/default_llara.yaml` with fewer steps and one setting changed; a second call measures what the first
one didn't reach. Kept in OUT/ablations.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from transformers import logging

from llamory.cli.settings import read_settings
from llamory.training.llara import train_llara
from llamory.training.settings import LlaraSettings
from whitening import arguments, dev_sets, measure, table

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "default_llara.yaml"
RUNS: dict[str, dict[str, object]] = {
    "the recipe": {},
    "bag-of-words losses divided by 10, as published": {"bow_weight": 0.1},
    "bag-of-words losses off": {"losses": ["ar"]},
    "AR loss off": {"losses": ["summarize", "predict"]},
    "prediction off": {"losses": ["ar", "summarize"]},
    "summary off": {"losses": ["ar", "predict"]},
    "4 slots": {"slots": 4},
    "16 slots": {"slots": 16},
}


def main() -> None:
    """Train and measure what is missing, print the table."""
    parser = arguments(__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sets = dev_sets(options.set, options.queries, options.documents)
    file = options.output / "ablations.json"
    options.output.mkdir(parents=True, exist_ok=True)
    results = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else {}
    for name in options.only:
        if name in results:
            continue
        folder = options.output / name.replace(" ", "_").replace(",", "")
        changes = {"steps": options.steps, "keep_checkpoints": 2, "whiten": 0, "export": False} | RUNS[name]
        changes |= {"data": [str(options.texts)], "output": str(folder), "resume": folder.exists(), "quiet": True}
        train_llara(read_settings(LlaraSettings, RECIPE, changes))
        results[name] = measure(str(folder), sets, options.texts, options.pieces, options.max_length)
        settings = {name: getattr(options, name) for name in ("steps", "queries", "documents", "pieces")}
        file.write_text(json.dumps(settings | {"runs": results}, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"{name}: {results[name]}\n")
        sys.stdout.flush()
    sys.stdout.write(table(results) + "\n")


if __name__ == "__main__":
    main()

"""Runs the steps of a build.sh in one process, with a tiny random model, synthetic data and one training step each.

python dry_run.py PLAN      called by build.sh --dry-run in its working folder; each line of PLAN is a command
"""

from __future__ import annotations

import json
import random
import runpy
import sys
from pathlib import Path

from transformers import LlamaForCausalLM

from llamory.cli import main as llamory
from llamory.models import base as backbone

WORDS = (
    "river stone water boat lantern copper meadow falcon code the a is of and under over keeps finds old new".split()
)
RECIPES = Path(__file__).parent
LAYERS = 3
TRAIN_FLAGS = ["--steps", "1", "--save-every", "1", "--cpu", "--quiet", "--no-bf16"]
MEMORY_LAYERS = ["--mem-layers", "1", "--mem-layers", "2"]
SMALLER = {
    "llara": ["--batch-size", "4"],
    "retriever": ["--batch-size", "4"],
    "fot": MEMORY_LAYERS,
    "instruct": [*MEMORY_LAYERS, "--negatives", "1", "--teacher-rows", "1"],
}
COUNTS = {"--documents": "12", "--examples": "40"}
SETS = ("descriptions", "functions", "sections", "faq")


def sentence(rng: random.Random) -> str:
    """A random sentence of 12 to 20 words."""
    return " ".join(rng.choices(WORDS, k=rng.randint(12, 20))).capitalize() + "."


def write_model(folder: Path) -> None:
    """Write a random LLaMA of three layers and a small tokenizer like the packaged one."""
    texts = [path.read_text() for path in [*Path().rglob("*.txt"), *RECIPES.rglob("*.py")]]
    tokenizer = backbone.load_tokenizer("base").train_new_from_iterator(texts, 2000)
    tokenizer.save_pretrained(folder)
    config = backbone.load_config("base")
    config.update(
        {
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
        }
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_data(rng: random.Random) -> None:
    """Write texts, code and BEIR folders under the names that the steps use."""
    for name in ("SPEECHES", "MANUALS", "BOOKS", "MORE_MANUALS", "CODE/train", "MORE_CODE"):
        folder = Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(2):
            paragraphs = [" ".join(sentence(rng) for _ in range(4)) for _ in range(120)]
            if "CODE" in name:
                lines = [f'def f{i}(a, b):\n    """{sentence(rng)}"""\n    return a\n' for i in range(150)]
                (folder / f"m{number}.py").write_text(f'"""{sentence(rng)}"""\n\n' + "\n".join(lines))
            else:
                (folder / f"t{number}.txt").write_text("\n\n".join(paragraphs))
    for name in SETS:
        for split in ("train", "dev", "test"):
            folder = Path(name, split)
            (folder / "qrels").mkdir(parents=True, exist_ok=True)
            documents = [" ".join(sentence(rng) for _ in range(3)) for _ in range(20)]
            corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
            queries = [{"_id": f"q{i}", "text": sentence(rng)} for i in range(20)]
            for file, entries in (("corpus", corpus), ("queries", queries)):
                (folder / f"{file}.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
            rows = "".join(f"q{i}\td{i}\t1\n" for i in range(20))
            (folder / "qrels" / f"{split}.tsv").write_text("query-id\tcorpus-id\tscore\n" + rows)


def run(command: list[str]) -> None:
    """Run a Python command of the plan in this process."""
    arguments = list(command[1:])
    for flag, value in COUNTS.items():
        if flag in arguments:
            arguments[arguments.index(flag) + 1] = value
    code: object = 0
    try:
        if arguments[:2] == ["-m", "llamory"]:
            is_training = arguments[2] == "train"
            llamory(arguments[2:] + ([*TRAIN_FLAGS, *SMALLER[arguments[3]]] if is_training else []))
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    if code:
        raise SystemExit(f"Failed with {code}: {' '.join(command)}")


def main() -> None:
    """Write model and data, and run the plan."""
    write_data(random.Random(0))
    write_model(Path("base_model"))
    for line in Path(sys.argv[1]).read_text().splitlines():
        sys.stdout.write(line.replace("\t", " ")[:160] + "\n")
        run(line.split("\t"))


if __name__ == "__main__":
    main()

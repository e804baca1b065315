"""The tables of docs/guides/scale_out.md: what a library of 10^6, 10^8 and 10^10 tokens takes.

    python benchmarks/scale.py --measure docs/results/scale.json    # statistics of texts, and encoding speed
    python benchmarks/scale.py [--write docs/guides/scale_out.md]   # print the tables, or write them into the page

The tables need the results of `benchmarks/encode.py`, `benchmarks/index.py` and `--measure` in docs/results. The page
has every formula; names here are the page's. No GPU is measured: its hours are FLOPs divided by the maker's rate times
an assumed utilisation.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import statistics
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path("docs/results")
TOKENS = (10**6, 10**8, 10**10)
GPUS = (1, 8, 64)
WINDOW = 512
BEGIN, END = "<!-- benchmarks/scale.py begins -->", "<!-- benchmarks/scale.py ends -->"


@dataclass(frozen=True)
class Model:
    """A model's shape.

    Attributes:
        weights: N, parameters of all layers, without embeddings and head.
        layers: L.
        width: heads times head_dim.
        dimension: D, of its vectors.
        memory: bytes of memory per token, as int8.
    """

    name: str
    weights: float
    layers: int
    width: int
    dimension: int
    memory: float


def int8_memory(layers: int, kv_heads: int, head_dim: int) -> float:
    """Bytes per token: a key and a value per layer and head, each with a float32 scale."""
    return layers * kv_heads * 2 * (head_dim + 4)


# Shapes as their configs have them; memory layers as published.
LARGE = (
    Model("LongLLaMA-3B", 26 * (4 * 3200**2 + 3 * 3200 * 8640), 26, 3200, 3200, int8_memory(3, 32, 100)),
    Model("LongLLaMA-Code-7B", 32 * (4 * 4096**2 + 3 * 4096 * 11008), 32, 4096, 4096, int8_memory(3, 32, 128)),
)


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(tokens: int) -> dict[str, Any]:
    """Passages of the standard library in numbers, and the base model reading into memory."""
    import torch

    from harness import processor
    from llamory.documents import chunk_document, read_file
    from llamory.llara.template import LlaraTemplate
    from llamory.longllama.loading import load_long_model
    from llamory.models.base import load_tokenizer

    tokenizer = load_tokenizer("default")
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    random.Random(0).shuffle(files)
    lengths, characters, ids = [], 0, list[int]()
    for file in files[:40]:
        for document in read_file(file):
            for passage in chunk_document(document, tokenizer, 256):
                found = tokenizer(passage.text, add_special_tokens=False)["input_ids"]
                lengths.append(len(found))
                characters += len(passage.text)
                ids += found
    prompt = LlaraTemplate.from_tokenizer(tokenizer).overhead(predict=False)
    model = load_long_model("base", mem_dtype="int8", dtype=torch.float32)
    model.read(ids[: 2 * WINDOW])
    start = time.perf_counter()
    bank = model.read(ids[:tokens])
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        bank.save(Path(folder) / "memory.safetensors")
        size = (Path(folder) / "memory.safetensors").stat().st_size
    config = model.config
    return {
        "command": f"python benchmarks/scale.py {shlex.join(sys.argv[1:])}".strip(),
        "machine": f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "passages": len(lengths),
        "passage_tokens": statistics.fmean(lengths),
        "passage_tokens_squared": statistics.fmean((length + prompt) ** 2 for length in lengths),
        "prompt_tokens": prompt,
        "characters_per_token": characters / sum(lengths),
        "read_tokens": bank.length(),
        "read_tokens_per_second": bank.length() / seconds,
        "memory_bytes_per_token": size / bank.length(),
        "memory_layers": len(config.mem_layers),
        "window": config.max_position_embeddings,
        "width": config.num_attention_heads * config.head_dim,
    }


# ---- the tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figures:
    """What was measured: the three files."""

    encode: dict[str, Any]
    index: dict[str, Any]
    scale: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> Figures:
        missing = [name for name in ("encode", "index", "scale") if not (folder / f"{name}.json").exists()]
        if missing:
            raise SystemExit(f"{folder} lacks {', '.join(f'{name}.json' for name in missing)}; measure first.")
        return cls(*(json.loads((folder / f"{name}.json").read_text()) for name in ("encode", "index", "scale")))

    @property
    def base(self) -> Model:
        """The model that was measured."""
        shape = self.encode["model"]
        memory = self.scale["memory_bytes_per_token"]
        weights, layers, width = shape["parameters_of_layers"], shape["layers"], self.scale["width"]
        return Model("the base model", weights, layers, width, shape["hidden"], memory)

    @property
    def encoded_per_second(self) -> float:
        """Passages per second that the base model encodes on this machine."""
        return self.encode["results"]["passages"]["texts_per_second"]["ours"]

    @property
    def _table(self) -> dict[str, Any]:
        return self.index["results"]["llamory"]

    @property
    def written_per_second(self) -> float:
        """Passages per second that one process writes."""
        return self.index["passages"] / self._table["index"]["seconds"]

    @property
    def text_bytes(self) -> float:
        """Bytes on disk per character of text, with the index of words and all columns but the vector."""
        vectors = 4 * self.index["dimension"] * self.index["passages"]
        return (self._table["disk"] - vectors) / (self.index["passages"] * self.index["characters"])

    def passages(self, tokens: float) -> float:
        """P = T / t."""
        return tokens / self.scale["passage_tokens"]

    def encode_flops(self, model: Model) -> float:
        """FLOPs of encoding one passage: 2 N n + 2 L w n^2, n being its tokens with the prompt."""
        n = self.scale["passage_tokens"] + self.scale["prompt_tokens"]
        return 2 * model.weights * n + 2 * model.layers * model.width * self.scale["passage_tokens_squared"]

    def read_flops(self, model: Model) -> float:
        """FLOPs of reading one token into memory: 2 N + 2 L w W."""
        return 2 * model.weights + 2 * model.layers * model.width * WINDOW

    def table_bytes(self, model: Model, tokens: float) -> float:
        """Text, words and vectors."""
        text = tokens * self.scale["characters_per_token"] * self.text_bytes
        return text + 4 * model.dimension * self.passages(tokens)


def tables(figures: Figures, gpu_flops: float, share: float) -> str:
    """Markdown."""
    base = figures.base
    models = (base, *LARGE)
    rate = gpu_flops * share
    n = figures.scale["passage_tokens"]
    lines = [
        f"Measured on {figures.encode['machine']}: {n:.0f} tokens in a passage and {figures.scale['prompt_tokens']} in "
        f"its prompt, {figures.scale['characters_per_token']:.2f} characters a token, {figures.text_bytes:.2f} bytes "
        f"on disk per character (text, words, columns), {figures.encoded_per_second:.1f} passages encoded and "
        f"{figures.written_per_second:.0f} written a second, {figures.scale['read_tokens_per_second']:.0f} tokens read "
        f"into memory a second, {base.memory:.0f} bytes of memory per token "
        f"({figures.scale['memory_layers']} memory layers, int8).",
        "",
        f"Encoding ran at {figures.encode_flops(base) * figures.encoded_per_second / 1e9:.0f} GFLOP/s and reading at "
        f"{figures.read_flops(base) * figures.scale['read_tokens_per_second'] / 1e9:.0f}. A GPU is taken to do "
        f"{gpu_flops / 1e12:.0f} TFLOP/s at {share:.0%}: **assumed, not measured**.",
        "",
        "| storage | " + " | ".join(f"{_power(tokens)} tokens" for tokens in TOKENS) + " |",
        "|---" * (len(TOKENS) + 1) + "|",
        _row("passages", [f"{figures.passages(tokens):,.0f}" for tokens in TOKENS]),
    ]
    for model in models:
        sizes = [_bytes(figures.table_bytes(model, tokens)) for tokens in TOKENS]
        lines.append(_row(f"table, {model.name} ({model.dimension} dimensions)", sizes))
    for model in models:
        sizes = [_bytes(model.memory * tokens) for tokens in TOKENS]
        lines.append(_row(f"memory of all documents, {model.name}", sizes))
    lines += [
        "",
        "| time | " + " | ".join(f"{_power(tokens)} tokens" for tokens in TOKENS) + " |",
        "|---" * (len(TOKENS) + 1) + "|",
        _row(
            "encode, the base model, this machine (measured rate)",
            [_time(figures.passages(tokens) / figures.encoded_per_second) for tokens in TOKENS],
        ),
        _row(
            "read into memory, the base model, this machine (measured rate)",
            [_time(tokens / figures.scale["read_tokens_per_second"]) for tokens in TOKENS],
        ),
        _row(
            "write, one process (measured rate)",
            [_time(figures.passages(tokens) / figures.written_per_second) for tokens in TOKENS],
        ),
    ]
    for model in models:
        # No faster than the one writer.
        encode = figures.encode_flops(model) / n
        written = 1 / (n * figures.written_per_second)
        for what, flops, least in (("encode and write", encode, written), ("read", figures.read_flops(model), 0)):
            for gpus in GPUS:
                name = f"{what}, {model.name}, {gpus} GPU{'s' if gpus > 1 else ''} (computed)"
                lines.append(_row(name, [_time(tokens * max(flops / (rate * gpus), least)) for tokens in TOKENS]))
    max_workers = figures.written_per_second / figures.encoded_per_second
    search = figures._table["search"]["dense"] / figures.index["passages"]
    lines += [
        "",
        f"One writer keeps up with {max_workers:,.0f} workers like this machine, or with "
        f"{figures.written_per_second * figures.encode_flops(base) / rate:,.2g} such GPUs encoding with the base model "
        f"({figures.written_per_second * figures.encode_flops(LARGE[1]) / rate:,.2g} with 7B). Searching all vectors "
        "exactly would take "
        + ", ".join(f"{_time(search * figures.passages(tokens))} at {_power(tokens)}" for tokens in TOKENS)
        + " tokens (the measured time for "
        f"{figures.index['passages']:,} passages, in proportion).",
    ]
    return "\n".join(lines)


def _row(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def _power(tokens: int) -> str:
    return f"10^{len(str(tokens)) - 1}"


def _bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    units = ((3600, "h"), (60, "min"), (1, "s"))
    unit, name = next((each for each in units if seconds >= each[0]), (1e-3, "ms"))
    size = seconds / unit
    return f"{size:,.0f} {name}" if size >= 100 else f"{size:.2g} {name}"


def main() -> None:
    """Measure, or make the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=Path, help="measure and write this file")
    parser.add_argument("--tokens", type=int, default=8192, help="to read into memory when measuring")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the measured files are")
    parser.add_argument("--write", type=Path, help="put the tables into this page")
    # The H100 SXM's dense bf16 rate, as its maker's data sheet states it; a third of it is an assumption.
    parser.add_argument("--gpu-flops", type=float, default=989e12)
    parser.add_argument("--share", type=float, default=0.33, help="of that rate which is reached")
    options = parser.parse_args()
    if options.measure:
        options.measure.write_text(json.dumps(measure(options.tokens), indent=1) + "\n")
        return
    text = tables(Figures.load(options.results), options.gpu_flops, options.share)
    if options.write is None:
        print(text)
        return
    before, rest = options.write.read_text().split(BEGIN)
    options.write.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()

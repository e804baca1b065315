"""The formulas of docs/guides/scale_out.md agree with the models, and the tables have measured figures only."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

import scale
from tiny_models import make_long_llama

MEASURED = {
    "encode": {
        "machine": "a machine",
        "model": {"parameters_of_layers": 1000, "layers": 2, "hidden": 8},
        "results": {"passages": {"texts_per_second": {"ours": 50.0}}},
    },
    "index": {
        "passages": 1000,
        "dimension": 8,
        "characters": 700,
        "results": {
            "llamory": {"disk": 4 * 8 * 1000 + 1_400_000, "index": {"seconds": 2.0}, "search": {"dense": 0.01}}
        },
    },
    "scale": {
        "passage_tokens": 100.0,
        "passage_tokens_squared": 120.0**2,
        "prompt_tokens": 20,
        "characters_per_token": 4.0,
        "read_tokens_per_second": 1000.0,
        "memory_bytes_per_token": 500.0,
        "memory_layers": 2,
        "width": 8,
    },
}


@pytest.fixture
def figures(tmp_path) -> scale.Figures:
    for name, content in MEASURED.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return scale.Figures.load(tmp_path)


def test_flops_are_those_that_torch_counts(figures):
    config = LlamaConfig(
        vocab_size=10, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    with torch.device("meta"):
        model = LlamaModel(config)
        ids = torch.zeros(1, 120, dtype=torch.long)
    shape = scale.Model("tiny", sum(p.numel() for p in model.layers.parameters() if p.ndim == 2), 3, 32, 32, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(flops for name, flops in counts.items() if "attention" in str(name) or "bmm" in str(name))
    products = sum(counts.values()) - attention
    # torch counts all pairs, of which a causal mask leaves half.
    rotary = 2 * 120 * config.head_dim // 2  # positions times frequencies, a product as well
    assert scale.Figures.encode_flops(figures, shape) == pytest.approx(products - rotary + attention / 2, rel=1e-3)


def test_memory_takes_what_a_bank_takes():
    model = make_long_llama(mem_dtype="int8")
    bank = model.read(torch.arange(3, 60))
    assert bank.nbytes / bank.length() == scale.int8_memory(2, 2, model.config.head_dim)


def test_the_tables_are_computed_from_what_was_measured(figures):
    assert figures.passages(10**6) == 10_000
    assert figures.text_bytes == pytest.approx(2.0)
    assert figures.table_bytes(figures.base, 10**6) == pytest.approx(10**6 * 4 * 2.0 + 4 * 8 * 10_000)
    text = scale.tables(figures, gpu_flops=1e12, share=0.5)
    rows = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.split("\n")
        if "|" in line
    }
    assert rows["encode, the base model, this machine (measured rate)"] == ["3.3 min", "5.6 h", "556 h"]
    assert rows["read into memory, the base model, this machine (measured rate)"] == ["17 min", "28 h", "2,778 h"]
    assert rows["memory of all documents, the base model"] == ["500 MB", "50 GB", "5 TB"]
    # 2 N + 2 L w W FLOPs a token at 0.5 TFLOP/s.
    flops = 2 * scale.LARGE[0].weights + 2 * 26 * 3200 * 512
    assert rows["read, LongLLaMA-3B, 1 GPU (computed)"][1] == f"{1e8 * flops / 0.5e12 / 3600:,.0f} h"
    assert rows["read, LongLLaMA-3B, 8 GPUs (computed)"][1] == f"{1e8 * flops / 4e12 / 3600:.2g} h"
    # The base model encodes faster than one process writes 500 passages a second.
    assert {rows[f"encode and write, the base model, {n} (computed)"][1] for n in ("1 GPU", "64 GPUs")} == {"33 min"}
    assert "keeps up with 10 workers" in text and "assumed, not measured" in text


def test_without_measurements_there_are_no_tables(tmp_path):
    with pytest.raises(SystemExit, match="measure first"):
        scale.Figures.load(tmp_path)


def test_the_page_has_a_place_for_them():
    page = (Path(__file__).parents[2] / "docs" / "guides" / "scale_out.md").read_text()
    assert page.count(scale.BEGIN) == page.count(scale.END) == 1 and page.index(scale.BEGIN) < page.index(scale.END)

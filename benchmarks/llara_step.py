"""Speed and memory of a LLARA training step, compared with a plain step that does what the published code does.

    python benchmarks/llara_step.py [--json FILE] [--profile]

Both steps (forward and backward pass) have the same weights and inputs and alternate in one process; each case prints
the medians of real tokens per second, their ratio, and both losses. Peak memory is measured in a new process per step,
above the loaded model. The floor is the time of the step's matrix products at the rate measured in the same run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from harness import processor, status_bytes
from llamory.llara import LlaraTemplate, PreLlamaModel

PASSAGE_TOKENS = 1024
BATCH = 4
TARGETS = 60


@dataclass(frozen=True)
class Case:
    """One comparison."""

    name: str
    hidden: int = 256
    vocabulary: int = 32000
    bf16: bool = False
    uneven: bool = False
    checkpointing: bool = False
    layers: int = 8
    memory: bool = False


CASES = [
    Case("hidden 256, float32", memory=True),
    Case("hidden 256, bf16", bf16=True),
    Case("hidden 768, float32", hidden=768),
    Case("hidden 768, bf16", hidden=768, bf16=True),
    Case("hidden 256, float32, uneven lengths", uneven=True),
    Case("hidden 256, bf16, uneven lengths", uneven=True, bf16=True),
    Case("hidden 768, float32, uneven lengths", hidden=768, uneven=True),
    Case("hidden 768, bf16, uneven lengths", hidden=768, uneven=True, bf16=True),
]
MEMORY_ONLY = [
    Case("hidden 256, float32, gradient checkpointing", checkpointing=True, memory=True),
    Case("hidden 256, float32, vocabulary 128256", vocabulary=128256, memory=True),
]


def make_template(vocabulary: int) -> LlaraTemplate:
    """A template of the published one's lengths whose slots are the last sixteen ids."""
    return LlaraTemplate(
        prefix_ids=(1, 376),
        summarize_prompt_ids=(9162, 19138, 675, 278, 2038, 13382, 2629, 9475, 3838, 29901, 29871),
        summarize_slot_ids=tuple(range(vocabulary - 16, vocabulary - 8)),
        predict_prompt_ids=(9162, 8500, 278, 1494, 13382, 2629, 9475, 3838, 29901, 29871),
        predict_slot_ids=tuple(range(vocabulary - 8, vocabulary)),
        ignored_ids=(0, 1, 2),
    )


def make_models(case: Case) -> tuple[LlamaForCausalLM, PreLlamaModel]:
    """The plain and our model, with the same random weights."""
    vocabulary = case.vocabulary + 16
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 64,
        max_position_embeddings=2048,
        pad_token_id=0,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config)
    config.llara = make_template(vocabulary).to_dict()
    ours = PreLlamaModel(config)
    ours.load_state_dict(plain.state_dict())
    return plain.train(), ours.train()


def make_batch(case: Case, seed: int) -> dict[str, torch.Tensor]:
    """Left-padded rows as the published collator makes them; uneven rows are as long as passages of real text are."""
    template = make_template(case.vocabulary + 16)
    generator = torch.Generator().manual_seed(seed)
    max_passage_tokens = PASSAGE_TOKENS - template.overhead()
    # Paragraphs of prose: a few fill the window, most are far shorter (here 1, 1/2, 1/4 and 1/8 of it).
    lengths = [max_passage_tokens // 2**i for i in range(BATCH)] if case.uneven else [max_passage_tokens] * BATCH
    rows, labels = [], []
    for length in lengths:
        passage = torch.randint(3, case.vocabulary, (length,), generator=generator).tolist()
        rows.append(template.sequence(passage))
        start = len(template.prefix_ids)
        labels.append([-100] * start + passage + [-100] * (len(rows[-1]) - start - length))
    width = max(map(len, rows))
    targets = torch.randint(3, case.vocabulary, (2, BATCH, TARGETS), generator=generator)
    return {
        "input_ids": torch.tensor([[0] * (width - len(r)) + r for r in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows]),
        "labels": torch.tensor([[-100] * (width - len(r)) + r for r in labels]),
        "output_summarize_ids": targets[0],
        "output_predict_ids": targets[1],
    }


def plain_step(model: nn.Module, batch: dict[str, torch.Tensor], template: LlaraTemplate) -> torch.Tensor:
    """The published way, written down plainly: dense mask, all logits in float32, a loop over the rows."""
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    summary, predict, slots = len(template.summarize_block_ids), len(template.predict_block_ids), template.slots
    lowest = torch.finfo(torch.float32).min
    mask = torch.full((length, length), lowest).triu(1)[None, None].repeat(len(ids), 1, 1, 1)
    mask.masked_fill_(batch["attention_mask"][:, None, None, :] == 0, lowest)
    mask[:, :, -predict:, -summary - predict : -predict] = lowest
    positions = torch.arange(length)[None]
    positions[:, -predict:] = torch.arange(predict) + length - summary - predict
    hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    logits = model.lm_head(hidden).float()
    loss = F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1))
    bow = []
    for name, slot_positions in (("summarize", slice(-predict - slots, -predict)), ("predict", slice(-slots, None))):
        log_p = logits[:, slot_positions].max(dim=1).values.log_softmax(dim=1)
        rows = []
        for row, targets in zip(log_p, batch[f"output_{name}_ids"], strict=True):
            target_ids = torch.unique(targets[targets > 2])
            if len(target_ids) > 0:
                rows.append(-row[target_ids].mean())
        bow.append(torch.stack(rows).mean() / 10)
    return loss + (bow[0] + bow[1]) / 2


def run_step(kind: str, model: nn.Module, batch: dict[str, torch.Tensor], case: Case) -> float:
    """One forward and backward pass; gives the loss."""
    autocast = torch.autocast("cpu", torch.bfloat16) if case.bf16 else contextlib.nullcontext()
    model.zero_grad(set_to_none=True)
    with autocast:
        loss = plain_step(model, batch, make_template(case.vocabulary + 16)) if kind == "plain" else model(**batch).loss
    loss.backward()
    return loss.item()


def measure_rate(bf16: bool) -> float:
    """Matrix-product rate in FLOP/s, on products of the sizes that the steps are made of."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    rates = []
    for inner in (256, 768):
        a, b = torch.randn(4096, inner, dtype=dtype), torch.randn(inner, 4 * inner, dtype=dtype)
        for _ in range(2):
            a @ b
        start = time.perf_counter()
        for _ in range(10):
            a @ b
        rates.append(10 * 2 * 4096 * inner * 4 * inner / (time.perf_counter() - start))
    return max(rates)


def step_flops(case: Case, batch: dict[str, torch.Tensor], config: LlamaConfig) -> float:
    """FLOPs of the products that no implementation can leave out: real tokens only, the head where there is a loss."""
    lengths = batch["attention_mask"].sum(1)
    layer = 4 * case.hidden**2 + 3 * case.hidden * config.intermediate_size
    head_rows = int((batch["labels"] != -100).sum()) + 16 * BATCH
    attention = float((lengths.double() ** 2).sum()) / 2 * case.hidden * 2
    return 6 * (float(lengths.sum()) * layer * case.layers + head_rows * case.hidden * config.vocab_size) + (
        3.5 * 2 * attention * case.layers
    )


def compare(case: Case, repeats: int) -> dict:
    """Time both steps, alternating."""
    models = dict(zip(("plain", "llamory"), make_models(case), strict=True))
    batch = make_batch(case, 0)
    tokens = int(batch["attention_mask"].sum())
    losses = {kind: run_step(kind, model, batch, case) for kind, model in models.items()}
    seconds: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(repeats):
        for kind, model in models.items():
            start = time.perf_counter()
            run_step(kind, model, batch, case)
            seconds[kind].append(time.perf_counter() - start)
    speed = {kind: tokens / statistics.median(times) for kind, times in seconds.items()}
    floor = step_flops(case, batch, models["llamory"].config) / measure_rate(case.bf16)
    return {
        "case": case.name,
        "tokens": tokens,
        "plain_tokens_per_s": speed["plain"],
        "llamory_tokens_per_s": speed["llamory"],
        "speedup": speed["llamory"] / speed["plain"],
        "plain_loss": losses["plain"],
        "llamory_loss": losses["llamory"],
        "floor_tokens_per_s": tokens / floor,
        "share_of_floor": speed["llamory"] * floor / tokens,
    }


def measure_peak_memory(kind: str, case: Case, queue: multiprocessing.Queue) -> None:
    """Peak resident memory of a step above the loaded model, in a process of its own."""
    plain, ours = make_models(replace(case, checkpointing=False))
    model = plain if kind == "plain" else ours
    del plain, ours
    if case.checkpointing and kind != "plain":
        model.gradient_checkpointing_enable()
    small = {key: value[:1, -64:] for key, value in make_batch(case, 0).items()}
    run_step(kind, model, small, case)  # libraries take their own memory once
    model.zero_grad(set_to_none=True)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run_step(kind, model, make_batch(case, 0), case)
    queue.put(status_bytes("VmHWM") - before)


def peak_memory(case: Case) -> dict[str, float]:
    """Peak memory of both steps; the plain step never checkpoints."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for kind in ("plain", "llamory"):
        queue = context.Queue()
        process = context.Process(target=measure_peak_memory, args=(kind, case, queue))
        process.start()
        peaks[kind] = queue.get()
        process.join()
    return {
        "plain_peak_mb": peaks["plain"] / 2**20,
        "llamory_peak_mb": peaks["llamory"] / 2**20,
        "peak_ratio": peaks["llamory"] / peaks["plain"],
    }


GROUPS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention kernel": ("aten::_scaled_dot_product",),
    "softmax of the head": ("aten::_softmax", "aten::amax", "_HeadLosses"),
}


def profile_step(case: Case) -> dict[str, float]:
    """Where our step's time goes: share of each group of operations."""
    from torch.profiler import ProfilerActivity, profile

    _, model = make_models(case)
    batch = make_batch(case, 0)
    run_step("llamory", model, batch, case)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run_step("llamory", model, batch, case)
    events = profiler.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    shares = dict.fromkeys([*GROUPS, "everything else"], 0.0)
    for event in events:
        group = next((g for g, names in GROUPS.items() if event.key.startswith(names)), "everything else")
        shares[group] += event.self_cpu_time_total / total
    return shares


def main() -> None:
    """Run the cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=7, help="timed steps of each kind per case")
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--profile", action="store_true", help="only print where our step's time goes, per case")
    options = parser.parse_args()
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(machine)
    results = []
    for case in CASES + MEMORY_ONLY:
        if options.only and options.only not in case.name:
            continue
        if options.profile:
            shares = profile_step(case)
            print(f"{case.name:40} " + ", ".join(f"{group} {share:.0%}" for group, share in shares.items()))
            continue
        result: dict = {"case": case.name}
        if case not in MEMORY_ONLY:
            result = compare(case, options.repeats)
            print(
                f"{case.name:40} plain {result['plain_tokens_per_s']:7.0f} tokens/s, llamory "
                f"{result['llamory_tokens_per_s']:7.0f}: x{result['speedup']:.2f}; loss {result['plain_loss']:.5f} and "
                f"{result['llamory_loss']:.5f}; {result['share_of_floor']:.0%} of the floor"
            )
        if case.memory:
            result |= peak_memory(case)
            print(
                f"{case.name:40} peak {result['plain_peak_mb']:6.0f} MB and {result['llamory_peak_mb']:6.0f} MB: "
                f"x{result['peak_ratio']:.2f}"
            )
        results.append(result | {"settings": asdict(case)})
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

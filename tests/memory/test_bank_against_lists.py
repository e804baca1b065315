"""Every operation of a bank, in any order, does what it does to plain lists of tensors."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from llamory.errors import LlamoryError
from llamory.memory import MemoryBank, bank, blocks

DTYPES = ("float32", "bfloat16", "float16", "int8")
LAYERS, HEADS, SIZE = (4, 1), 2, 3
NAMES = st.sampled_from(["a", "b", "c", "Ä 'quoted\" \\ \n name", "docs/ö.md", "\ud800 odd"])

# A plain memory: name -> layer -> keys and values in float32, all tokens one after the other, as they were given.
Plain = dict[str, dict[int, tuple[Tensor, Tensor]]]


def empty_tokens() -> dict[int, tuple[Tensor, Tensor]]:
    return {layer: (torch.zeros(HEADS, 0, SIZE), torch.zeros(HEADS, 0, SIZE)) for layer in LAYERS}


def check_stored(stored: Tensor, given: Tensor, dtype: str) -> None:
    assert stored.dtype == torch.float32
    assert stored.shape == given.shape
    if dtype == "int8":
        # 255 steps between -max and max of each token and head: no number is off by more than half a step.
        step = given.abs().amax(-1, keepdim=True) / 127
        assert ((stored - given).abs() <= 0.5001 * step).all()
    else:
        assert torch.equal(stored, given.to(getattr(torch, dtype)).float())


class BankMachine(RuleBasedStateMachine):
    """Up to four banks that fork, attach, save and load one another, each beside its plain memory."""

    dtype = "float32"

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.chance = torch.Generator().manual_seed(0)
        self.pairs: list[tuple[MemoryBank, Plain]] = []

    def teardown(self) -> None:
        self.folder.cleanup()

    @initialize()
    def start(self) -> None:
        self.pairs = [self.new()]

    def new(self) -> tuple[MemoryBank, Plain]:
        return MemoryBank(LAYERS, HEADS, SIZE, dtype=self.dtype, fingerprint="model"), {}

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, len(self.pairs) - 1))

    def pick_segment(self, data: st.DataObject, i: int) -> str:
        return data.draw(st.sampled_from(list(self.pairs[i][1])))

    @rule(data=st.data(), count=st.integers(0, 20), name=st.none() | NAMES, layers=st.sampled_from([LAYERS, (1,)]))
    def append(self, data, count, name, layers):
        made, plain = self.pairs[self.pick(data)]
        target = name if name is not None else next(reversed(plain), "context")
        expected_tokens = plain.setdefault(target, empty_tokens())
        for layer in layers:
            keys, values = 10 * torch.randn(2, HEADS, count, SIZE, generator=self.chance)
            made.append(layer, keys, values, segment=name)
            expected_tokens[layer] = (
                torch.cat([expected_tokens[layer][0], keys], 1),
                torch.cat([expected_tokens[layer][1], values], 1),
            )

    @rule(data=st.data())
    def drop(self, data):
        i = self.pick(data)
        if self.pairs[i][1]:
            name = self.pick_segment(data, i)
            self.pairs[i][0].drop(name)
            del self.pairs[i][1][name]

    @rule(data=st.data(), new=NAMES)
    def rename(self, data, new):
        i = self.pick(data)
        made, plain = self.pairs[i]
        if plain:
            old = self.pick_segment(data, i)
            if new in plain and new != old:
                with pytest.raises(LlamoryError, match="already has"):
                    made.rename(old, new)
            else:
                made.rename(old, new)
                self.pairs[i] = made, {new if name == old else name: each for name, each in plain.items()}

    @rule(data=st.data())
    def reorder(self, data):
        i = self.pick(data)
        made, plain = self.pairs[i]
        order = data.draw(st.permutations(list(plain)))
        made.reorder(order)
        self.pairs[i] = made, {name: plain[name] for name in order}

    @rule(data=st.data())
    def attach(self, data):
        (made, plain), (other, others_plain) = self.pairs[self.pick(data)], self.pairs[self.pick(data)]
        names = data.draw(st.none() | st.permutations(list(others_plain)).map(lambda names: names[:2]))
        wanted = list(others_plain) if names is None else names
        if any(name in plain for name in wanted):
            with pytest.raises(LlamoryError, match="already has a segment"):
                made.attach(other, names)
        else:
            made.attach(other, names)
            plain.update({name: dict(others_plain[name]) for name in wanted})

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(data=st.data(), way=st.sampled_from(["fork", "deepcopy", "to"]))
    def fork(self, data, way):
        made, plain = self.pairs[self.pick(data)]
        copied = {"fork": made.fork, "deepcopy": lambda: copy.deepcopy(made), "to": lambda: made.to("cpu")}[way]()
        self.pairs.append((copied, {name: dict(each) for name, each in plain.items()}))

    @precondition(lambda self: len(self.pairs) < 4)
    @rule(data=st.data())
    def slice_segments(self, data):
        made, plain = self.pairs[self.pick(data)]
        segment_spans, parts = [], {}
        for name in data.draw(st.lists(st.sampled_from(list(plain)), max_size=4) if plain else st.just([])):
            start = data.draw(st.integers(0, 40))
            segment_spans.append((name, start, data.draw(st.integers(start, start + 40))))
            expected_tokens = parts.setdefault(name, empty_tokens())
            for layer in LAYERS:
                sliced = [tensor[:, start : segment_spans[-1][2]] for tensor in plain[name][layer]]
                expected_tokens[layer] = tuple(
                    torch.cat(pair, 1) for pair in zip(expected_tokens[layer], sliced, strict=True)
                )
        self.pairs.append((made.slice(segment_spans), parts))

    @rule(data=st.data())
    def save_and_load(self, data):
        i = self.pick(data)
        path = Path(self.folder.name) / "memory"  # the same for all: what is mapped from it is overwritten
        self.pairs[i][0].save(path)
        loaded = MemoryBank.load(path, fingerprint="model", layers=LAYERS, dtype=self.dtype)
        self.pairs[i] = loaded, self.pairs[i][1]

    @precondition(lambda self: len(self.pairs) > 1)
    @rule(data=st.data())
    def forget_a_bank(self, data):
        del self.pairs[self.pick(data)]

    @invariant()
    def banks_hold_what_the_plain_memories_hold(self) -> None:
        for made, plain in self.pairs:
            assert made.segments == tuple(plain)
            for layer in LAYERS:
                counts = {name: each[layer][0].shape[1] for name, each in plain.items()}
                assert made.length(layer) == sum(counts.values())
                assert {name: made.length(layer, name) for name in plain} == counts
                for part, read in enumerate((made.keys, made.values)):
                    segment_spans = [each[layer][part] for each in plain.values()]
                    given_all = torch.cat([torch.zeros(HEADS, 0, SIZE), *segment_spans], 1)
                    check_stored(read(layer), given_all, self.dtype)
                    for name, each in plain.items():
                        check_stored(read(layer, name), each[layer][part], self.dtype)
                spans = made.spans(layer)
                assert all(0 <= span.start < span.stop <= span.block.filled for span in spans)
                assert sum(map(len, spans)) == made.length(layer)
            assert made.length() == made.length(LAYERS[0])
            numbers = sum(made.length(layer) for layer in LAYERS) * HEADS * SIZE * 2
            width = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1 + 4 / SIZE}[self.dtype]
            assert made.nbytes == round(numbers * width)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bank_behaves_like_lists_of_tensors(dtype, monkeypatch):
    # Small blocks, so that few tokens fill, cut off and gather many.
    monkeypatch.setattr(blocks, "SMALLEST_BLOCK", 8)
    monkeypatch.setattr(blocks, "LARGEST_BLOCK", 32)
    monkeypatch.setattr(bank, "_LONG_SPAN", 3)
    machine = type("Machine", (BankMachine,), {"dtype": dtype})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30, deadline=None))

"""Segments of a bank, the blocks they share, and what a bank refuses."""

from __future__ import annotations

import copy
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.memory import MemoryBank
from llamory.memory.blocks import Block, Span


def blocks(bank: MemoryBank, layer: int = 3) -> list[Block]:
    return list({span.block: None for span in bank.spans(layer)})


# ---- appending -------------------------------------------------------------------------------------------------------


def test_appending_writes_each_token_once_and_moves_none(tokens, monkeypatch):
    written = []
    write = Block.write

    def counting(self, keys, values):
        written.append(keys.shape[1])
        write(self, keys, values)

    monkeypatch.setattr(Block, "write", counting)
    bank = MemoryBank([3], 2, 4)
    places: dict[Block, int] = {}
    for step in range(300):
        bank.append(3, *tokens(97, seed=step))
        for block in blocks(bank):
            assert places.setdefault(block, block.keys.data_ptr()) == block.keys.data_ptr()
    assert sum(written) == 300 * 97
    assert len(places) == len(blocks(bank))
    assert torch.equal(bank.keys(3)[:, -97:], tokens(97, seed=299)[0].bfloat16().float())


def test_blocks_double_up_to_a_limit():
    bank = MemoryBank([0], 1, 2)
    window = torch.zeros(1, 4096, 2)
    for _ in range(300):
        bank.append(0, window, window)
    capacities = [block.capacity for block in blocks(bank, 0)]
    # 300 * 4096 tokens: 2^18 are reached by doubling, the rest is cut into the largest blocks.
    doubling = [4096, 4096, 8192, 16384, 32768, 65536, 131072]
    assert capacities == [*doubling, *[262144] * 4]
    assert len(bank.spans(0)) == len(capacities)


def test_a_long_text_at_once_gets_a_block_of_its_size():
    bank = MemoryBank([0], 1, 2)
    keys = torch.arange(600_000.0).view(1, -1, 1).expand(1, -1, 2)
    bank.append(0, keys, -keys)
    assert [block.capacity for block in blocks(bank, 0)] == [262144, 262144, 262144]
    bank = MemoryBank([0], 1, 2, dtype="float32")
    bank.append(0, keys, -keys)
    assert torch.equal(bank.values(0), -keys)


def test_segments_appended_in_order_are_one_span(make_bank):
    bank = make_bank({f"document {i}": 10 for i in range(50)})
    assert [(span.start, span.stop) for span in bank.spans(3)] == [(0, 500)]
    bank.reorder(["document 1", "document 0", *bank.segments[2:]])
    assert [(span.start, span.stop) for span in bank.spans(3)] == [(10, 20), (0, 10), (20, 500)]


def test_segments_that_grow_in_turns_have_few_spans(tokens):
    bank = MemoryBank([3], 2, 4, dtype="float32")
    for step in range(200):
        for name in "abc":
            bank.append(3, *tokens(1, seed=step), segment=name)
    assert len(bank.spans(3)) <= 6
    alone = torch.cat([tokens(1, seed=step)[0] for step in range(200)], 1)
    assert all(torch.equal(bank.keys(3, name), alone) for name in "abc")


def test_no_tokens_are_an_empty_segment(tokens):
    bank = MemoryBank([3, 5], 2, 4)
    bank.append(3, *tokens(0), segment="empty")
    assert bank.segments == ("empty",)
    assert (bank.length(), bank.length(5, "empty"), bank.nbytes, bank.spans(3)) == (0, 0, 0, ())
    assert bank.keys(3).shape == bank.values(5, "empty").shape == (2, 0, 4)


def test_tokens_go_to_the_last_segment_if_none_is_named(tokens):
    bank = MemoryBank([3], 2, 4)
    bank.append(3, *tokens(2))
    assert bank.segments == ("context",)
    bank.append(3, *tokens(1), segment="letter")
    bank.append(3, *tokens(4))
    assert (bank.length(3, "context"), bank.length(3, "letter")) == (2, 5)


def test_memory_keeps_no_gradient_and_outlives_inference_mode(tokens):
    bank = MemoryBank([3], 2, 4)
    keys, values = (each.requires_grad_() for each in tokens(2))
    bank.append(3, keys * 2, values)
    assert not bank.spans(3)[0].keys().requires_grad
    bank = MemoryBank([3], 2, 4)
    with torch.inference_mode():
        bank.append(3, *tokens(2))
    bank.append(3, *tokens(2))
    assert bank.length() == 4


def test_a_token_is_the_memorys_type_rounded_as_torch_rounds():
    bank = MemoryBank([0], 1, 1, dtype=torch.bfloat16)
    # 1 + 2^-8 lies in the middle of two bfloat16 numbers, of which 1 is even; 1 + 3 * 2^-8 goes up to 1 + 2^-6.
    bank.append(0, torch.tensor([[[1 + 2**-8], [1 + 3 * 2**-8]]]), torch.zeros(1, 2, 1))
    assert bank.keys(0).flatten().tolist() == [1, 1 + 2**-6]


def test_int8_keeps_a_scale_per_token_and_head():
    bank = MemoryBank([0], 1, 2, dtype="int8")
    keys = torch.tensor([[[127.0, -63.6], [0.0127, 0.001], [0, 0]]])
    bank.append(0, keys, torch.zeros_like(keys))
    assert bank.spans(0)[0].block.keys[0, :3].tolist() == [[127, -64], [127, 10], [0, 0]]
    assert torch.allclose(bank.keys(0), torch.tensor([[[127, -64], [0.0127, 0.001], [0, 0]]]))


# ---- segments --------------------------------------------------------------------------------------------------------


def test_the_block_of_dropped_segments_is_freed_with_its_last_user(make_bank):
    bank = make_bank({"a": 5, "b": 5})
    block = weakref.ref(bank.spans(3)[0].block)
    fork = bank.fork()
    bank.drop("a")
    bank.drop("b")
    assert block() is not None
    fork.drop("a")
    assert block() is not None
    fork.drop("b")
    assert block() is None


def test_dropping_or_renaming_all_segments_takes_time_in_proportion(monkeypatch):
    """Neither looks at the other segments' spans (defect 5)."""
    bank = MemoryBank([3, 5], 2, 4)
    for number in range(300):
        for layer in bank.layers:
            bank.append(layer, torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), segment=str(number))
    monkeypatch.setattr("llamory.memory.bank.merge_spans", None)
    lengths = []
    monkeypatch.setattr(Span, "__len__", lambda span: lengths.append(span) or span.stop - span.start)
    bank.rename_all({name: f"{name}'" for name in bank.segments})
    assert bank.segments[:2] == ("0'", "1'") and not lengths
    for name in bank.segments[1:]:
        bank.drop(name)
    assert (bank.segments, bank.length(3), bank.length(5)) == (("0'",), 1, 1)
    assert len(lengths) == 299 * 2


def test_names_can_be_swapped(make_bank):
    bank = make_bank({"a": 1, "b": 2, "c": 3})
    bank.rename_all({"a": "b", "b": "a"})
    assert [(name, bank.length(3, name)) for name in bank.segments] == [("b", 1), ("a", 2), ("c", 3)]


def test_spans_are_the_same_object_until_the_layer_changes(make_bank, tokens):
    bank = make_bank({"a": 1, "b": 2})
    before = bank.spans(3), bank.spans(5)
    bank.append(3, *tokens(2))
    assert bank.spans(5) is before[1]
    assert bank.spans(3).tokens == 5 and before[0].tokens == 3
    assert bank.spans(3).identity != before[0].identity == make_bank({}).spans(3).identity + before[0].identity
    bank.drop("a")
    assert bank.spans(5).tokens == 2


def test_a_bank_that_drops_what_it_reads_does_not_grow(tokens):
    bank = MemoryBank([3], 2, 4)
    for i in range(50):
        bank.append(3, *tokens(3000, seed=i), segment=f"document {i}")
        if i:
            bank.drop(f"document {i - 1}")
    assert sum(block.capacity for block in blocks(bank)) <= 4 * 4096


def test_metadata_of_a_segment_stay_with_it(make_bank):
    bank = make_bank({"a": 1, "b": 2})
    bank.set_metadata("a", source="letters/1.txt", lines=(1, 20))
    bank.set_metadata("a", digest="abc")
    bank.rename("a", "c")
    fork, attached = bank.fork(), make_bank({})
    attached.attach(bank, ["c"])
    fork.set_metadata("c", digest="xyz")
    for each in (bank, attached):
        assert each.metadata("c") == {"source": "letters/1.txt", "lines": [1, 20], "digest": "abc"}
    assert bank.metadata("b") == {}
    bank.metadata("c")["lines"].append(21)
    assert bank.metadata("c")["lines"] == [1, 20]


def test_attached_segments_share_blocks_in_the_order_given(make_bank):
    one, two = make_bank({"a": 3, "b": 4}), make_bank({"c": 5, "d": 6})
    bank = MemoryBank([3, 5], 2, 4, dtype="float32")
    bank.attach(two, ["d"])
    bank.attach(one, ["b", "a"])
    assert bank.segments == ("d", "b", "a")
    assert set(blocks(bank)) == {*blocks(one), *blocks(two)}
    assert torch.equal(bank.values(5), torch.cat([two.values(5, "d"), one.values(5, "b"), one.values(5, "a")], 1))


def test_a_bank_of_an_unknown_model_takes_over_the_first_fingerprint(make_bank):
    bank = make_bank({})
    bank.attach(make_bank({"a": 1}, fingerprint="one"))
    assert bank.fingerprint == "one"
    with pytest.raises(LlamoryError, match="another model"):
        bank.attach(make_bank({"b": 1}, fingerprint="two"))


# ---- forks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("take", [MemoryBank.fork, copy.deepcopy])
def test_a_fork_shares_blocks_and_sees_nothing_of_the_others(tokens, make_bank, take):
    bank = make_bank({"a": 10, "b": 5})
    before = bank.keys(3)
    forks = [take(bank) for _ in range(3)]
    assert all(set(blocks(fork)) == set(blocks(bank)) for fork in forks)
    asked = [tokens(4, seed=1000 + i) for i in range(3)]
    for fork, (keys, values) in zip(forks, asked, strict=True):
        fork.append(3, keys, values)
    bank.append(3, *tokens(2, seed=7), segment="a")
    for fork, (keys, _) in zip(forks, asked, strict=True):
        assert torch.equal(fork.keys(3), torch.cat([before, keys], 1))
    assert torch.equal(bank.keys(3), torch.cat([before[:, :10], tokens(2, seed=7)[0], before[:, 10:]], 1))
    forks[0].drop("a")
    forks[1].rename("a", "z")
    assert (bank.segments, forks[2].segments) == (("a", "b"), ("a", "b"))


def test_a_fork_of_a_large_memory_allocates_small_blocks():
    bank = MemoryBank([0], 1, 2)
    bank.append(0, torch.zeros(1, 300_000, 2), torch.zeros(1, 300_000, 2))
    forks = [bank.fork() for _ in range(2)]
    for fork in forks:
        fork.append(0, torch.ones(1, 5, 2), torch.ones(1, 5, 2))
    assert [blocks(fork, 0)[-1].capacity for fork in forks] == [262144, 4096]  # the first one goes on in place


def test_forks_of_forks_at_every_step_have_few_spans(tokens):
    beams = [MemoryBank([3], 2, 4, dtype="float32") for _ in range(2)]
    for beam in beams:
        beam.append(3, *tokens(3000))
    expected = [tokens(3000)[0]] * 2
    for step in range(200):
        parent = (step * 7) % 3 % 2
        beams = [beams[parent].fork() for _ in range(2)]
        for i, beam in enumerate(beams):
            keys, values = tokens(1, seed=2 * step + i)
            beam.append(3, keys, values)
        expected = [torch.cat([expected[parent], tokens(1, seed=2 * step + i)[0]], 1) for i in range(2)]
    for beam, keys in zip(beams, expected, strict=True):
        assert torch.equal(beam.keys(3), keys)
        assert len(beam.spans(3)) <= 12


def test_forks_may_be_filled_in_threads(tokens, monkeypatch):
    write = Block.write

    def slow(self, keys, values):
        time.sleep(0.01)  # long enough for the others to look for room too
        write(self, keys, values)

    bank = MemoryBank([3], 2, 4, dtype="float32")
    bank.append(3, *tokens(10))
    forks = [bank.fork() for _ in range(4)]
    monkeypatch.setattr(Block, "write", slow)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: forks[i].append(3, *tokens(5, seed=i)), range(4)))
    for i, fork in enumerate(forks):
        assert torch.equal(fork.keys(3), torch.cat([tokens(10)[0], tokens(5, seed=i)[0]], 1))


# ---- devices ---------------------------------------------------------------------------------------------------------


def test_memory_is_on_the_device_of_the_first_keys_or_on_the_given_one():
    keys = torch.zeros(2, 3, 4, device="meta")
    for device, expected in ((None, "meta"), ("meta", "meta")):
        bank = MemoryBank([3], 2, 4, device=device)
        bank.append(3, keys, keys)
        assert bank.spans(3)[0].block.keys.device.type == expected
    bank = MemoryBank([3], 2, 4, device="meta")
    bank.append(3, torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    assert bank.spans(3)[0].block.values.device.type == "meta"


def test_a_bank_can_be_moved(make_bank, same_content):
    bank = make_bank({"a": 3, "b": 2}, dtype="int8", fingerprint="m")
    bank.set_metadata("b", source="x")
    moved = bank.to("meta")
    assert (moved.segments, moved.length(5, "b"), moved.fingerprint) == (("a", "b"), 2, "m")
    assert {span.block.key_scales.device.type for span in moved.spans(5)} == {"meta"}
    assert same_content(bank.to("cpu"), bank)
    assert blocks(bank.to("cpu")) == blocks(bank)


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "sentence"),
    [
        (lambda bank, k: bank.append(4, k, k), "Layer 4 has no memory: the memory layers are 3, 5"),
        (lambda bank, k: bank.append(3, k[:1], k), r"\(2 key/value heads, tokens, 4\), not \(1, 6, 4\)"),
        (lambda bank, k: bank.append(3, k, k[..., :3]), r"Values .* not \(2, 6, 3\)"),
        (lambda bank, k: bank.append(3, k[None], k[None]), r"not \(1, 2, 6, 4\)"),
        (lambda bank, k: bank.append(3, k, k[:, :2]), "same tokens, not of 6 and 2"),
        (lambda bank, k: bank.append(3, k.int(), k.int()), "floating numbers, not int32"),
        (lambda bank, k: bank.append(3, k, k, segment=""), "name must be a text"),
        (lambda bank, k: bank.length(6), "Layer 6"),
        (lambda bank, k: bank.spans(6), "Layer 6"),
        (lambda bank, k: bank.keys(6), "Layer 6"),
        (lambda bank, k: bank.keys(3, "x"), "no segment 'x': it has 'a', 'b'"),
        (lambda bank, k: bank.length(3, "x"), "no segment 'x'"),
        (lambda bank, k: bank.drop("x"), "no segment 'x'"),
        (lambda bank, k: bank.metadata("x"), "no segment 'x'"),
        (lambda bank, k: bank.set_metadata("x"), "no segment 'x'"),
        (lambda bank, k: bank.set_metadata("a", source=object()), "JSON"),
        (lambda bank, k: bank.set_metadata("a", score=float("nan")), "JSON"),
        (lambda bank, k: bank.rename("x", "y"), "no segment 'x'"),
        (lambda bank, k: bank.rename("a", "b"), "already has a segment 'b'"),
        (lambda bank, k: bank.rename("a", ""), "name must be a text"),
        (lambda bank, k: bank.rename_all({"a": "c", "x": "y"}), "no segment 'x'"),
        (lambda bank, k: bank.rename_all({"a": "c", "b": "c"}), "already has a segment 'c'"),
        (lambda bank, k: bank.reorder(["a"]), r"every segment once \('a', 'b'\), not 'a'"),
        (lambda bank, k: bank.reorder(["a", "b", "b"]), "every segment once"),
        (lambda bank, k: bank.reorder(["a", "c"]), "every segment once"),
        (lambda bank, k: bank.reorder("ab"), "every segment once"),
        (lambda bank, k: bank.attach(bank.fork()), "already has a segment 'a'"),
        (lambda bank, k: bank.attach(bank.fork(), ["x"]), "no segment 'x'"),
        (lambda bank, k: bank.attach(MemoryBank([3], 2, 4, dtype="float32")), "memory layers 3, not 3, 5"),
        (lambda bank, k: bank.attach(MemoryBank([3, 5], 1, 4, dtype="float32")), "1 key/value heads"),
        (lambda bank, k: bank.attach(MemoryBank([3, 5], 2, 8, dtype="float32")), "size 8, not 2 of size 4"),
        (lambda bank, k: bank.attach(MemoryBank([3, 5], 2, 4, dtype="int8")), "stored as int8, not as float32"),
        (
            lambda bank, k: bank.attach(MemoryBank([3, 5], 2, 4, dtype="float32", fingerprint="two")),
            "another model .fingerprint two, not one.",
        ),
    ],
)
def test_invalid_calls_are_refused_and_change_nothing(make_bank, same_content, use, sentence):
    bank = make_bank({"a": 3, "b": 2}, fingerprint="one")
    before = bank.fork()
    with pytest.raises(LlamoryError, match=sentence) as refusal:
        use(bank, torch.zeros(2, 6, 4))
    assert "\n" not in str(refusal.value) and str(refusal.value).endswith(".")
    assert same_content(bank, before)


def test_attaching_is_all_or_nothing(make_bank):
    bank, other = make_bank({"a": 3}), make_bank({"c": 2, "a": 1})
    with pytest.raises(LlamoryError, match="already has a segment 'a'"):
        bank.attach(other)
    assert (bank.segments, bank.length()) == (("a",), 3)
    with pytest.raises(LlamoryError, match="already has a segment 'c'"):
        bank.attach(other, ["c", "c"])
    assert bank.segments == ("a",)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (([1, 1], 2, 4), "different"),
        (([-1], 2, 4), "not negative"),
        (([1], 0, 4), "at least one head"),
        (([1], 2, 0), "at least one head"),
    ],
)
def test_invalid_banks_are_refused(arguments, sentence):
    with pytest.raises(LlamoryError, match=sentence):
        MemoryBank(*arguments)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(LlamoryError, match="choose one of float32, bfloat16, float16, int8"):
        MemoryBank([1], 2, 4, dtype="float8")


def test_a_bank_without_layers_is_empty():
    bank = MemoryBank([], 2, 4)
    assert (bank.length(), bank.nbytes, bank.segments) == (0, 0, ())
    with pytest.raises(LlamoryError, match="the memory layers are none"):
        bank.length(0)

"""Cross-batch attention against published values, a plain reference, and windows encoded one by one."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.longllama import crossbatch
from llamory.longllama import flash_backward as kernels
from llamory.longllama.crossbatch import (
    cross_batch_attention,
    cross_batch_parts,
    crossbatch_contexts,
    plan_contexts,
    plan_frozen_contexts,
)
from llamory.longllama.losses import IGNORE_INDEX
from plain_crossbatch import plain_cross_batch
from tiny_models import make_long_llama

GOLDEN = sorted((Path(__file__).parent.parent / "golden").glob("crossbatch_*.json"))


def assert_close(actual, wanted, tolerance):
    """The difference is at most `tolerance` of the largest wanted value."""
    scale = float(wanted.detach().abs().max().clamp(min=0.01))  # a wanted value of 0 has a rounding error, too
    torch.testing.assert_close(actual, wanted, atol=tolerance * scale, rtol=0)


def rotary(seq, dim, theta=10000.0, first=0):
    frequencies = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(first, first + seq, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


def drawn(batch, heads, kv_heads, seq, dim, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, seq, dim), (batch, kv_heads, seq, dim), (batch, kv_heads, seq, dim)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("file", GOLDEN, ids=lambda file: file.stem)
def test_published_values(file):
    golden = json.loads(file.read_text())
    shape = [golden[name] for name in ("batch", "seq", "heads", "head_dim")]
    random = np.random.RandomState(golden["input_seed"])
    query, key, value, cotangent = (torch.tensor(random.standard_normal(shape)).transpose(1, 2) for _ in range(4))
    contexts = crossbatch_contexts(
        golden["batch"], golden["cross_batch_range"], golden["dataset_packing"], golden["cross_batch_stepping"]
    )
    assert [len(seen) for seen in contexts] == golden["additional_contexts_seen"]
    inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    cos, sin = rotary(golden["seq"], golden["head_dim"], golden["rope_theta"])
    output = cross_batch_attention(*inputs, cos, sin, contexts)
    gradients = torch.autograd.grad((output * cotangent).sum(), inputs)
    for name, tensor in zip(("output", "grad_query", "grad_key", "grad_value"), (output, *gradients), strict=True):
        expected = torch.tensor(golden[name], dtype=torch.float64).transpose(1, 2)
        assert_close(tensor, expected, 1e-8)


def any_contexts(draw, batch):
    return [
        draw(st.lists(st.sampled_from([r for r in range(batch) if r != row]), unique=True)) if batch > 1 else []
        for row in range(batch)
    ]


@pytest.mark.parametrize("way", ["cpu", "plain"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_contexts_heads_and_lengths_equal_the_plain_way(way, data):
    batch, seq = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    kv_heads, groups, dim = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), 8
    contexts = any_contexts(data.draw, batch)
    lengths = data.draw(st.none() | st.lists(st.integers(1, seq), min_size=batch, max_size=batch))
    inputs = drawn(batch, kv_heads * groups, kv_heads, seq, dim, data.draw(st.integers(0, 9)))
    cos, sin = rotary(seq, dim, first=data.draw(st.sampled_from([0, 3])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_backend", lambda query: way)
        patch.setattr(kernels, "MAX_MATMUL_SCORES", data.draw(st.sampled_from([1, 64, 1 << 22])))
        ours = cross_batch_attention(*inputs, cos, sin, contexts, lengths=lengths)
        real = torch.ones(batch, 1, seq, 1, dtype=torch.float64)
        for row, length in enumerate(lengths or []):
            real[row, :, length:] = 0
        cotangent = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * real
        plain = plain_cross_batch(*inputs, cos, sin, contexts, lengths=lengths)
        assert_close(ours * real, plain * real, 1e-10)
        wanted = torch.autograd.grad((plain * cotangent).sum(), inputs)
        for got, want in zip(torch.autograd.grad((ours * cotangent).sum(), inputs), wanted, strict=True):
            assert_close(got, want, 1e-9)


@pytest.mark.parametrize("way", ["cpu", "plain"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_other_rows_seen_by_projections_of_their_own(way, data):
    batch, seq = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    kv_heads, groups = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
    contexts = any_contexts(data.draw, batch)
    lengths = data.draw(st.none() | st.lists(st.integers(1, seq), min_size=batch, max_size=batch))
    seed = data.draw(st.integers(0, 9))
    near, far = (drawn(batch, kv_heads * groups, kv_heads, seq, 8, seed + more) for more in (0, 100))
    cos, sin = rotary(seq, 8, first=data.draw(st.sampled_from([0, 3])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_backend", lambda query: way)
        ours = cross_batch_parts(tuple(near), tuple(far), cos, sin, contexts, lengths=lengths)
        plain = plain_cross_batch(*near, cos, sin, contexts, lengths=lengths, far=far)
        real = torch.ones(batch, 1, seq, 1, dtype=torch.float64)
        for row, length in enumerate(lengths or []):
            real[row, :, length:] = 0
        for got, want in zip(ours, plain, strict=True):
            assert_close(got * real, want * real, 1e-10)
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(ours[0].shape, dtype=torch.float64, generator=generator) * real for _ in range(2)]
        losses = (sum((each * w).sum() for each, w in zip(outputs, weights, strict=True)) for outputs in (ours, plain))
        found, wanted = (torch.autograd.grad(loss, [*near, *far], materialize_grads=True) for loss in losses)
        for got, want in zip(found, wanted, strict=True):
            assert_close(got, want, 1e-9)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_projections_of_their_own_in_other_types(dtype, close):
    near, far = drawn(4, 6, 2, 40, 16), drawn(4, 6, 2, 40, 16, seed=5)
    cos, sin = rotary(40, 16)
    contexts = crossbatch_contexts(4, 3)
    wanted = plain_cross_batch(*near, cos, sin, contexts, far=far)
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in (*near, *far)]
    got = cross_batch_parts(tuple(low[:3]), tuple(low[3:]), cos.to(dtype), sin.to(dtype), contexts)
    losses = (each[0].double().square().sum() + 3 * each[1].double().square().sum() for each in (got, wanted))
    grads, expected = (
        torch.autograd.grad(loss, inputs) for loss, inputs in zip(losses, (low, [*near, *far]), strict=True)
    )
    for ours, theirs in zip((*got, *grads), (*wanted, *expected), strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).norm() < close * theirs.norm()


@pytest.mark.parametrize("way", ["cpu", "plain"])
@settings(deadline=None, max_examples=30)
@given(data=st.data())
def test_a_weight_of_a_whole_number_is_as_many_copies(way, data):
    batch, seq, kv_heads, groups = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 9)), 2, 2
    contexts = any_contexts(data.draw, batch)
    copies = [[data.draw(st.integers(1, 4)) for _ in seen] for seen in contexts]
    many = [
        [other for other, count in zip(seen, counts, strict=True) for _ in range(count)]
        for seen, counts in zip(contexts, copies, strict=True)
    ]
    inputs = drawn(batch, kv_heads * groups, kv_heads, seq, 8, data.draw(st.integers(0, 9)))
    cos, sin = rotary(seq, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_backend", lambda query: way)
        ours = cross_batch_attention(*inputs, cos, sin, contexts, weights=copies)
        plain = plain_cross_batch(*inputs, cos, sin, many)
        assert_close(ours, plain, 1e-10)
        wanted = torch.autograd.grad(plain.square().sum(), inputs)
        for got, want in zip(torch.autograd.grad(ours.square().sum(), inputs), wanted, strict=True):
            assert_close(got, want, 1e-9)


@pytest.mark.parametrize("weights", [[[1], [1]], [[1], [], []], [[0], [], []], [[math.nan], [], []]], ids=str)
def test_weights_that_cannot_be(weights):
    inputs = drawn(3, 2, 2, 4, 8)
    contexts = [[1], [2], []] if weights == [[1], [], []] else [[1], [], []]
    with pytest.raises(LlamoryError, match="needs a weight, a finite number above 0"):
        cross_batch_attention(*inputs, *rotary(4, 8), contexts, weights=weights)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 4e-3)])
def test_other_types(dtype, close):
    inputs = drawn(4, 6, 2, 40, 16)
    cos, sin = rotary(40, 16)
    contexts = crossbatch_contexts(4, 3)
    wanted = plain_cross_batch(*inputs, cos, sin, contexts)
    low = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    got = cross_batch_attention(*low, cos.to(dtype), sin.to(dtype), contexts)
    assert got.dtype == dtype
    assert_close(got.double(), wanted, close)
    grads = torch.autograd.grad(got.double().square().sum(), low)
    expected = torch.autograd.grad(wanted.square().sum(), inputs)
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours.double() - theirs).norm() < close * theirs.norm()


def test_keys_of_others_keep_the_factor_of_the_rotary_embedding():
    inputs = drawn(3, 2, 2, 5, 8)
    cos, sin = (1.3 * part for part in rotary(5, 8))
    contexts = [[1, 2], [], [0]]
    wanted = plain_cross_batch(*inputs, cos, sin, contexts)
    assert_close(cross_batch_attention(*inputs, cos, sin, contexts), wanted, 1e-10)


def test_rows_in_step_are_one_call():
    assert len(plan_contexts(crossbatch_contexts(16, 3), 16)) == 3
    assert (
        sum(group.rows.stop - group.rows.start for group in plan_contexts(crossbatch_contexts(16, 3), 16))
        == 1 + 2 + 3 * 13
    )


@pytest.mark.parametrize(
    ("contexts", "told"),
    [
        ([[1], [0]], "contexts for 2"),
        ([[], [1], []], "Row 1 can't see row 1"),
        ([[], [3], []], "Row 1 can't see row 3"),
        ([[], [-1], []], "Row 1 can't see row -1"),
        ([[], [0, 0], []], "Row 1 has a context twice"),
    ],
)
def test_contexts_that_cannot_be(contexts, told):
    inputs = drawn(3, 1, 1, 4, 8)
    with pytest.raises(LlamoryError, match=told):
        cross_batch_attention(*inputs, *rotary(4, 8), contexts)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((8, 2, 3), "can't be divided"),
        ((4, 4), "can't see 4 others in a batch of 4"),
        ((0, 1), "must be at least 1"),
        ((4, -1), "at least 0"),
        ((4, 1, 0), "must be at least 1"),
    ],
)
def test_ranges_that_cannot_be(arguments, told):
    with pytest.raises(LlamoryError, match=told):
        crossbatch_contexts(*arguments)


def test_nothing_flows_from_rows_that_are_not_seen_nor_backwards():
    contexts = crossbatch_contexts(8, 6, 4, crossbatch_stepping=True)
    inputs = drawn(8, 4, 2, 6, 8)
    cos, sin = rotary(6, 8)
    before = cross_batch_attention(*inputs, cos, sin, contexts)
    for row in range(8):
        for column in (0, 3, 5):
            changed = [tensor.detach().clone() for tensor in inputs]
            for tensor in changed:
                tensor[row, :, column] += 1
            after = cross_batch_attention(*changed, cos, sin, contexts)
            differs = (after != before).any(-1).any(1)
            expected = torch.zeros(8, 6, dtype=torch.bool)
            expected[row, column:] = True
            for other, seen in enumerate(contexts):
                expected[other] |= row in seen
            assert torch.equal(differs, expected)


def test_peak_memory_counts_no_copies(monkeypatch):
    """What reaches the kernels are views of the keys and values as they came."""
    seen = []
    real = crossbatch.flash

    def watch(query, key, value, **kwargs):
        seen.append((value.untyped_storage().data_ptr(), key.untyped_storage().data_ptr()))
        return real(query, key, value, **kwargs)

    monkeypatch.setattr(crossbatch, "flash", watch)
    query, key, value = (tensor.detach() for tensor in drawn(6, 4, 2, 8, 8))
    cross_batch_attention(query, key, value, *rotary(8, 8), crossbatch_contexts(6, 5))
    assert {values for values, _ in seen} == {value.untyped_storage().data_ptr()}
    assert len({keys for _, keys in seen}) == 2  # local keys, and those of all contexts


# ---- in the model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mem_positionals": False},
        {"num_key_value_heads": 4},
        {"mem_projections": True},
        {"memory_size_bias": 1.0, "memory_size_bias_start": 10},
        {"mem_projections": True, "memory_size_bias": 0.6, "memory_size_bias_start": 3},
    ],
    ids=str,
)
def test_chunks_that_see_all_earlier_ones_are_windows_read_one_by_one(changes):
    """What training computes in one pass is what reading computes window by window, in all layers."""
    context, chunks = 8, 4
    model = make_long_llama(max_position_embeddings=context, last_context_length=context, **changes)
    ids = torch.randint(5, 60, (1, context * chunks), generator=torch.Generator().manual_seed(3))
    contexts = [list(range(row)) for row in range(chunks)]
    with torch.no_grad():
        together = model.model(ids.view(chunks, context), contexts=contexts).last_hidden_state
        one_by_one = model.model(ids, last_context_length=context).last_hidden_state
    assert_close(together.view(1, -1, together.shape[-1]), one_by_one, 2e-5)


@pytest.mark.parametrize("own", [False, True])
def test_loss_and_gradients_equal_those_through_whole_logits_with_checkpointing_too(own):
    model = make_long_llama(max_position_embeddings=8, last_context_length=8, mem_projections=own).train()
    ids = torch.randint(5, 60, (4, 8), generator=torch.Generator().manual_seed(3))
    targets = torch.randint(5, 60, (4, 8), generator=torch.Generator().manual_seed(4))
    targets[1, 2:5] = -100
    contexts = [[], [0], [3, 1], [0, 1, 2]]
    hidden = model.model(ids, contexts=contexts).last_hidden_state
    plain = torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        output = model(ids, shift_labels=targets, contexts=contexts)
        assert output.logits is None
        torch.testing.assert_close(output.loss, plain)
        gradients = torch.autograd.grad(output.loss, list(model.parameters()))
        for got, want in zip(gradients, wanted, strict=True):
            assert_close(got, want, 1e-4)
    by_labels = model(ids, labels=ids, contexts=contexts).loss
    shifted = torch.cat([ids[:, 1:], torch.full((4, 1), -100)], 1)
    torch.testing.assert_close(by_labels, model(ids, shift_labels=shifted, contexts=contexts).loss)


def test_padding_on_the_right_is_seen_by_nobody():
    model = make_long_llama(max_position_embeddings=8, last_context_length=8)
    ids = torch.randint(5, 60, (3, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(3, 8, dtype=torch.long)
    mask[0, 5:] = mask[1, 2:] = 0
    contexts = [[], [0], [0, 1]]
    with torch.no_grad():
        before = model.model(ids, attention_mask=mask, contexts=contexts).last_hidden_state
        ids[0, 5:] += 1
        ids[1, 2:] += 1
        after = model.model(ids, attention_mask=mask, contexts=contexts).last_hidden_state
    real = mask.bool()
    assert torch.equal(before[real], after[real])
    assert not torch.equal(before[~real], after[~real])
    with pytest.raises(LlamoryError, match="padded on the right"):
        model.model(ids, attention_mask=mask.flip(1), contexts=contexts)


def test_a_row_longer_than_the_context_is_refused():
    model = make_long_llama(max_position_embeddings=8, last_context_length=8)
    with pytest.raises(LlamoryError, match="longer than the context"):
        model(torch.ones(2, 9, dtype=torch.long), contexts=[[], [0]])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_rows_that_predict_nothing_are_only_seen(implementation, own):
    """Leaving out what nobody sees of them changes neither the loss nor any gradient."""
    model = make_long_llama(
        max_position_embeddings=8,
        last_context_length=8,
        mem_layers=[0, 1],
        mem_projections=own,
        attn_implementation=implementation,
    ).train()
    ids = torch.randint(5, 60, (5, 8), generator=torch.Generator().manual_seed(3))
    targets = torch.randint(5, 60, (5, 8), generator=torch.Generator().manual_seed(4))
    targets[[0, 1, 3]] = -100
    mask = torch.ones(5, 8, dtype=torch.long)
    mask[1, 6:] = 0
    contexts = [[], [0], [0, 1], [0], [1, 3, 2]]
    seen = {"contexts": contexts, "context_weights": [[], [1], [2, 1.5], [3], [1, 7, 0.5]]}
    hidden = model.model(ids, attention_mask=mask, **seen).last_hidden_state
    plain = torch.nn.functional.cross_entropy(model.lm_head(hidden).flatten(0, 1), targets.flatten())
    wanted = torch.autograd.grad(plain, list(model.parameters()))
    output = model(ids, attention_mask=mask, shift_labels=targets, **seen)
    torch.testing.assert_close(output.loss, plain)
    assert not output.loss.isclose(model(ids, attention_mask=mask, shift_labels=targets, contexts=contexts).loss)
    assert not output.hidden_states[0][[0, 1, 3]].any()
    for got, want in zip(torch.autograd.grad(output.loss, list(model.parameters())), wanted, strict=True):
        assert_close(got, want, 1e-4)


def rotary_float64(seq, dim):
    frequencies = 1 / 10000.0 ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(seq, dtype=torch.float64)[:, None] * frequencies
    angles = torch.cat([angles, angles], -1)[None]
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("way", ["cpu", "plain"])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_rows_outside_the_batch_equal_the_plain_way(way, data):
    """The plain way has all rows in one batch, and names a row that counts as three of its kind three times."""
    asked, outside, seq = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 7))
    kv_heads, groups, dim = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), 8
    some = st.lists(st.sampled_from(range(outside)), unique=True)
    shared = data.draw(some)
    contexts = [shared if data.draw(st.booleans()) else data.draw(some) for _ in range(asked)]
    weights = [[data.draw(st.sampled_from([1, 3])) for _ in seen] for seen in contexts]
    lengths = data.draw(st.none() | st.lists(st.integers(1, seq), min_size=outside, max_size=outside))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))

    def drawn(rows, heads):
        return torch.randn((rows, heads, seq, dim), generator=generator, dtype=torch.float64).requires_grad_()

    near = [drawn(asked, kv_heads * groups), drawn(asked, kv_heads), drawn(asked, kv_heads)]
    far = [drawn(asked, kv_heads * groups), drawn(outside, kv_heads), drawn(outside, kv_heads)]
    cos, sin = rotary_float64(seq, dim)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_backend", lambda query: way)
        given_settings = {"lengths": lengths, "weights": weights, "frozen_contexts": True}
        found = cross_batch_parts(tuple(near), tuple(far), cos, sin, contexts, **given_settings)
        cotangents = [torch.randn(part.shape, generator=generator, dtype=torch.float64) for part in found]
        got = torch.autograd.grad(list(found), near + far, cotangents)

    def whole(tensor, before):
        empty = tensor.new_zeros(outside if before else asked, *tensor.shape[1:])
        return torch.cat([empty, tensor] if before else [tensor, empty])

    together = [whole(each, True) for each in near]
    others = whole(far[0], True), whole(far[1], False), whole(far[2], False)
    repeated = [
        [row for row, weight in zip(seen, given, strict=True) for _ in range(weight)]
        for seen, given in zip(contexts, weights, strict=True)
    ]
    every = None if lengths is None else [*lengths, *[seq] * asked]
    plain = plain_cross_batch(*together, cos, sin, [[]] * outside + repeated, lengths=every, far=others)
    plain = [part[outside:] for part in plain]
    wanted = torch.autograd.grad(plain, near + far, cotangents, allow_unused=True)
    for one, two in zip(found, plain, strict=True):
        assert_close(one, two, 1e-9)
    for one, two in zip(got, wanted, strict=True):
        assert_close(one, torch.zeros_like(one) if two is None else two, 1e-9)


def test_rows_that_see_the_same_are_looked_for_at_once():
    looks = plan_frozen_contexts([[0, 1, 2], [0, 1, 2], [2]], 3, 3, [4, 4, 2], [[1, 5, 5], [1, 5, 5], [1]])
    assert [(look.rows.start, look.rows.stop, look.seen, look.length, look.weight) for look in looks] == [
        (0, 2, (0,), 4, 1),
        (0, 2, (1,), 4, 5),
        (0, 2, (2,), 2, 5),
        (2, 3, (2,), 2, 1),
    ]
    with pytest.raises(LlamoryError, match="can't see row 3"):
        plan_frozen_contexts([[3]], 1, 3)


# ---- in the model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mem_projections": True},
        {"mem_positionals": False},
        {"attn_implementation": "eager"},
        {"mem_projections": True, "memory_size_bias": 0.6, "memory_size_bias_start": 7},
    ],
    ids=str,
)
def test_a_question_to_rows_read_apart_is_one_to_a_memory_with_each_mounted(changes):
    model = make_long_llama(max_position_embeddings=8, last_context_length=8, **changes)
    draw = torch.Generator().manual_seed(3)
    rows, lengths = torch.randint(5, 60, (3, 8), generator=draw), [8, 8, 5]
    asked = torch.randint(5, 60, (2, 6), generator=draw)
    contexts = [[0, 1, 2], [1]]
    memory = model.new_memory()
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        model.read(row[:length], memory, segment=str(number))
    rows[2, 5:] = 0
    states = model.model.layer_inputs(rows)
    more = {"contexts": contexts, "context_states": states, "context_lengths": lengths}
    with torch.no_grad():
        got = model.model(asked, **more).last_hidden_state
        for question, seen, hidden in zip(asked, contexts, got, strict=True):
            mounted = model.new_memory()
            mounted.attach(memory, list(map(str, seen)))
            cache = model.memory_cache(mounted)
            wanted = model.model(question[None], past_key_values=cache, last_context_length=8).last_hidden_state
            assert_close(hidden[None], wanted, 2e-5)


def test_gradients_of_memory_projections_equal_those_through_rows_of_the_batch():
    """What is read apart is the base's alone, so that nothing is lost by reading it without gradient."""
    model = make_long_llama(max_position_embeddings=8, last_context_length=8, mem_projections=True).train()
    model.requires_grad_(False)
    trained = [each.requires_grad_() for name, each in model.named_parameters() if ".mem_" in name]
    draw = torch.Generator().manual_seed(3)
    rows, asked = torch.randint(5, 60, (3, 8), generator=draw), torch.randint(5, 60, (2, 8), generator=draw)
    targets = torch.randint(5, 60, (2, 8), generator=draw)
    contexts, weights = [[0, 1, 2], [2, 1]], [[1, 3, 1], [2, 1]]
    whole = {"contexts": [[], [], [], *contexts], "context_weights": [[], [], [], *weights]}
    labels = torch.cat([torch.full((3, 8), IGNORE_INDEX), targets])
    plain = model(torch.cat([rows, asked]), shift_labels=labels, **whole).loss
    apart = {"contexts": contexts, "context_weights": weights, "context_states": model.model.layer_inputs(rows)}
    loss = model(asked, shift_labels=targets, **apart).loss
    torch.testing.assert_close(loss, plain)
    for got, wanted in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(plain, trained), strict=True):
        assert_close(got, wanted, 1e-4)


def test_without_the_kernel_plain_products_are_used(monkeypatch):
    query = torch.zeros(1, 1, 1, 8)
    assert kernels._backend(query) == "cpu"
    monkeypatch.setitem(kernels._KERNELS, "cpu", "_no_such_operator")
    assert kernels._backend(query) == "plain"

"""What a token sees, against the plainest computation; padding, batches, chunks and caches don't change it."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaForCausalLM
from plain_longllama import logits, sight

CONTEXT, LAST = 16, 8
SHARP = {"logn_attention_scale": 0.7, "logn_attention_start": 11}
OWN = {"mem_projections": True}
LESS = {"memory_size_bias": 0.8, "memory_size_bias_start": 5}


def expected(model, row, prompt, last=LAST):
    seen = sight(prompt, len(row) - prompt, CONTEXT, last)
    return logits(model, row, seen, model.config.mem_layers, model.config.mem_positionals).float()


def close(actual, wanted, tolerance=2e-5):
    """The difference is at most `tolerance` of the largest wanted value."""
    scale = 0.0 if wanted is None else float(wanted.detach().abs().max().clamp(min=1))  # None: there is no gradient
    torch.testing.assert_close(actual, wanted, atol=tolerance * scale, rtol=0)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("prompt", [3, 8, 9, 16, 24, 25, 61])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mem_positionals": False},
        {"mem_layers": [0]},
        {"mem_layers": []},
        SHARP,
        OWN,
        OWN | SHARP,
        LESS,
        OWN | SHARP | LESS,
    ],
)
def test_prompt_in_windows(make_model, ids, prompt, changes):
    model = make_model(**changes)
    last = LAST if model.config.mem_layers or prompt > CONTEXT else CONTEXT
    row = ids(prompt)
    close(model(row[None]).logits[0], expected(model, row, prompt, last))


@pytest.mark.parametrize("steps", [[1] * 40, [5] * 8, [40], [3, 1, 20, 1, 15], [16, 16, 8]])
@pytest.mark.parametrize("prompt", [5, 8, 37])
@pytest.mark.parametrize("changes", [{}, SHARP, OWN, LESS, OWN | LESS])
def test_local_context_slides(make_model, ids, prompt, steps, changes):
    model = make_model(**changes)
    row = ids(prompt + 40)
    cache = model(row[None, :prompt]).past_key_values
    found, start = [], prompt
    for step in steps:
        found.append(model(row[None, start : start + step], past_key_values=cache).logits[0])
        start += step
    close(torch.cat(found), expected(model, row, prompt)[prompt:])
    assert cache.local_length(0) == CONTEXT
    assert cache.memory_length(1) == prompt + 40 - CONTEXT
    assert cache.memory_length(0) == 0


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("changes", [{}, SHARP, OWN, LESS, OWN | LESS])
def test_padding_and_batch_change_nothing(make_model, ids, side, changes):
    model = make_model(**changes)
    lengths, more = [50, 5, 0, 23, 8], 30
    width = max(lengths) + 4
    prompts = [ids(length, seed=length) for length in lengths]
    batch, mask = torch.zeros(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width)
    for row, prompt in enumerate(prompts):
        start = {"left": width - len(prompt), "right": 0, "both": 2}[side]
        batch[row, start : start + len(prompt)] = prompt
        mask[row, start : start + len(prompt)] = 1
    output = model(batch, attention_mask=mask)
    following = ids(len(lengths), more, seed=99)
    decoded = []
    for step in range(more):
        mask = torch.cat([mask, torch.ones(len(lengths), 1)], 1)
        result = model(following[:, step : step + 1], attention_mask=mask, past_key_values=output.past_key_values)
        decoded.append(result.logits[:, 0])
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            assert not output.logits[row].any()
            continue
        wanted = expected(model, torch.cat([prompt, following[row]]), len(prompt))
        close(output.logits[row][mask[row, :width] > 0], wanted[: len(prompt)])
        close(torch.stack(decoded, 1)[row], wanted[len(prompt) :])


def test_padded_tokens_in_a_later_turn(make_model, ids):
    model = make_model()
    first, second = ids(2, 12), ids(2, 10, seed=5)
    mask = torch.tensor([[1] * 12 + [1] * 10, [1] * 12 + [0] * 6 + [1] * 4])
    cache = model(first).past_key_values
    model(second, attention_mask=mask, past_key_values=cache)
    third = ids(2, 20, seed=6)
    result = model(third, past_key_values=cache).logits
    for row, given in enumerate([second[0], second[1, 6:]]):
        close(result[row], expected(model, torch.cat([first[row], given, third[row]]), 12)[-20:])


def test_cache_off_puts_all_into_memory(make_model, ids):
    model = make_model()
    output = model(ids(1, 41), use_cache=False)
    assert output.past_key_values.memory_length(1) == 41
    assert output.past_key_values.local_length(1) == 0
    assert make_model(mem_layers=[])(ids(1, 12), use_cache=False).past_key_values is None


def test_last_context_length_of_a_call(make_model, ids):
    model, row = make_model(), ids(40)
    output = model(row[None], last_context_length=13)
    close(output.logits[0], expected(model, row, 40, last=13))
    assert output.past_key_values.local_length(0) == 13


@pytest.mark.parametrize("length", [0, -1, 17])
def test_last_context_length_is_checked(make_model, ids, length):
    with pytest.raises(LlamoryError, match="last_context_length"):
        make_model()(ids(1, 4), last_context_length=length)


@pytest.mark.parametrize("keep", [1, 3, 12, 30])
def test_only_the_logits_asked_for(make_model, ids, keep):
    model, row = make_model(), ids(1, 30)
    close(model(row, logits_to_keep=keep).logits, model(row).logits[:, -keep:])
    columns = torch.tensor([1, 5, 29])
    close(model(row, logits_to_keep=columns).logits, model(row).logits[:, columns])


@pytest.mark.parametrize("grouping", [(1, 1), (4, 3), (2, 100)])
def test_grouping_is_exact(make_model, ids, grouping):
    row = ids(1, 60)
    close(make_model(mem_attention_grouping=grouping)(row).logits, make_model()(row).logits)


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.3), ("float16", 0.05), ("int8", 0.5)])
def test_memory_in_fewer_bits_stays_close(make_model, ids, dtype, atol):
    row = ids(1, 60)
    exact, found = make_model()(row).logits, make_model(mem_dtype=dtype)(row).logits
    assert 0 < (exact - found).abs().max() < atol


def test_embeddings_instead_of_ids(make_model, ids):
    model, row = make_model(), ids(2, 40)
    embeds = model.get_input_embeddings()(row)
    close(model(inputs_embeds=embeds).logits, model(row).logits)


def test_hidden_states_of_all_windows(make_model, ids):
    model, row = make_model(), ids(1, 40)
    states = model(row, output_hidden_states=True).hidden_states
    assert [tuple(state.shape) for state in states] == [(1, 40, 32)] * 4
    close(states[0], model.get_input_embeddings()(row))
    close(model.lm_head(states[-1]), model(row).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_memory_layers_it_is_llama(make_model, ids, implementation):
    ours = make_model(mem_layers=[], attn_implementation=implementation)
    keys = LlamaConfig().to_dict().keys()
    plain = {key: value for key, value in ours.config.to_dict().items() if key in keys and key != "model_type"}
    stock = LlamaForCausalLM(LlamaConfig(**plain, attn_implementation=implementation)).eval()
    stock.load_state_dict(ours.state_dict())
    row = ids(2, CONTEXT)
    assert torch.equal(ours(row).logits, stock(row).logits)
    cache = ours(row[:, :9]).past_key_values
    stock_cache = stock(row[:, :9]).past_key_values
    for token in row[:, 9:].T:
        wanted = stock(token[:, None], past_key_values=stock_cache).logits
        close(ours(token[:, None], past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("changes", [{}, SHARP, OWN, LESS, OWN | LESS])
def test_gradients_reach_all_weights_and_are_one_softmax(make_model, ids, changes):
    model = make_model(**changes)
    row = ids(2, 40)
    with torch.enable_grad():
        trained = model.train()(row, labels=row)
        trained.loss.backward()
    # Memory is a constant here, so what alone makes its keys and values gets no gradient.
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in model.named_parameters() if "mem_k_proj" in name or "mem_v_proj" in name}
    close(trained.logits.detach(), model.eval()(row).logits)


@pytest.mark.parametrize("changes", [{}, SHARP, OWN, LESS, OWN | LESS])
def test_gradient_checkpointing_changes_nothing(make_model, ids, changes):
    gradients = []
    for every in (None, 1, 2):
        model = make_model(gradient_checkpoint_every_ith=every or 1, **changes).train()
        if every:
            model.activation_checkpointing_enable()
            assert [layer.gradient_checkpointing for layer in model.model.layers] == [
                index % every == 0 for index in range(3)
            ]
        with torch.enable_grad():
            model(ids(2, 40), labels=ids(2, 40), use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            close(one, two)


def test_other_caches_are_refused(make_model, ids):
    model = make_model()
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with pytest.raises(LlamoryError, match="DynamicCache"):
        model(ids(1, 4), past_key_values=cache)
    with pytest.raises(LlamoryError, match="rows"):
        model(ids(2, 4), past_key_values=model(ids(3, 4)).past_key_values)
    with pytest.raises(LlamoryError, match="use_cache"):
        model(ids(1, 4), past_key_values=model(ids(1, 4)).past_key_values, use_cache=False)


def test_bfloat16_model(make_model, ids):
    model = make_model().to(torch.bfloat16)
    cache = model(ids(1, 40)).past_key_values
    assert model(ids(1, 1), past_key_values=cache).logits.isfinite().all()


def test_rebasing_positions_keeps_the_distances(make_model, ids, monkeypatch):
    row = ids(200)
    model = make_model()
    wanted = expected(model, row, 10)[10:]
    monkeypatch.setattr("llamory.longllama.windows.REBASE_THRESHOLD", 50)
    cache = model(row[None, :10]).past_key_values
    found = torch.cat([model(token[None, None], past_key_values=cache).logits[0] for token in row[10:]])
    close(found, wanted, 1e-4)
    assert max(cache.slots.next) < 50


def test_saved_folder_loads_as_stock_llama(make_model, ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    row = ids(1, LAST)
    close(LlamaForCausalLM.from_pretrained(tmp_path)(row).logits, model(row).logits)
    again = LongLlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config.mem_layers == [1, 2]
    long = ids(1, 50)
    close(again(long).logits, model(long).logits)


def test_projections_of_memory_leave_what_is_read_without_it(make_model, ids, tmp_path):
    model = make_model(**OWN)
    stock = make_model(mem_layers=[])
    stock.load_state_dict({name: value for name, value in model.state_dict().items() if ".mem_" not in name})
    row = ids(2, LAST)
    assert torch.equal(model(row).logits, stock(row).logits)
    # A folder without them begins with the layer's own, and then they change nothing.
    make_model().save_pretrained(tmp_path / "without")
    begun, report = LongLlamaForCausalLM.from_pretrained(tmp_path / "without", output_loading_info=True, **OWN)
    assert not report["missing_keys"]
    long = ids(2, 50)
    close(begun(long).logits, make_model()(long).logits)
    model.save_pretrained(tmp_path / "with")
    again = LongLlamaForCausalLM.from_pretrained(tmp_path / "with")
    assert torch.equal(again(long).logits, model(long).logits)
    close(LlamaForCausalLM.from_pretrained(tmp_path / "with")(row).logits, model(row).logits)
    fingerprints = {each.memory_fingerprint() for each in (model, again, begun, make_model())}
    assert len(fingerprints) == 3


def test_the_bias_of_an_output_projection_counts_once(make_model, ids):
    model, row = make_model(attention_bias=True), ids(2, 50)
    for parameter in model.parameters():
        parameter += 0.01
    own = make_model(attention_bias=True, **OWN)
    state = model.state_dict()
    own.load_state_dict({name: state[name.replace(".mem_", ".")] for name in own.state_dict()})
    close(own(row).logits, model(row).logits)


@pytest.mark.parametrize("search", ["pages", "faiss"])
def test_searching_for_everything_is_exact(make_model, ids, search):
    row, steps = ids(2, 700), ids(2, 20, seed=1)
    settings = {"max_position_embeddings": 64, "last_context_length": 32}
    outputs = []
    for changes in ({}, {"mem_search": search, "mem_top_k": 10_000}):
        model = make_model(**settings | changes)
        output = model(row)
        following = [model(step[:, None], past_key_values=output.past_key_values).logits for step in steps.T]
        outputs.append(torch.cat([output.logits, *following], 1))
    close(*outputs)


@pytest.mark.parametrize("search", ["pages", "faiss"])
def test_searching_for_little_stays_close(make_model, ids, search):
    settings = {"max_position_embeddings": 64, "last_context_length": 32}
    exact = make_model(**settings)(ids(1, 3000)).logits[0, -32:]
    found = make_model(**settings, mem_search=search, mem_top_k=2)(ids(1, 3000)).logits[0, -32:]
    assert (found - exact).norm() < 0.2 * exact.norm()

"""The joint pass equals plain LLaMA passes over each prompt alone, however a batch is laid out."""

import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llamory.errors import LlamoryError
from llamory.llara import LlaraTemplate, NewLlamaModel, PreLlamaModel, PreModel
from llamory.llara.attention import _sdpa_padded, block_mask, flat_attention
from llamory.llara.layout import find_layout

PASSAGES = [[20, 21, 22, 23, 24, 25, 26], [30, 31, 32], [40, 41, 42, 43, 44], [50, 51, 52]]
SUMMARY = [[20, 21, 21, 1, 60], [31, 0, 0, 0, 0], [0, 0, 0, 0, 0], [61, 62, 63, 64, 65]]
PREDICT = [[70, 71], [0, 0], [72, 72], [73, 74]]


def plain(model):
    """The same weights in transformers' own class."""
    stock = LlamaForCausalLM(copy.deepcopy(model.config)).eval()
    stock.load_state_dict(model.state_dict(), strict=False)
    return stock


def reference(model, template, passages, summary, predict, ignored=(0, 1, 2)):
    """Losses by their definition, a stock LLaMA pass per passage and prompt, no joint pass and no mask."""
    stock, ar, bows = plain(model), [], ([], [])
    for passage, *targets in zip(passages, summary, predict, strict=True):
        ids = torch.tensor([template.sequence(passage, summarize=False, predict=False)])
        log_p = stock(ids).logits[0].log_softmax(-1)
        start = len(template.prefix_ids)
        ar += [-log_p[i - 1, ids[0, i]] for i in range(start, ids.shape[1])]
        for head, words in enumerate(targets):
            words = sorted({w for w in words if w not in ignored})
            if words:
                ids = torch.tensor([template.sequence(passage, summarize=head == 0, predict=head == 1)])
                best = stock(ids).logits[0, -template.slots :].amax(0)
                bows[head].append(-best.log_softmax(-1)[words].mean())
    heads = [torch.stack(b).mean() / 10 for b in bows if b]
    return torch.stack(ar).mean(), heads, stock


def batch(template, passages, padding="left", packed=False):
    rows = [template.sequence(p) for p in passages]
    labels = [
        [-100] * len(template.prefix_ids) + p + [-100] * (len(r) - len(p) - len(template.prefix_ids))
        for p, r in zip(passages, rows, strict=True)
    ]
    if packed:
        rows, labels = [rows[0] + rows[1], sum(rows[2:], [])], [labels[0] + labels[1], sum(labels[2:], [])]
    width = max(map(len, rows))

    def pad(values, filler):
        return torch.tensor(
            [
                ([filler] * (width - len(v)) + v) if padding == "left" else (v + [filler] * (width - len(v)))
                for v in values
            ]
        )

    return pad(rows, 0), pad([[1] * len(r) for r in rows], 0), pad(labels, -100)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_any_layout_gives_the_losses_of_separate_plain_passes(make_model, template, implementation, padding, packed):
    model = make_model(implementation=implementation)
    ar, heads, stock = reference(model, template, PASSAGES, SUMMARY, PREDICT)
    ids, mask, labels = batch(template, PASSAGES, padding, packed)
    output = model(
        ids,
        mask,
        labels=labels,
        output_summarize_ids=torch.tensor(SUMMARY),
        output_predict_ids=torch.tensor(PREDICT),
    )
    torch.testing.assert_close(output.ar_loss, ar, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.bow_summarize_loss, heads[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.bow_predict_loss, heads[1], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss, ar + (heads[0] + heads[1]) / 2, atol=1e-5, rtol=0)

    output.loss.backward()
    (ar + (heads[0] + heads[1]) / 2).backward()
    wanted = dict(stock.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("how", ["left", "right", "packed", "packed by positions", "cached"])
def test_slot_states_are_those_of_the_prompt_alone(make_model, template, how):
    model = make_model()
    stock = plain(model)
    ids, mask, _ = batch(template, PASSAGES, "left" if how == "left" else "right", how.startswith("packed"))
    positions = None
    if how == "packed by positions":
        positions = torch.zeros_like(ids)
        for row in positions:
            row.copy_(torch.arange(ids.shape[1]))
        lengths = [[len(template.sequence(p)) for p in group] for group in (PASSAGES[:2], PASSAGES[2:])]
        for row, group in zip(positions, lengths, strict=True):
            flat = sum(([*range(n)] for n in group), [])
            row[: len(flat)] = torch.tensor(flat)
    states = model.model(ids, mask, positions, use_cache=how == "cached").last_hidden_state
    for head, slots in enumerate((template.summarize_slot_ids, template.predict_slot_ids)):
        found = states[torch.isin(ids, torch.tensor(slots))].view(len(PASSAGES), len(slots), -1)
        for passage, state in zip(PASSAGES, found, strict=True):
            alone = torch.tensor([template.sequence(passage, summarize=head == 0, predict=head == 1)])
            wanted = stock.model(alone).last_hidden_state[0, -len(slots) :]
            torch.testing.assert_close(state, wanted, atol=1e-5, rtol=0)


def test_one_prompt_is_plain_causal_and_takes_its_targets(make_model, template):
    model = make_model()
    ids = torch.tensor([template.sequence(PASSAGES[0], predict=False)])
    output = model(ids, output_summarize_ids=torch.tensor(SUMMARY[:1]))
    _, heads, _ = reference(model, template, PASSAGES[:1], SUMMARY[:1], [[]])
    torch.testing.assert_close(output.loss, heads[0], atol=1e-5, rtol=0)
    assert output.bow_predict_loss is None
    torch.testing.assert_close(output.logits, plain(model)(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [False, True])
def test_without_prompts_it_is_llama(make_model, training):
    model = make_model().train(training)
    ids = torch.tensor([[0, 0, 1, 30, 31, 32], [1, 40, 41, 42, 43, 44]])
    mask = (ids != 0).long()
    stock = plain(model)
    logits = model(ids, mask, skip_logits=False).logits
    torch.testing.assert_close(logits[mask.bool()], stock(ids, mask).logits[mask.bool()], atol=1e-5, rtol=0)
    labels = ids.masked_fill((mask == 0) | (ids == 1), -100)  # nothing is learned from padding
    torch.testing.assert_close(model(ids, mask, labels=labels).loss, stock(ids, mask, labels=labels).loss)


@pytest.mark.parametrize("prompts", [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generation_is_llamas_when_at_most_one_prompt_is_there(make_model, template, prompts, use_cache):
    model = make_model()
    rows = [template.sequence(p, summarize=prompts[0], predict=prompts[1]) for p in PASSAGES]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = (ids != 0).long()
    settings = {"max_new_tokens": 8, "do_sample": False, "attention_mask": mask, "use_cache": use_cache}
    assert model.generate(ids, **settings).tolist() == plain(model).generate(ids, **settings).tolist()


def test_generation_after_both_prompts_continues_the_prediction_alone(make_model, template):
    model = make_model()
    for passage in PASSAGES:
        joint, alone = template.sequence(passage), template.sequence(passage, summarize=False)
        settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        wanted = plain(model).generate(torch.tensor([alone]), **settings)[0, len(alone) :]
        for use_cache in (True, False):
            found = model.generate(
                torch.tensor([[0, 0, *joint]]),
                attention_mask=torch.tensor([[0, 0] + [1] * len(joint)]),
                use_cache=use_cache,
                **settings,
            )
            assert found[0, len(joint) + 2 :].tolist() == wanted.tolist()


def test_prompts_after_a_cached_passage_are_read_as_with_it(make_model, template):
    model = make_model()
    whole = torch.tensor([template.sequence(PASSAGES[0])])
    passage = len(template.prefix_ids) + len(PASSAGES[0])
    wanted = model.model(whole, use_cache=False).last_hidden_state[:, passage:]
    cache = model.model(whole[:, :passage], use_cache=True).past_key_values
    found = model.model(whole[:, passage:], past_key_values=cache, use_cache=True).last_hidden_state
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_prediction_may_see_the_summary_when_asked(make_model, template):
    ids = torch.tensor([template.sequence(PASSAGES[0])])
    changed = ids.clone()
    changed[0, len(template.prefix_ids) + len(PASSAGES[0])] = 99  # a word of the summary prompt

    def prediction(model, ids):
        return model.model(inputs_embeds=None, input_ids=ids, use_cache=False).last_hidden_state[0, -3:]

    for seen in (False, True):
        settings = LlaraTemplate(**(template.to_dict() | {"prediction_sees_summary": seen}))
        model = make_model(template=settings)
        layout = find_layout(ids, settings)
        assert layout.has_tail is not seen
        summary = slice(len(template.prefix_ids) + len(PASSAGES[0]), -len(template.predict_block_ids))
        embeds = model.model.embed_tokens(ids).detach().requires_grad_()
        hook = model.model.embed_tokens.register_forward_hook(lambda *_, e=embeds: e)
        prediction(model, ids).sum().backward()
        hook.remove()
        assert bool(embeds.grad[0, summary].abs().max() > 0) is seen


def test_learned_weights_follow_their_closed_form(make_model, template):
    learned = LlaraTemplate(**(template.to_dict() | {"bow_weighting": "learned"}))
    fixed, model = make_model(), make_model(template=learned)
    assert set(model.state_dict()) - set(fixed.state_dict()) == {"bow_log_variance"}
    ids, mask, labels = batch(template, PASSAGES)
    inputs = {
        "labels": labels,
        "output_summarize_ids": torch.tensor(SUMMARY),
        "output_predict_ids": torch.tensor(PREDICT),
    }
    plain_output, output = fixed(ids, mask, **inputs), model(ids, mask, **inputs)
    # At the start exp(-s) is the fixed weight and each head adds s = log 10, averaged over the heads.
    torch.testing.assert_close(output.loss, plain_output.loss + torch.tensor(10.0).log())
    output.loss.backward()
    bows = torch.stack([plain_output.bow_summarize_loss, plain_output.bow_predict_loss])
    torch.testing.assert_close(model.bow_log_variance.grad, (1 - bows) / 2)


def test_no_mask_of_the_whole_length_is_made_in_training(make_model, template, monkeypatch):
    model = make_model().train()
    ids, mask, labels = batch(template, [list(range(20, 90))] * 3)
    squares = []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.ndim >= 2 and min(t.shape[-2:]) >= 70 and 120 not in t.shape:
                    squares.append((func, t.shape))
            return out

    with Watch():
        model(ids, mask, labels=labels, output_summarize_ids=torch.tensor([[60]] * 3)).loss.backward()
    assert squares == []


def test_logits_of_the_whole_length_are_never_held_in_training(make_model, template, monkeypatch):
    from llamory.llara import losses

    monkeypatch.setattr(losses, "_CHUNK_BYTES", 0)
    monkeypatch.setattr(losses, "_MIN_CHUNK_ROWS", 16)
    model = make_model().train()
    ids, mask, labels = batch(template, [list(range(20, 90))] * 3)
    biggest = []
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, torch.Tensor) and t.ndim >= 1 and t.shape[-1] == 120 and t.shape[0] != 24:
                    biggest.append(t.numel() // 120)
            return out

    with Watch():
        model(ids, mask, labels=labels).loss.backward()
    assert max(biggest) <= 16


def test_padded_kernels_agree_with_runs(make_model, template, monkeypatch):
    model = make_model()
    ids, mask, _ = batch(template, PASSAGES, packed=True)
    wanted = model.model(ids, mask, use_cache=False).last_hidden_state
    monkeypatch.setattr("llamory.llara.attention._sdpa_runs", _sdpa_padded)
    torch.testing.assert_close(model.model(ids, mask, use_cache=False).last_hidden_state, wanted, atol=1e-5, rtol=0)


def test_flash_kernels_get_two_variable_length_calls(make_model, template, monkeypatch):
    """A stand-in with flash attention's contract: packed sequences, causal mask aligned to their ends."""

    def flash(module, query, key, value, mask, *, scaling, is_causal, cu_seq_lens_q, cu_seq_lens_k, **_):
        assert mask is None
        assert is_causal
        outputs = []
        for i in range(len(cu_seq_lens_q) - 1):
            q = query[:, :, cu_seq_lens_q[i] : cu_seq_lens_q[i + 1]]
            k, v = (x[:, :, cu_seq_lens_k[i] : cu_seq_lens_k[i + 1]].repeat_interleave(2, 1) for x in (key, value))
            ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(k.shape[2] - q.shape[2] + 1)
            scores = (q @ k.transpose(2, 3) * scaling).masked_fill(ahead, -torch.inf)
            outputs.append(scores.softmax(-1) @ v)
        calls.append(len(outputs))
        return torch.cat(outputs, dim=2).transpose(1, 2), None

    calls = []
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", flash)
    for packed in (False, True):
        model = make_model()
        ids, mask, labels = batch(template, PASSAGES, packed=packed)
        ids = torch.cat([ids, ids[:1]])  # a row without prompts among the others
        ids[-1] = torch.where(ids[-1] > 1, 33, ids[-1])
        mask, labels = torch.cat([mask, mask[:1]]), torch.cat([labels, labels[:1]])
        wanted = model(ids, mask, labels=labels, skip_logits=False).logits
        model.config._attn_implementation = "flash_attention_2"
        calls.clear()
        found = model(ids, mask, labels=labels, skip_logits=False).logits
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
        assert calls == [5, 4] * 2


def test_flex_attention_follows_the_same_rule(make_model, template):
    from torch.nn.attention.flex_attention import flex_attention

    model = make_model()
    ids, mask, _ = batch(template, PASSAGES, packed=True)
    layout = find_layout(ids, template, mask)
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, len(layout.index), 8), *torch.randn(2, 1, 2, len(layout.index), 8)
    wanted = flat_attention(model.model.layers[0].self_attn, q, k, v, layout)
    scale = model.model.layers[0].self_attn.scaling
    found = flex_attention(q, k, v, block_mask=block_mask(layout), scale=scale, enable_gqa=True)
    torch.testing.assert_close(found.transpose(1, 2), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_and_accumulation_change_nothing(make_model, template, checkpointing):
    ids, mask, labels = batch(template, PASSAGES)
    summary, predict = torch.tensor(SUMMARY), torch.tensor(PREDICT)
    whole = make_model().train()
    whole(ids, mask, labels=labels, output_summarize_ids=summary, output_predict_ids=predict).loss.backward()
    parts = make_model().train()
    if checkpointing:
        parts.gradient_checkpointing_enable()
    counts = torch.tensor([(labels != -100).sum(), 3, 3])
    for part in (slice(0, 1), slice(1, 4)):
        parts(
            ids[part],
            mask[part],
            labels=labels[part],
            output_summarize_ids=summary[part],
            output_predict_ids=predict[part],
            num_items_in_batch=counts,
        ).loss.backward()
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-5, rtol=1e-4)


def test_no_mask_no_labels_and_no_template_are_said_plainly(make_model, template):
    model = make_model()
    ids, _, labels = batch(template, PASSAGES[1:2])
    assert torch.isfinite(model(ids, labels=labels).loss)
    with pytest.raises(LlamoryError, match="nothing to learn"):
        model(ids, labels=torch.full_like(labels, -100), output_summarize_ids=torch.tensor([[0, 1]]))
    with pytest.raises(LlamoryError, match="rows of summary targets"):
        model(ids, output_summarize_ids=torch.tensor(SUMMARY))
    with pytest.raises(LlamoryError, match="no LLARA template"):
        make_model(template=None)(ids, output_summarize_ids=torch.tensor([[30]]))


def test_saved_weights_load_in_stock_classes_and_back(make_model, template, tmp_path):
    model = make_model()
    PreModel(model).save(tmp_path)
    ids, mask, _ = batch(template, PASSAGES)
    assert (tmp_path / "model.safetensors").exists()
    stock = LlamaForCausalLM.from_pretrained(tmp_path)
    again, inner = PreLlamaModel.from_pretrained(tmp_path), NewLlamaModel.from_pretrained(tmp_path)
    assert again.template == template == inner.template
    wanted = model(ids, mask).logits
    torch.testing.assert_close(again(ids, mask).logits, wanted)
    torch.testing.assert_close(inner(ids, mask).last_hidden_state, model.model(ids, mask).last_hidden_state)
    plain_ids = torch.tensor([[1, 40, 41, 42]])
    torch.testing.assert_close(stock(plain_ids).logits, model(plain_ids).logits)


def test_bf16_autocast_stays_near_float32(make_model, template):
    ids, mask, labels = batch(template, PASSAGES)
    inputs = {
        "labels": labels,
        "output_summarize_ids": torch.tensor(SUMMARY),
        "output_predict_ids": torch.tensor(PREDICT),
    }
    model = make_model(initializer_range=0.1).train()
    wanted = model(ids, mask, **inputs).loss
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, mask, **inputs).loss
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=0.03, rtol=0)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_published_signatures_are_kept():
    import inspect

    published = (
        "self input_ids attention_mask position_ids past_key_values inputs_embeds labels output_summarize_ids "
        "output_predict_ids use_cache output_attentions output_hidden_states return_dict cache_position"
    ).split()
    assert [*inspect.signature(PreLlamaModel.forward).parameters][: len(published)] == published
    inner = [name for name in published if name not in ("labels", "output_summarize_ids", "output_predict_ids")]
    assert [*inspect.signature(NewLlamaModel.forward).parameters][: len(inner)] == inner


def test_attention_maps_and_hidden_states_are_given(make_model, template):
    ids, mask, labels = batch(template, PASSAGES)
    output = make_model(implementation="eager")(
        ids, mask, labels=labels, output_attentions=True, output_hidden_states=True
    )
    assert output.attentions[0].shape == (4, 4, ids.shape[1], ids.shape[1])
    flat = make_model()(ids, mask, use_cache=False, output_hidden_states=True)
    assert len(output.hidden_states) == len(flat.hidden_states) == 3
    for a, b in zip(output.hidden_states, flat.hidden_states, strict=True):
        torch.testing.assert_close(a[mask.bool()], b[mask.bool()], atol=1e-5, rtol=1e-5)
    assert isinstance(make_model()(ids, mask, return_dict=False), tuple)


def test_loss_matches_a_plain_cross_entropy_in_float64(make_model, template):
    model = make_model().double()
    ids, mask, labels = batch(template, PASSAGES, "right")
    output = model(ids, mask, labels=labels, skip_logits=False)
    wanted = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(wanted.item(), abs=1e-5)

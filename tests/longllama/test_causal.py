"""Generation with long prompts and attached memory, reading documents, and fingerprints."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    TextIteratorStreamer,
    pipeline,
)

from llamory.errors import LlamoryError
from llamory.longllama import LongLlamaForCausalLM
from llamory.longllama.causal import encode_windows
from plain_longllama import logits, sight

CONTEXT, LAST = 16, 8


LONG = {"do_sample": False, "max_new_tokens": 30, "min_new_tokens": 30}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def greedy(model, prompt, count):
    """Greedy continuation by the plain reference, one token after the other."""
    row = prompt
    for _ in range(count):
        seen = sight(len(prompt), len(row) - len(prompt), CONTEXT, LAST)
        scores = logits(model, row, seen, model.config.mem_layers)[-1]
        scores[model.config.eos_token_id] = -torch.inf
        row = torch.cat([row, scores.argmax()[None]])
    return row


def test_greedy_past_the_context(make_model, ids):
    model, prompt = make_model(), ids(45)
    assert model.generate(prompt[None], **LONG)[0].tolist() == greedy(model, prompt, 30).tolist()


def test_rows_of_a_padded_batch_are_generated_as_alone(make_model, ids):
    model = make_model()
    prompts = [ids(length, seed=length) for length in (45, 3, 20)]
    batch, mask = torch.zeros(3, 45, dtype=torch.long), torch.zeros(3, 45, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        batch[row, 45 - len(prompt) :] = prompt
        mask[row, 45 - len(prompt) :] = 1
    found = model.generate(batch, attention_mask=mask, **LONG)[:, 45:]
    for row, prompt in enumerate(prompts):
        assert found[row].tolist() == model.generate(prompt[None], **LONG)[0, len(prompt) :].tolist()


def test_beams_find_what_a_search_without_cache_finds(make_model, ids):
    model, prompt = make_model(), ids(2, 30)
    settings = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 7, "do_sample": False}
    found = model.generate(prompt, **settings, return_dict_in_generate=True, output_scores=True)
    for row in range(2):
        beams = [(prompt[row], 0.0)]
        for _ in range(7):
            grown = []
            for beam, score in beams:
                seen = sight(30, len(beam) - 30, CONTEXT, LAST)
                step = logits(model, beam, seen, model.config.mem_layers)[-1].log_softmax(-1)
                grown += [
                    (torch.cat([beam, torch.tensor([token])]), score + value.item()) for token, value in enumerate(step)
                ]
            beams = sorted(grown, key=lambda item: -item[1])[:3]
        if any(2 in beam[30:] for beam, _ in beams):
            pytest.skip("a beam ended early, which the short search above doesn't know")
        for rank in range(2):
            assert found.sequences[2 * row + rank].tolist() == beams[rank][0].tolist()


def test_sampling_is_the_same_for_the_same_seed(make_model, ids):
    model, prompt = make_model(), ids(1, 40)
    settings = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "max_new_tokens": 25, "num_return_sequences": 3}
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(model.generate(prompt, **settings))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert len({tuple(row.tolist()) for row in runs[0]}) > 1


def test_prompt_logits_are_never_computed(make_model, ids):
    model = make_model()
    shapes = []
    model.lm_head.register_forward_hook(lambda module, given, output: shapes.append(tuple(output.shape)))
    model.generate(ids(2, 60), max_new_tokens=3, do_sample=False)
    assert set(shapes) == {(2, 1, 97)}


def test_many_questions_of_one_memory(make_model, ids):
    model = make_model()
    document, questions = ids(50), ids(3, 12, seed=4)
    memory = model.read(document)
    reads = []
    model.model.embed_tokens.register_forward_hook(lambda module, given, output: reads.append(given[0].shape[1]))
    before = {layer: memory.keys(layer).clone() for layer in memory.layers}
    alone = [model.generate(row[None], past_key_values=model.memory_cache(memory), **LONG)[0] for row in questions]
    assert max(reads) <= 12
    together = model.generate(questions, past_key_values=model.memory_cache(memory), **LONG)
    for row in range(3):
        assert together[row].tolist() == alone[row].tolist()
    assert len({tuple(row[12:].tolist()) for row in alone}) > 1
    for layer, keys in before.items():
        assert torch.equal(memory.keys(layer), keys)


def test_a_mounted_memory_is_seen_as_if_read_in_the_prompt(make_model, ids):
    model = make_model()
    document, question = ids(2 * CONTEXT), ids(LAST, seed=3)
    output = model(question[None], past_key_values=model.memory_cache(model.read(document)))
    wanted = model(torch.cat([document, question])[None]).logits[:, -LAST:]
    torch.testing.assert_close(output.logits, wanted, atol=2e-5, rtol=1e-5)


def test_order_of_documents_doesnt_matter(make_model, ids):
    model = make_model()
    documents = {name: ids(length, seed=length) for name, length in {"a": 40, "b": 7, "c": 23}.items()}
    outputs = []
    for order in ("abc", "cab", "bca"):
        memory = model.new_memory()
        for name in order:
            model.read(documents[name], memory, segment=name)
        outputs.append(model(ids(1, 9, seed=8), past_key_values=model.memory_cache(memory)).logits)
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=1e-5, rtol=1e-5)


def test_reading_on_is_reading_at_once(make_model, ids):
    model, document = make_model(), ids(60)
    progress = []
    once = model.read(document, segment="d", on_window=progress.append)
    assert progress == [16, 32, 48, 60]
    twice = model.read(document[: 2 * CONTEXT], segment="d")
    model.read(document[2 * CONTEXT :], twice, segment="d")
    for layer in once.layers:
        torch.testing.assert_close(once.keys(layer), twice.keys(layer), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(once.values(layer), twice.values(layer), atol=1e-5, rtol=1e-4)


def test_windows_of_a_batch_are_those_of_each_document(make_model, ids):
    model = make_model(max_position_embeddings=16, mem_dtype="float32").train()
    documents = [ids(40), ids(16, seed=1), ids(5, seed=2)]
    banks = [model.new_memory() for _ in documents]
    assert list(encode_windows(model, documents, banks)) == [16, 32, 40]
    assert model.training
    for document, bank in zip(documents, banks, strict=True):
        alone = model.read(document)
        for layer in alone.layers:
            difference = (bank.keys(layer) - alone.keys(layer)).abs().max()
            assert difference <= 1e-5 * alone.keys(layer).abs().max()


def test_windows_can_be_stopped_and_continued(make_model, ids):
    model, document = make_model(max_position_embeddings=16), ids(40)
    bank = model.new_memory()
    assert next(encode_windows(model, [document], [bank])) == 16
    assert list(encode_windows(model, [document], [bank], start=16)) == [32, 40]
    once = model.read(document)
    assert all(torch.equal(bank.keys(layer), once.keys(layer)) for layer in once.layers)


def test_an_interrupted_reading_leaves_the_memory_as_it_was(make_model, ids):
    model = make_model()
    memory = model.read(ids(20), segment="first")

    def stop(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.read(ids(60), memory, segment="second", on_window=stop)
    assert memory.segments == ("first",)
    assert memory.length() == 20


def test_memory_of_another_model_is_refused(make_model, ids):
    model = make_model()
    memory = model.read(ids(20))
    other = make_model()
    model.memory_cache(memory)
    other.memory_cache(memory)
    other.model.layers[0].self_attn.k_proj.weight[0, 0] += 1
    with pytest.raises(LlamoryError, match="another model"):
        other.memory_cache(memory)
    with pytest.raises(LlamoryError, match="layers"):
        make_model(mem_layers=[0]).memory_cache(memory)
    with pytest.raises(LlamoryError, match="no memory layers"):
        make_model(mem_layers=[]).memory_cache(memory)


def test_chat_goes_on_with_the_same_cache(make_model, ids):
    model = make_model()
    cache = model.memory_cache(model.read(ids(40)))
    first = model.generate(
        ids(1, 6, seed=1), past_key_values=cache, do_sample=False, max_new_tokens=5, min_new_tokens=5
    )
    turn = torch.cat([first, ids(1, 7, seed=2)], 1)
    second = model.generate(turn, past_key_values=cache, do_sample=False, max_new_tokens=5, min_new_tokens=5)
    assert second.shape[1] == 23
    fresh = model.memory_cache(model.read(ids(40)))
    # The same turns, token by token.
    for token in second[0, :-1]:
        scores = model(token[None, None], past_key_values=fresh).logits[0, -1]
    scores[2] = -torch.inf
    assert scores.argmax() == second[0, -1]


def test_assisted_decoding_within_a_window(make_model, ids):
    # Candidates are read with the prompt, so this holds where both fit into one window.
    model, prompt = make_model(), ids(1, 2)
    assistant = LlamaForCausalLM(LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                             num_attention_heads=2, pad_token_id=0)).eval()  # fmt: skip
    settings = {"do_sample": False, "max_new_tokens": 6}
    wanted = model.generate(prompt, **settings)
    assert model.generate(prompt, assistant_model=assistant, **settings).tolist() == wanted.tolist()


def test_compiled_decoding(make_model, ids):
    model, prompt = make_model(), ids(1, 40)
    wanted = model.generate(prompt, **LONG)
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="eager", dynamic=True)
    assert compiled.generate(prompt, **LONG).tolist() == wanted.tolist()


def test_static_cache_setting_is_no_error(make_model, ids):
    model, prompt = make_model(), ids(1, 40)
    wanted = model.generate(prompt, **LONG)
    assert model.generate(prompt, cache_implementation="static", **LONG).tolist() == wanted.tolist()


def test_without_cache(make_model, ids):
    model, prompt = make_model(), ids(1, 5)
    settings = {"do_sample": False, "max_new_tokens": 3}
    assert model.generate(prompt, use_cache=False, **settings).tolist() == model.generate(prompt, **settings).tolist()
    memory = model.read(ids(40))
    found = [
        model.generate(prompt, past_key_values=model.memory_cache(memory), use_cache=use, **settings).tolist()
        for use in (True, False)
    ]
    assert found[0] == found[1]


def test_adapters_change_the_memory_and_its_fingerprint(make_model, ids):
    from peft import LoraConfig, get_peft_model

    model = make_model()
    plain = model.memory_fingerprint()
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    ).eval()
    prompt = ids(1, 45)
    assert model.memory_fingerprint() != plain
    found = adapted.generate(input_ids=prompt, **LONG)
    merged = adapted.merge_and_unload()
    assert found.tolist() == merged.generate(prompt, **LONG).tolist()


def test_device_map(make_model, ids, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    placed = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    offloaded = LongLlamaForCausalLM.from_pretrained(
        tmp_path,
        device_map={"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
                    "model.layers.2": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"},
        offload_folder=tmp_path / "offload",
    )  # fmt: skip
    prompt = ids(1, 40)
    wanted = model.generate(prompt, **LONG).tolist()
    assert placed.generate(prompt, **LONG).tolist() == wanted
    assert offloaded.generate(prompt, **LONG).tolist() == wanted


def test_pipeline_streaming_and_stop_strings(model_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = LongLlamaForCausalLM.from_pretrained(model_folder, mem_layers=[0], max_position_embeddings=32)
    text = "the quick brown fox jumps over the lazy dog " * 20
    ids = tokenizer(text, return_tensors="pt").input_ids
    wanted = model.generate(ids, do_sample=False, max_new_tokens=12)[0, ids.shape[1] :]
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    found = generator(text, do_sample=False, max_new_tokens=12, return_full_text=False)[0]["generated_text"]
    assert found == tokenizer.decode(wanted, skip_special_tokens=True)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(ids, do_sample=False, max_new_tokens=12, streamer=streamer)
    assert "".join(streamer) == found
    stop = tokenizer.decode(wanted[:3])
    stopped = model.generate(ids, do_sample=False, max_new_tokens=12, stop_strings=[stop], tokenizer=tokenizer)
    ended = stopped[0, ids.shape[1] :].tolist()
    assert 0 < len(ended) < 12
    assert ended == wanted[: len(ended)].tolist()


def test_memory_is_freed_with_its_cache(make_model, ids):
    model = make_model()
    output = model.generate(ids(1, 60), return_dict_in_generate=True, **LONG)
    held = weakref.ref(output.past_key_values.memory[0])
    gc.disable()
    try:
        assert held() is not None
        del output
        assert held() is None
    finally:
        gc.enable()


def test_short_documents_share_room(make_model, ids):
    model = make_model()
    memory = model.new_memory()
    for number in range(5):
        model.read(ids(10, seed=number), memory, segment=str(number))
    for layer in memory.layers:
        (span,) = memory.spans(layer)
        assert len(span) == 50
        assert [memory.length(layer, name) for name in memory.segments] == [10] * 5


def test_an_interrupted_document_leaves_the_memory_as_it_was_and_no_trace_in_the_next(make_model, ids):
    model = make_model()
    memory, apart = model.read(ids(20), segment="a"), model.read(ids(24, seed=2), segment="b")

    def interrupt(read: int) -> None:
        if read > CONTEXT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.read(ids(40, seed=1), memory, segment="b", on_window=interrupt)
    assert memory.segments == ("a",)
    model.read(ids(24, seed=2), memory, segment="b")
    for layer in memory.layers:
        assert torch.equal(memory.keys(layer, "b"), apart.keys(layer, "b"))
        assert memory.length(layer) == 44


def test_fingerprint_is_of_the_weights_not_of_their_type(make_model):
    model, same = make_model(), make_model()
    assert model.memory_fingerprint() == same.memory_fingerprint()
    with torch.no_grad():
        same.lm_head.weight[5, 5] += 0.5
    assert model.memory_fingerprint() != same.memory_fingerprint()
    assert make_model().to(torch.bfloat16).memory_fingerprint() == model.memory_fingerprint()
    assert make_model(mem_layers=[1]).memory_fingerprint() != model.memory_fingerprint()

"""Instruction and chat data: what is learned, how examples are cut into memory and last rows, what flows between."""

from __future__ import annotations

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llamory.errors import LlamoryError
from llamory.longllama.instruct import InstructFormat, Lengths, _Recipe, load_instructions
from llamory.longllama.instruct_rows import CutExample, InstructBatches, MemorySplit, collate
from llamory.longllama.losses import IGNORED
from tiny_models import CONTEXT, LAST, make_long_llama

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}{% else %}{{ message.content }}<|im_end|>"
    "{% endif %}{{ '\\n' }}{% endfor %}"
)
FORGETFUL = (
    "{% for message in messages %}{% if loop.last or message.role == 'user' %}{{ message.content }}{% endif %}"
    "{% endfor %}"
)
STRICT = "{% if messages[0].role != 'system' %}{{ raise_exception('no system message') }}{% endif %}"
TURNS = [("user", "Hello?"), ("assistant", "Hello."), ("user", "And now?"), ("assistant", "Bye, 11 times.")]


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    made = AutoTokenizer.from_pretrained(model_folder)
    made.add_special_tokens({"bos_token": "<|begin|>", "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = CHATML
    return made


@pytest.fixture
def load(tokenizer, tmp_path):
    def make(*objects, format=None, tokenizer=tokenizer, **options):
        lengths = Lengths(**{key: options.pop(key) for key in ("input", "output", "total") if key in options})
        file = tmp_path / "data.jsonl"
        file.write_text("".join(json.dumps(each) + "\n" for each in objects))
        return load_instructions(file, tokenizer, format, lengths, cache_dir=tmp_path / "cache", **options)

    return make


def messages(turns=TURNS):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def whole(tokenizer, example):
    return tokenizer.decode(example["input_ids"])


def answers(tokenizer, example):
    """The text of the tokens that are learned; labels must be the tokens themselves."""
    learned = [label for label in example["labels"] if label != IGNORED]
    assert learned == [
        token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORED
    ]
    return tokenizer.decode(learned)


# ---- examples --------------------------------------------------------------------------------------------------------


def test_an_instruction_has_the_published_fields_and_learns_its_response(load, tokenizer):
    entry = {"system_prompt": "Be brief.", "question": "A river?", "response": "A stone."}
    example = load(entry, format=InstructFormat(prompt_field="system_prompt"))[0]
    assert whole(tokenizer, example) == "<|begin|>Be brief.\nA river?\nA stone.<|end|>"
    assert answers(tokenizer, example) == "A stone.<|end|>"
    assert example["source"].endswith("data.jsonl:1")


def test_fixed_texts_stand_around_the_fields(load, tokenizer):
    texts = {f"{side}_{part}_text": f"<{side} {part}>" for side in ("pre", "post") for part in ("prompt", "question")}
    format = InstructFormat("p", "q", "r", **texts, pre_response_text="(", post_response_text=")")
    example = load({"p": "1", "q": "2", "r": "3"}, format=format)[0]
    assert whole(tokenizer, example) == ("<|begin|><pre prompt>1<post prompt><pre question>2<post question>(3)<|end|>")
    assert answers(tokenizer, example) == "(3)<|end|>"


@pytest.mark.parametrize(
    ("lengths", "kept", "learned"),
    [
        ({}, "<|begin|>?????\n!!!!!<|end|>", "!!!!!<|end|>"),
        ({"input": 4}, "<|begin|>???!!!!!<|end|>", "!!!!!<|end|>"),
        ({"output": 2}, "<|begin|>?????\n!!", "!!"),
        ({"total": 9}, "<|begin|>?????\n!!", "!!"),
        ({"input": 3, "output": 4, "total": 6}, "<|begin|>??!!!", "!!!"),
    ],
)
def test_what_is_too_long_is_cut_at_its_end(load, tokenizer, lengths, kept, learned):
    example = load({"question": "?????", "response": "!!!!!"}, **lengths)[0]
    assert whole(tokenizer, example) == kept
    assert answers(tokenizer, example) == learned


def test_a_published_chat_learns_the_models_turns(load, tokenizer):
    said = [("human", "Hello?"), ("gpt", "Hello."), ("human", "And?"), ("gpt", "Bye.")]
    example = load({"conversations": [{"from": who, "value": text} for who, text in said]})[0]
    assert whole(tokenizer, example) == (
        "<|begin|>You are a helpful ASSISTANT.\n\n\nUSER: Hello?\nASSISTANT: Hello.<|end|>"
        "\nUSER: And?\nASSISTANT: Bye.<|end|>"
    )
    assert answers(tokenizer, example) == "Hello.<|end|>Bye.<|end|>"


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
def test_messages_learn_the_assistants_turns(load, tokenizer, template):
    tokenizer.chat_template = template
    example = load(messages())[0]
    tokenizer.chat_template = CHATML
    turns = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in TURNS)
    assert whole(tokenizer, example) == turns
    assert answers(tokenizer, example) == "Hello.<|im_end|>Bye, 11 times.<|im_end|>"


def words():
    return st.text("ab Z1.\nß🙂", min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
@settings(deadline=None, max_examples=40)
@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words()), min_size=1, max_size=5))
def test_any_answers_can_be_read_back(tokenizer, template, turns):
    turns = [("user", "?"), *turns, ("assistant", "!")]
    tokenizer.chat_template = template
    recipe = _Recipe(tokenizer, InstructFormat(), Lengths(), skip_broken=False)
    kind, pieces = recipe.format.read(messages(turns), tokenizer)
    tokenizer.chat_template = CHATML
    texts, flags = zip(*pieces, strict=True)
    found = recipe.examples({"kind": [kind], "texts": [texts], "answers": [flags], "source": [""]})
    learned = [label for label in found["labels"][0] if label != IGNORED]
    assert tokenizer.decode(learned, clean_up_tokenization_spaces=False) == "".join(
        f"{content}<|im_end|>" for role, content in turns if role == "assistant"
    )


def test_a_token_that_begins_before_an_answer_is_not_learned(load, tokenizer):
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ message.content }}{% else %}"
        "{{ ': ' + message.content + eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}: {% endif %}"
    )
    example = load(messages([("user", "river"), ("assistant", "stone bridge")]))[0]
    tokenizer.chat_template = CHATML
    assert " stone" in [tokenizer.decode(token) for token in example["input_ids"]]
    assert answers(tokenizer, example) == " bridge<|end|>"


def test_a_template_without_end_marks_and_words_with_their_space(load):
    """As Llama 2 has it: the space before a word is part of its token."""
    words = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    words.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], vocab_size=99)
    words.train_from_iterator(["[INST] Hello? And now? [/INST] Hello. Bye."] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = (
        "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token + '[INST] ' + message.content + "
        "' [/INST]' }}{% else %}{{ ' ' + message.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    example = load(messages([*TURNS[:3], ("assistant", "Bye.")]), tokenizer=fast)[0]
    learned = [label for label in example["labels"] if label != IGNORED]
    assert "".join(fast.convert_ids_to_tokens(learned)) == "▁Hello.▁</s>▁Bye.▁</s>"
    assert example["input_ids"].count(fast.bos_token_id) == 2


def test_examples_without_an_answer_left_are_passed_over(load, tokenizer):
    short, long = ({"question": "?" * n, "response": "!"} for n in (3, 30))
    examples = load(short, long, short, total=10)
    assert [example["source"].rsplit(":", 1)[1] for example in examples] == ["1", "3"]
    with pytest.raises(LlamoryError, match=r"No example of .* has an answer within its first 10 tokens"):
        load(long, long, total=10)


@pytest.mark.parametrize(
    ("entry", "template", "sentence"),
    [
        ({"text": "?"}, CHATML, "has neither 'messages' nor 'conversations' nor 'question'"),
        ({"question": "?"}, CHATML, "no 'response'"),
        ({"question": "?", "response": 3}, CHATML, "'response' should be a string"),
        ({"conversations": "?"}, CHATML, "'conversations' should be a list of objects"),
        ({"conversations": [{"value": "?"}]}, CHATML, "no 'from'"),
        ({"messages": []}, CHATML, "'messages' should be a list of objects"),
        ({"messages": [{"role": "user"}]}, CHATML, "no 'content'"),
        (messages(TURNS[1:]), CHATML, "begin with the assistant's"),
        (messages(), STRICT, "refuses these messages .no system message"),
        (messages(), FORGETFUL, "put {% generation %}"),
        (messages(), None, "has no chat template; choose a model with one"),
    ],
)
def test_what_cannot_be_read_is_told_with_its_line(load, tokenizer, entry, template, sentence):
    good = {"question": "?", "response": "!"}
    tokenizer.chat_template = template
    try:
        with pytest.raises(LlamoryError, match=rf"data\.jsonl:2.*{sentence}"):
            load(good, entry)
        if template is not None:
            assert len(load(good, entry, skip_broken=True)) == 1
    finally:
        tokenizer.chat_template = CHATML


def test_files_and_tokenizers_that_do_not_do(load, tokenizer, documents, model_folder):
    with pytest.raises(LlamoryError, match=r"holds no \.jsonl file"):
        load_instructions(documents, tokenizer)
    endless = AutoTokenizer.from_pretrained(model_folder, eos_token=None)
    with pytest.raises(LlamoryError, match="no end-of-sequence token"):
        load({"question": "?", "response": "!"}, tokenizer=endless)
    with pytest.raises(LlamoryError, match="output_length must be at least 1"):
        Lengths(output=0)


# ---- rows ------------------------------------------------------------------------------------------------------------


def splits():
    def make(row, last, total, how):
        return MemorySplit(row, min(row, last), total, how)

    return st.builds(
        make, st.integers(1, 9), st.integers(1, 9), st.integers(2, 40), st.sampled_from(["random", "memory", "last"])
    )


@settings(deadline=None)
@given(split=splits(), data=st.data(), seed=st.integers(0, 99))
def test_rows_are_the_published_padding_without_the_padding(split, data, seed):
    length = data.draw(st.integers(1, split.total_length))
    rows = split.cut(length, random.Random(seed))
    # The published way: columns of padding and tokens, the last of which are local.
    columns = split.total_length if split.how != "last" else length
    left = random.Random(seed).randint(0, columns - length) if split.how == "random" else 0
    padded = [None] * left + list(range(length)) + [None] * (columns - length - left)
    memory = [token for token in padded[: max(0, columns - split.last_context_length)] if token is not None]
    local = [token for token in padded[max(0, columns - split.last_context_length) :] if token is not None]
    windows = [memory[start : start + split.row_length] for start in range(0, len(memory), split.row_length)]
    assert [list(range(*row)) for row in rows] == windows + [local] * bool(local)
    assert len(rows) <= split.most_rows
    assert all(stop - start <= split.row_length for start, stop in rows)


def test_every_split_is_drawn():
    split, chance = MemorySplit(16, 4, 8), random.Random(0)
    assert {split.in_memory(5, chance) for _ in range(99)} == {1, 2, 3, 4}
    assert {split.in_memory(8, chance) for _ in range(9)} == {4}


def test_a_batch_by_hand():
    first = CutExample([5, 6, 7, 8, 9], [-100, -100, 7, 8, 9], [(0, 2), (2, 4), (4, 5)])
    second = CutExample([3, 4], [-100, 4], [(0, 2)])
    batch = collate([first, second], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 8], [9, 0], [3, 4]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 1], [1, 0], [1, 1]]
    assert batch["shift_labels"].tolist() == [[-100, 7], [8, 9], [-100, -100], [4, -100]]
    assert batch["contexts"] == [[], [0], [1, 0], []]


def numbered(count, longest=7, kind=0):
    """Examples whose first token tells which they are."""
    sizes = random.Random(kind)
    return [
        {"input_ids": ids, "labels": [IGNORED, *ids[1:]], "source": f"{kind}:{number}"}
        for number in range(count)
        for ids in [[number, *range(50, 50 + sizes.randint(1, longest - 1))]]
    ]


def batches(data, proportions=(1.0,), rows=6, **options):
    return InstructBatches(data, proportions, MemorySplit(3, 2, 7), rows=rows, **options)


def test_batches_hold_as_many_whole_examples_as_fit():
    data = numbered(20)
    made = batches([data])
    for _ in range(12):
        batch = next(made)
        assert len(batch["input_ids"]) <= 6
        assert len(batch["sources"]) == batch["contexts"].count([])
        following = made._next_example()[1]
        assert len(batch["input_ids"]) + len(following.rows) > 6
        for source in batch["sources"]:
            example = data[int(source.split(":")[1])]
            first = [row for row, ids in enumerate(batch["input_ids"].tolist()) if ids[0] == example["input_ids"][0]]
            end = next((row for row in range(first[0] + 1, len(batch["contexts"])) if not batch["contexts"][row]), None)
            real = batch["attention_mask"][first[0] : end].bool()
            assert batch["input_ids"][first[0] : end][real].tolist() == example["input_ids"]


def test_an_epoch_has_every_example_once_and_another_order_next():
    made = [batches([numbered(24)], stream=stream, streams=2, seed=3) for stream in range(2)]
    orders = [[], []]
    for epoch in range(2):
        for stream in made:
            while stream._drawn[0] < 12 * (epoch + 1):
                orders[epoch].append(stream._next_example()[1].source)
                stream._drawn[0] += 1
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(example["source"] for example in numbered(24))
    assert orders[0] != orders[1]


def test_examples_come_in_their_proportions():
    made = batches([numbered(5, kind=1), numbered(50, kind=2)], (0.8, 0.2))
    drawn = [source for _ in range(400) for source in next(made)["sources"]]
    share = sum(source.startswith("1:") for source in drawn) / len(drawn)
    assert abs(share - 0.8) < 4 * (0.16 / len(drawn)) ** 0.5
    assert made.state_dict()["drawn"] == [round(share * len(drawn)), round((1 - share) * len(drawn))]


@settings(deadline=None, max_examples=30)
@given(before=st.integers(0, 20), seed=st.integers(0, 5), stream=st.integers(0, 1))
def test_a_resumed_run_sees_the_same_batches(before, seed, stream):
    def make():
        data = [numbered(5, kind=1), numbered(11, kind=2)]
        return batches(data, (0.3, 0.7), seed=seed, stream=stream, streams=2)

    running, resumed = make(), make()
    for _ in range(before):
        next(running)
    resumed.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for _ in range(3):
        one, two = next(running), next(resumed)
        assert one.keys() == two.keys()
        assert all(torch.equal(one[key], two[key]) for key in ("input_ids", "attention_mask", "shift_labels"))
        assert (one["contexts"], one["sources"]) == (two["contexts"], two["sources"])


def test_rows_and_positions_that_do_not_fit_are_refused():
    with pytest.raises(LlamoryError, match="may take 3 rows, but a batch has 2"):
        batches([numbered(3)], rows=2)
    with pytest.raises(LlamoryError, match="can't have 5 tokens where a row has 4"):
        MemorySplit(4, 5, 9)
    with pytest.raises(LlamoryError, match="seed"):
        batches([numbered(3)], seed=1).load_state_dict(batches([numbered(3)], seed=2).state_dict())


# ---- what the model learns from them ---------------------------------------------------------------------------------


def cut(length, how="random", seed=0, answer=5):
    split = MemorySplit(CONTEXT, LAST, 60, how)
    ids = random.Random(seed).choices(range(3, 97), k=length)
    labels = [IGNORED] * (length - answer) + ids[length - answer :]
    return CutExample(ids, labels, split.cut(length, random.Random(seed)))


def loss_of(model, batch):
    return model(**{key: value for key, value in batch.items() if key != "sources"}).loss


@pytest.mark.parametrize("answer", [5, 30])
@pytest.mark.parametrize("length", [60, 41, 31])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_loss_is_that_of_windows_read_one_by_one(length, seed, answer):
    model, example = make_long_llama(), cut(length, seed=seed, answer=answer)
    loss = loss_of(model, collate([example], 0))
    ids = torch.tensor([example.input_ids])
    start, stop = example.rows[-1]
    with torch.no_grad():
        logits = model(ids, last_context_length=stop - start, use_cache=False).logits[0]
    wanted = torch.nn.functional.cross_entropy(logits[-answer - 1 : -1], ids[0, -answer:])
    torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=0)


def test_memory_is_trained_through_and_other_examples_are_not_seen():
    model, kept = make_long_llama(), {}
    for index, layer in enumerate(model.model.layers):

        def keep(module, inputs, output, index=index):
            output.retain_grad()
            kept[index] = output

        layer.self_attn.k_proj.register_forward_hook(keep)
    example, other = cut(60, "last"), cut(41, "last", seed=1)
    batch = collate([other, example, other], 0)
    own = slice(len(other.rows), len(other.rows) + len(example.rows))
    last = own.stop - 1
    targets = torch.full_like(batch["shift_labels"], IGNORED)
    targets[last] = batch["shift_labels"][last]
    loss_of(model, batch | {"shift_labels": targets}).backward()
    # At the last layer nothing but memory leads from an earlier row's keys to the last row's loss.
    deepest = kept[2].grad.flatten(1).norm(dim=1)
    assert (deepest[own] > 0).all()
    for layer in kept.values():
        assert (layer.grad[: own.start] == 0).all()
        assert (layer.grad[own.stop :] == 0).all()


def test_an_example_is_learned_alike_in_any_company():
    model, example, other = make_long_llama(), cut(41), cut(60, seed=1)
    alone = collate([example], 0)
    hidden = model(alone["input_ids"], alone["attention_mask"], contexts=alone["contexts"]).hidden_states[0]
    for together in ([example, other], [other, example]):
        batch = collate(together, 0)
        found = model(batch["input_ids"], batch["attention_mask"], contexts=batch["contexts"]).hidden_states[0]
        first = 0 if together[0] is example else len(other.rows)
        for row, (start, stop) in enumerate(example.rows):
            torch.testing.assert_close(found[first + row, : stop - start], hidden[row, : stop - start])

"""Instruction and chat data: what is learned, how examples are cut into memory and last rows, what flows between."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llamory.errors import LlamoryError
from llamory.ingest.documents import load_documents
from llamory.longllama.losses import IGNORE_INDEX
from llamory.training.instruct.dataset import InstructFormat, Lengths, _Preprocessor, load_instructions

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
    learned = [label for label in example["labels"] if label != IGNORE_INDEX]
    assert learned == [
        token for token, label in zip(example["input_ids"], example["labels"], strict=True) if label != IGNORE_INDEX
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


def test_messages_about_a_document_stand_behind_it_as_it_is_read(load, tokenizer, tmp_path):
    text = f"River stone.{tokenizer.eos_token} The harbour."
    (chat,) = load(messages())
    (example,) = load(messages() | {"document": text})
    (tmp_path / "river.txt").write_text(text)
    read = load_documents(tmp_path / "river.txt", tokenizer)[0].ids.tolist()
    assert tokenizer.eos_token_id not in read[1:]
    assert example["input_ids"] == read + chat["input_ids"]
    assert example["labels"] == [-100] * len(read) + chat["labels"]


def words():
    return st.text("ab Z1.\nß🙂", min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["plain", "marked"])
@settings(deadline=None, max_examples=40)
@given(turns=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), words()), min_size=1, max_size=5))
def test_any_answers_can_be_read_back(tokenizer, template, turns):
    turns = [("user", "?"), *turns, ("assistant", "!")]
    tokenizer.chat_template = template
    preprocessor = _Preprocessor(tokenizer, InstructFormat(), Lengths(), skip_broken=False)
    kind, parts = preprocessor.format.read(messages(turns), tokenizer)
    tokenizer.chat_template = CHATML
    texts, flags = zip(*parts, strict=True)
    found = preprocessor.examples({"kind": [kind], "texts": [texts], "answers": [flags], "source": [""]})
    learned = [label for label in found["labels"][0] if label != IGNORE_INDEX]
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
    learned = [label for label in example["labels"] if label != IGNORE_INDEX]
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
        (messages(TURNS[1:]), CHATML, "the first message is the assistant's"),
        (messages(), STRICT, "rejects these messages .no system message"),
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
    with pytest.raises(LlamoryError, match=r"has no \.jsonl file"):
        load_instructions(documents, tokenizer)
    endless = AutoTokenizer.from_pretrained(model_folder, eos_token=None)
    with pytest.raises(LlamoryError, match="no end-of-sequence token"):
        load({"question": "?", "response": "!"}, tokenizer=endless)
    with pytest.raises(LlamoryError, match="output_length must be at least 1"):
        Lengths(output=0)


def test_each_chat_and_question_about_a_document_is_an_example(load, tokenizer):
    asked = [{"question": "Q: what?\n", "response": " This."}, {"question": "Why? Because", "response": " so."}]
    examples = load(
        {"document": "A text.", "chats": [messages(TURNS[:2])["messages"], messages(TURNS[2:])["messages"]]},
        {"document": "Another one.", "questions": asked},
        {"messages": messages()["messages"]},
        format=InstructFormat(post_question_text=""),
    )
    assert [each.rsplit(":", 1)[1] for each in examples["source"]] == ["1", "1", "2", "2", "3"]
    documents = ["A text.", "A text.", "Another one.", "Another one.", ""]
    for example, document in zip(examples, documents, strict=True):
        read = tokenizer(document)["input_ids"] if document else []
        assert example["document"] == len(read)
        assert example["input_ids"][: len(read)] == read
        assert set(example["labels"][: len(read)]) <= {IGNORE_INDEX}
    for number, turns in ((0, TURNS[:2]), (1, TURNS[2:])):
        alone = load(messages(turns))[0]
        assert examples[number]["input_ids"][examples[number]["document"] :] == alone["input_ids"]
        assert examples[number]["labels"][examples[number]["document"] :] == alone["labels"]
    for number, each in ((2, asked[0]), (3, asked[1])):
        example = examples[number]
        assert tokenizer.decode(example["input_ids"][example["document"] :]) == "".join(each.values()) + "<|end|>"
        assert tokenizer.decode([i for i in example["labels"] if i != IGNORE_INDEX]) == each["response"] + "<|end|>"


@pytest.mark.parametrize(
    ("entry", "sentence"),
    [
        ({"document": "A", "chats": [{"role": "user", "content": "?"}]}, "'chats' should be a list of lists"),
        ({"document": "A", "chats": []}, "'chats' should be a list"),
        ({"document": "A", "questions": ["?"]}, "'questions' should be a list of objects"),
        ({"document": "A", "questions": [{"question": "?"}]}, "response"),
    ],
)
def test_chats_and_questions_that_are_none_are_refused(load, entry, sentence):
    with pytest.raises(LlamoryError, match=sentence):
        load(entry)

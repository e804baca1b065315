"""In a chat each answer knows of what was said before, in the local context or in memory."""

from pathlib import Path

import pytest
import torch

from llamory.errors import LlamoryError
from llamory.ingest.encode import read_documents_into
from llamory.memory import MemoryBank
from llamory.qa.open_memory import OpenMemory

SETTINGS = {"mem_layers": [0, 1], "mem_dtype": "float32"}
QUESTIONS = ["which river", "and which bridge", "why"]
TEMPLATE = (
    "{% for m in messages %}<|im|>{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im|>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def make_memory(tmp_path_factory, model_folder):
    def make(context_length: int) -> Path:
        folder = tmp_path_factory.mktemp("memory")
        (folder / "a.txt").write_text("silver river " * 12)
        (folder / "b.txt").write_text("stone bridge")
        files = [folder / "a.txt", folder / "b.txt"]
        read_documents_into(
            folder / "book", files, model=model_folder, progress=False, context_length=context_length, **SETTINGS
        )
        return folder / "book"

    return make


def generate_from_scratch(opened: OpenMemory, ids: list[int], tokens: int) -> list[int]:
    found = opened.model.generate(
        torch.tensor([ids]),
        past_key_values=opened.model.memory_cache(opened.memory),
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=opened.generator.eos_token_ids(),
        pad_token_id=0,
    )
    return found[0, len(ids) :].tolist()


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_turn_is_as_if_all_turns_were_one_prompt(make_memory, template) -> None:
    opened = OpenMemory(make_memory(256), last_context_length=256)
    tokenizer = opened.tokenizer
    tokenizer.chat_template = template
    chat, ids = opened.chat(), list[int]()
    for question in QUESTIONS:
        if template is None:
            text = ("\n\n" if ids else "") + f"Question: {question}\nAnswer:"
        else:
            text = ("<|end|>\n" if ids else "") + f"<|im|>user: {question}<|end|>\n<|im|>assistant: "
        # An end that the model has written itself isn't written twice.
        ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
        ids = [*ids, *tokenizer(text)["input_ids"]]
        expected_ids = generate_from_scratch(opened, ids, 5)
        answer = chat.ask(question, max_new_tokens=5)
        assert answer.answer == tokenizer.decode(expected_ids, skip_special_tokens=True).strip()
        assert answer.answer_tokens == len(expected_ids)
        ids += expected_ids
        assert chat._ids == ids
    assert [turn.question for turn in chat.turns] == QUESTIONS


def test_an_end_that_the_model_wrote_is_not_written_twice(make_memory, monkeypatch) -> None:
    opened = OpenMemory(make_memory(256))
    opened.tokenizer.chat_template = TEMPLATE
    chat = opened.chat()
    chat.ask(QUESTIONS[0], max_new_tokens=3)
    end = opened.tokenizer.eos_token_id
    chat._ids[-1] = end  # the last token is never taken in, so it can be any
    chat.ask(QUESTIONS[1], max_new_tokens=3)
    assert opened.tokenizer.decode(chat._ids).count("<|end|>") == 3 + (chat._ids[-1] == end)


def test_what_leaves_the_local_context_is_remembered_in_a_segment_of_its_own(make_memory) -> None:
    opened = OpenMemory(make_memory(16))
    before = opened.memory.length()
    chat = opened.chat()
    for question in QUESTIONS:
        in_memory = len(chat._ids) and len(chat._ids) - 1 - 16
        chat.ask(question, max_new_tokens=12)
    assert chat.documents == opened.documents == ("a.txt", "b.txt")
    columns = len(chat._ids) - 1
    assert chat.memory.length(segment="conversation") == columns - 16
    for document in chat.documents:
        assert torch.equal(chat.memory.keys(1, document), opened.memory.keys(1, document))
    assert opened.memory.length() == before
    assert chat.turns[-1].memory_tokens == before + in_memory


def test_an_answer_depends_on_what_was_said_long_ago(make_memory) -> None:
    opened = OpenMemory(make_memory(16))
    answers = []
    for beginning in ("silver garden", "winter market candle"):
        chat = opened.chat()
        for question in (beginning, *QUESTIONS):
            answer = chat.ask(question, max_new_tokens=12)
        answers.append(chat.memory.values(1, "conversation")[:, :4])
        assert answer.question_tokens
    assert not torch.equal(answers[0], answers[1])


def test_a_turn_that_was_interrupted_is_as_if_it_had_never_been(make_memory) -> None:
    opened = OpenMemory(make_memory(256), last_context_length=256)
    wanted, chat = opened.chat(), opened.chat()
    for each in (wanted, chat):
        each.ask(QUESTIONS[0], max_new_tokens=5)

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    opened.tokenizer.decode, decode = (lambda ids, **_: "".join(f"{int(i)} " for i in ids)), opened.tokenizer.decode
    with pytest.raises(KeyboardInterrupt):
        chat.ask("something else", max_new_tokens=9, on_text=stop)
    opened.tokenizer.decode = decode
    assert len(chat.turns) == 1
    again = [each.ask(QUESTIONS[1], max_new_tokens=5).answer for each in (wanted, chat)]
    assert again[0] == again[1]
    assert wanted._ids == chat._ids


def test_a_saved_chat_is_asked_like_any_memory(make_memory, tmp_path) -> None:
    opened = OpenMemory(make_memory(16))
    chat = opened.chat()
    chat.ask(QUESTIONS[0], max_new_tokens=12)
    chat.save(tmp_path / "kept")
    bank = MemoryBank.load(tmp_path / "kept")
    assert bank.segments == ("a.txt", "b.txt", "conversation")
    alone = opened.model.read(torch.tensor(chat._ids))
    torch.testing.assert_close(bank.keys(1, "conversation"), alone.keys(1), atol=1e-5, rtol=1e-5)
    again = OpenMemory(tmp_path / "kept").chat()
    assert again.ask(QUESTIONS[1], max_new_tokens=3).documents == ["a.txt", "b.txt", "conversation"]
    again.save(tmp_path / "kept")
    assert MemoryBank.load(tmp_path / "kept").segments[-1] == "conversation 2"


def test_wrong_turns_are_one_sentence_and_change_nothing(make_memory) -> None:
    opened = OpenMemory(make_memory(16))
    chat = opened.chat()
    for question, settings, words in ((" ", {}, "blank"), ("why", {"max_question_tokens": 1}, "limit of 1")):
        with pytest.raises(LlamoryError, match=words):
            chat.ask(question, **settings)
    assert (chat.turns, chat._ids) == ([], [])

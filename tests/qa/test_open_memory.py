"""Questions are answered from mounted memories, word by word, and change nothing in them."""

import functools
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llamory.errors import LlamoryError
from llamory.ingest.encode import read_documents_into
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank
from llamory.qa.open_memory import OpenMemory
from tiny_models import make_long_llama

SETTINGS = {"mem_layers": [0, 1], "context_length": 16, "mem_dtype": "float32"}
QUESTION = "which river has a bridge of stone"


def ask(question: str, memory, model=None, last_context_length=None, **settings):
    return OpenMemory(memory, model=model, last_context_length=last_context_length).ask(question, **settings)


@pytest.fixture(scope="module")
def memory_files(tmp_path_factory, model_folder) -> tuple[Path, Path]:
    """Two memories; both have a document a.txt, of different content."""
    folder = tmp_path_factory.mktemp("books")
    made = []
    for memory_file, texts in {
        "one": {"a": "silver river " * 12, "b": "stone bridge"},
        "two": {"a": "candle forest"},
    }.items():
        (folder / f"{memory_file}-texts").mkdir()
        for name, text in texts.items():
            (folder / f"{memory_file}-texts" / f"{name}.txt").write_text(text)
        files = [folder / f"{memory_file}-texts" / f"{name}.txt" for name in texts]
        read_documents_into(folder / memory_file, files, model=model_folder, progress=False, **SETTINGS)
        made.append(folder / memory_file)
    return made[0], made[1]


def test_the_answer_is_what_the_model_says_with_that_memory(memory_files, model_folder) -> None:
    answer = ask(QUESTION, memory_files[0], max_new_tokens=12)
    model, tokenizer = load_long_model(model_folder, **SETTINGS), AutoTokenizer.from_pretrained(model_folder)
    memory = model.new_memory()
    for name, text in {"a": "silver river " * 12, "b": "stone bridge"}.items():
        model.read(tokenizer(text)["input_ids"], memory, segment=name)
    prompt = tokenizer(f"Question: {QUESTION}\nAnswer:", return_tensors="pt")["input_ids"]
    found, cache = [], model.memory_cache(memory)
    with torch.no_grad():
        following = prompt
        while len(found) < 12 and tokenizer.eos_token_id not in found:
            following = model(following, past_key_values=cache).logits[:, -1:].argmax(-1)
            found.append(int(following))
    assert answer.answer == tokenizer.decode(found, skip_special_tokens=True).strip()
    assert answer.question == QUESTION
    assert answer.documents == ["a.txt", "b.txt"]
    assert answer.memory_tokens == memory.length()
    assert (answer.question_tokens, answer.answer_tokens) == (prompt.shape[1], len(found))
    assert 0 < answer.seconds_to_first_token <= answer.seconds


def test_the_answer_comes_while_it_is_made(memory_files, monkeypatch) -> None:
    opened, log = OpenMemory(memory_files[0]), []
    forward = type(opened.model).forward

    @functools.wraps(forward)  # generate looks at its parameters
    def counted(self, *arguments, **settings):
        log.append(None)
        return forward(self, *arguments, **settings)

    monkeypatch.setattr(type(opened.model), "forward", counted)
    # A random model has no words in its answers; with another tokenizer each token is one.
    monkeypatch.setattr(opened.tokenizer, "decode", lambda ids, **_: "".join(f"{int(i)} " for i in ids))
    answer = opened.ask(QUESTION, max_new_tokens=8, on_text=log.append, evidence_ratio=0)
    texts = [entry for entry in log if entry is not None]
    assert "".join(texts).strip() == answer.answer
    assert len(texts) == answer.answer_tokens
    assert log[:4] == [None, texts[0], None, texts[1]]


def test_asking_leaves_the_memory_as_it_is(memory_files) -> None:
    before, opened = [memory_file.read_bytes() for memory_file in memory_files], OpenMemory(memory_files)
    first = opened.ask(QUESTION, max_new_tokens=40)
    opened.ask("something else", max_new_tokens=30)
    again = opened.ask(QUESTION, max_new_tokens=40)
    assert (again.answer, again.memory_tokens) == (first.answer, first.memory_tokens)
    assert [memory_file.read_bytes() for memory_file in memory_files] == before


def test_several_memories_are_one(memory_files) -> None:
    opened = OpenMemory(memory_files)
    assert opened.documents == ("a.txt", "b.txt", "two:a.txt")
    one, two = (MemoryBank.load(memory_file) for memory_file in memory_files)
    assert torch.equal(opened.memory.keys(1), torch.cat([one.keys(1), two.keys(1)], 1))
    assert OpenMemory([memory_files[0], memory_files[0]]).documents == ("a.txt", "b.txt")


def test_documents_are_chosen_by_name_end_of_name_or_title(memory_files) -> None:
    assert OpenMemory(memory_files, documents=["two:a.txt", "b.txt"]).documents == ("two:a.txt", "b.txt")
    assert OpenMemory(memory_files, documents=["a.txt"]).documents == ("a.txt",)
    assert OpenMemory(memory_files, documents=["b"]).documents == ("b.txt",)
    with pytest.raises(LlamoryError, match=r"no document c\.txt in memory; .* a\.txt, b\.txt, two:a\.txt"):
        OpenMemory(memory_files, documents=["c.txt"])
    with pytest.raises(LlamoryError, match=r"a may be several documents; .* a\.txt, two:a\.txt"):
        OpenMemory(memory_files, documents=["a"])


def test_the_chat_template_goes_around_the_question_alone(memory_files, model_folder, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[answer]{% endif %}"
    )
    prompt = OpenMemory(memory_files[0], tokenizer=tokenizer).generator.prompt(QUESTION).ids
    assert tokenizer.decode(prompt) == f"[user] {QUESTION}\n[answer]"


def test_sampling_differs_by_seed_and_only_by_seed(memory_files) -> None:
    opened = OpenMemory(memory_files[0])
    answers = [opened.ask(QUESTION, max_new_tokens=12, temperature=3.0, seed=seed).answer for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]


def test_sampling_leaves_the_random_state_of_the_process_alone(memory_files) -> None:
    opened, state = OpenMemory(memory_files[0]), torch.get_rng_state()
    opened.ask(QUESTION, max_new_tokens=3, temperature=3.0, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_opening_many_documents_renames_them_in_one_step(memory_files, monkeypatch) -> None:
    for method in ("rename", "drop"):
        monkeypatch.setattr(MemoryBank, method, lambda *_: pytest.fail("one by one, which takes quadratic time"))
    assert OpenMemory(memory_files, documents=["b.txt", "two:a.txt"]).documents == ("b.txt", "two:a.txt")


def test_metadata_is_decoded_once_per_document_however_many_names(memory_files, monkeypatch) -> None:
    decoded, metadata = [], MemoryBank.metadata
    monkeypatch.setattr(MemoryBank, "metadata", lambda bank, name: decoded.append(name) or metadata(bank, name))
    assert OpenMemory(memory_files, documents=["b", "b.txt", "b"]).documents == ("b.txt",)
    assert len(decoded) == len(set(decoded))


def test_an_answer_ends_where_the_tokenizer_says(memory_files, model_folder) -> None:
    opened = OpenMemory(memory_files[0])
    next_token = opened.model.generate(
        torch.tensor([opened.generator.prompt(QUESTION).ids]),
        past_key_values=opened.model.memory_cache(opened.memory),
        max_new_tokens=1,
    )[0, -1]
    opened.tokenizer.eos_token = opened.tokenizer.convert_ids_to_tokens(int(next_token))
    assert opened.ask(QUESTION, max_new_tokens=12).answer_tokens == 1


def test_the_model_may_have_been_moved(memory_files, model_folder, tmp_path) -> None:
    shutil.copytree(model_folder, tmp_path / "moved")
    shutil.copy(memory_files[0], tmp_path / "book")
    wanted = ask(QUESTION, tmp_path / "book", max_new_tokens=5).answer
    # As if the model's folder were gone.
    bank = MemoryBank.load(memory_files[0])
    for name in bank.segments:
        bank.set_metadata(name, model=str(tmp_path / "gone"))
    bank.save(tmp_path / "book")
    with pytest.raises(LlamoryError, match=r"isn't where it was.*name its new place"):
        ask(QUESTION, tmp_path / "book")
    assert ask(QUESTION, tmp_path / "book", model=tmp_path / "moved", max_new_tokens=5).answer == wanted


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_another_model_is_refused(memory_files, model_folder, tmp_path) -> None:
    make_long_llama().save_pretrained(tmp_path / "other")
    with pytest.raises(LlamoryError, match=r"made by another model than .*other"):
        OpenMemory(memory_files[0], model=tmp_path / "other")
    torch.manual_seed(5)
    model = load_long_model(model_folder, **SETTINGS)
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.weight)
    with pytest.raises(LlamoryError, match="made by another model"):
        OpenMemory(memory_files[0], model=model)


def test_memories_of_different_models_are_refused_together(memory_files, tmp_path, model_folder) -> None:
    texts = memory_files[0].parent / "one-texts"
    read_documents_into(tmp_path / "other", texts, model=model_folder, progress=False, **SETTINGS | {"mem_layers": [1]})
    with pytest.raises(LlamoryError, match="other was made with memory layers 1, not 0, 1"):
        OpenMemory([memory_files[0], tmp_path / "other"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"question": "  "}, "blank"),
        ({"max_question_tokens": 3}, "more than the limit of 3"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"last_context_length": 17}, "last_context_length is 17"),
    ],
)
def test_wrong_questions_and_settings_are_one_sentence(memory_files, settings, words) -> None:
    with pytest.raises(LlamoryError, match=words):
        ask(**{"question": QUESTION, "memory": memory_files[0]} | settings)


def test_damaged_missing_and_empty_memories_are_one_sentence(memory_files, tmp_path) -> None:
    whole = memory_files[0].read_bytes()
    for name, content in {"cut": whole[:-9], "wrong": whole[:-9] + b"123456789"}.items():
        (tmp_path / name).write_bytes(content)
    for name, words in {"cut": "cut short", "wrong": "damaged", "none": "no memory file"}.items():
        with pytest.raises(LlamoryError, match=words):
            ask(QUESTION, tmp_path / name)
    bank = MemoryBank.load(memory_files[0])
    for segment in bank.segments:
        bank.drop(segment)
    bank.save(tmp_path / "empty")
    with pytest.raises(LlamoryError, match=r"nothing in .*empty"):
        ask(QUESTION, tmp_path / "empty")


def test_too_little_memory_is_one_sentence(memory_files, monkeypatch) -> None:
    opened = OpenMemory(memory_files[0])

    def short(*_, **__):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(type(opened.model), "generate", short)
    with pytest.raises(LlamoryError, match="too little memory"):
        opened.ask(QUESTION)

"""What can't be read is refused in one sentence, and the memory stays as it was."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock

from llamory.common import ram
from llamory.errors import LlamoryError
from llamory.ingest import encode
from llamory.ingest.memory_file import checkpoint_path
from llamory.memory import MemoryBank


@pytest.fixture
def refused(read, memory_file, texts):
    """The sentence with which reading is refused; the memory must stay as it is."""
    read(texts / "a.txt")
    before = {path: path.read_bytes() for path in memory_file.parent.iterdir() if path.is_file()}

    def run(*paths, **settings) -> str:
        with pytest.raises(LlamoryError) as error:
            read(*paths, **settings)
        assert {path: path.read_bytes() for path in memory_file.parent.iterdir() if path.is_file()} == before
        message = str(error.value)
        assert "\n" not in message
        return message

    return run


def test_a_document_over_the_limit_is_refused(refused, texts) -> None:
    message = refused(texts, max_tokens=30)
    assert "b.txt has" in message
    assert "the limit of 30" in message


def test_an_empty_document_alone_is_refused(refused, texts) -> None:
    (texts / "empty.txt").write_text(" \n")
    assert "empty.txt is empty" in refused(texts / "empty.txt")


def test_an_empty_document_among_others_is_passed_over(read, memory_file, texts, caplog) -> None:
    for name in ("empty.txt", "more/blank.html"):
        (texts / name).write_text("" if name == "empty.txt" else "<p></p>")
    with caplog.at_level(logging.WARNING):
        read(texts / "empty.txt", texts / "a.txt", texts / "more")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("llamory")] == [
        f"Skipped {texts / 'empty.txt'}: it is empty.",
        f"Skipped {texts / 'more' / 'blank.html'}: it is empty.",
    ]
    assert MemoryBank.load(memory_file).segments == ("a.txt", "more/d.txt", "more/e.txt")


def test_a_broken_file_is_named(refused, texts) -> None:
    (texts / "bad.txt").write_bytes(b"river \xff stone")
    assert "bad.txt:1" in refused(texts)
    assert "missing.txt" in refused(texts / "missing.txt")


@pytest.fixture
def other_model(tmp_path_factory, model_folder) -> Path:
    """The tiny model with other weights."""
    from transformers import LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(model_folder, folder, dirs_exist_ok=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    torch.nn.init.normal_(model.model.layers[0].self_attn.k_proj.weight)
    model.save_pretrained(folder)
    return folder


def test_a_memory_of_another_model_is_refused(refused, texts, other_model, model_folder) -> None:
    message = refused(texts, model=other_model)
    assert "made by another model" in message
    assert str(other_model) in message
    assert str(model_folder) in message


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"mem_layers": [0]}, "memory layers 1, not 0"),
        ({"context_length": 8}, "a context of 16, not 8"),
        ({"mem_dtype": "int8"}, "the dtype float32, not int8"),
    ],
)
def test_other_settings_than_the_memorys_are_refused(refused, texts, setting, words) -> None:
    assert words in refused(texts, **setting)


def test_layers_that_do_not_exist_and_contexts_too_long_are_refused(read, memory_file, texts) -> None:
    with pytest.raises(LlamoryError, match="layer 7, but the model has 2 layers"):
        read(texts, mem_layers=[0, 7])
    with pytest.raises(LlamoryError, match="context is 2048"):
        read(texts, context_length=4096)
    with pytest.raises(LlamoryError, match="no memory layers"):
        read(texts, mem_layers=[])
    assert {path.name for path in memory_file.parent.iterdir()} == {".book.lock", "texts"}


def test_a_damaged_memory_is_refused_and_stays(read, memory_file, texts) -> None:
    read(texts)
    for damaged in (memory_file.read_bytes()[:-100], memory_file.read_bytes()[:-4] + b"abcd", b"river"):
        memory_file.write_bytes(damaged)
        with pytest.raises(LlamoryError, match="book"):
            read(texts)
        assert memory_file.read_bytes() == damaged


def test_a_partial_file_of_another_model_is_refused(read, memory_file, texts, other_model) -> None:
    read(texts / "a.txt", model=other_model)
    memory_file.rename(checkpoint_path(memory_file))
    with pytest.raises(LlamoryError, match=r"book\.partial was made by another model.*remove that file"):
        read(texts / "a.txt")
    assert not memory_file.exists()


def test_a_damaged_partial_file_is_refused(read, memory_file, texts) -> None:
    read(texts)
    checkpoint_file = checkpoint_path(memory_file)
    memory_file.rename(checkpoint_file)
    checkpoint_file.write_bytes(checkpoint_file.read_bytes()[:-4] + b"abcd")
    with pytest.raises(LlamoryError, match=r"damaged.*or remove that file to begin anew"):
        read(texts)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_too_little_memory_is_one_sentence(refused, texts, monkeypatch, error) -> None:
    def short(*_):
        raise error

    monkeypatch.setattr(encode, "encode_windows", short)
    message = refused(texts)
    assert "too little memory" in message
    assert "int8" in message


def test_too_little_memory_for_the_weights_is_said_too(refused, texts, monkeypatch) -> None:
    def short(*_, **__):
        try:
            raise RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)")
        except RuntimeError as error:
            raise LlamoryError("The weights can't be read.") from error

    monkeypatch.setattr(encode, "load_model_for", short)
    assert "too little memory" in refused(texts)


def test_memory_is_asked_for_before_the_system_ends_the_process(refused, texts, monkeypatch) -> None:
    monkeypatch.setattr(ram, "available_ram", lambda: ram.RESERVED_BYTES - 1)
    assert "too little memory" in refused(texts)


def test_other_errors_are_not_taken_for_too_little_memory(read, texts, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(encode, "encode_windows", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        read(texts)


def test_a_disk_too_small_is_said_before_reading(refused, texts, monkeypatch) -> None:
    monkeypatch.setattr(encode.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "free some space" in refused(texts)


def test_two_runs_at_once_are_refused(read, memory_file, texts) -> None:
    with FileLock(memory_file.with_name(".book.lock")), pytest.raises(LlamoryError, match="Another run"):
        read(texts)
    assert not memory_file.exists()
    read(texts)


def test_a_folder_in_place_of_the_memory_is_refused(read, memory_file, texts) -> None:
    memory_file.mkdir()
    with pytest.raises(LlamoryError, match="is a folder"):
        read(texts)

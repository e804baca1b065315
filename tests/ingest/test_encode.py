"""Documents are encoded each by itself; errors are one sentence and leave the memory as it was."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from transformers import AutoTokenizer

from llamory.common import ram
from llamory.errors import LlamoryError
from llamory.ingest import encode
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank
from small_texts import CONTEXT, SETTINGS


def tensors(path: Path, dtype: str = "float32") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bank = MemoryBank.load(path, dtype=dtype)
    return {name: (bank.keys(1, name), bank.values(1, name)) for name in bank.segments}


def test_every_document_is_read_by_itself(read, memory_file, texts, model_folder) -> None:
    report = read(texts)
    model, tokenizer = load_long_model(model_folder, **SETTINGS), AutoTokenizer.from_pretrained(model_folder)
    found = tensors(memory_file)
    assert list(found) == [f"texts/{name}.txt" for name in ("a", "b", "c", "more/d", "more/e")]
    total = 0
    for name, (keys, values) in found.items():
        ids = tokenizer((texts.parent / name).read_text())["input_ids"]
        alone = model.read(ids)
        torch.testing.assert_close(keys, alone.keys(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, alone.values(1), atol=1e-5, rtol=1e-5)
        total += len(ids)
    assert (report.added, report.documents, report.tokens, report.memory_tokens) == (5, 5, total, total)
    assert report.bytes == memory_file.stat().st_size
    assert report.tokens_per_second == pytest.approx(total / report.seconds)


def test_the_memory_says_where_its_documents_are_from(read, memory_file, texts, model_folder) -> None:
    (texts / "f.md").write_text("# Bridges\n\nThey cross rivers.")
    read(texts / "f.md")
    metadata = MemoryBank.load(memory_file).metadata("f.md")
    assert metadata["source"] == str(texts / "f.md")
    assert metadata["title"] == "Bridges"
    assert metadata["tokens"] == MemoryBank.load(memory_file).length()
    assert metadata["model"] == str(model_folder)
    assert metadata["context_length"] == CONTEXT
    assert len(metadata["digest"]) == 32


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
    assert memory_file.with_name(".book.lock").exists()  # deleting a lock that is held would let two runs in

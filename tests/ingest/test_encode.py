"""Documents are read each by itself, only what changed is read again, and a run that was stopped goes on."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from llamory.errors import LlamoryError
from llamory.ingest import checkpoint as checkpoint_module
from llamory.ingest import encode
from llamory.ingest.checkpoint import IngestCheckpoint
from llamory.ingest.documents import TokenizedDocument
from llamory.ingest.memory_file import MemoryFileInfo, checkpoint_path
from llamory.longllama.causal import encode_windows
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank
from small_texts import CONTEXT, SETTINGS, sentence


def tensors(path: Path, dtype: str = "float32") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bank = MemoryBank.load(path, dtype=dtype)
    return {name: (bank.keys(1, name), bank.values(1, name)) for name in bank.segments}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True)
    )


# ---- what is read ----------------------------------------------------------------------------------------------------


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


def test_documents_of_the_same_name_get_different_ones(read, memory_file, tmp_path) -> None:
    for folder in ("one/x", "two/x", "three"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(f"river {folder}")
    read(tmp_path / "one/x", tmp_path / "two/x", tmp_path / "three/a.txt")
    assert MemoryBank.load(memory_file).segments == ("x/a.txt", "two/x/a.txt", "a.txt")


def test_a_title_beside_the_text_is_read_with_it(read, memory_file, tmp_path, model_folder) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps({"title": "Bridge", "text": "stone"}))
    read(tmp_path / "lines.jsonl")
    tokens = AutoTokenizer.from_pretrained(model_folder)("Bridge\n\nstone")["input_ids"]
    assert MemoryBank.load(memory_file).length(segment="lines.jsonl:1") == len(tokens)


def test_a_special_token_in_a_text_is_plain_text(read, memory_file, tmp_path) -> None:
    (tmp_path / "x.txt").write_text("<|end|>")
    read(tmp_path / "x.txt")
    assert MemoryBank.load(memory_file).length() == len(
        "<|end|>"
    )  # no merges: the tokenizer's training has no such letters


def test_documents_begin_with_a_token_if_the_tokenizer_says_so(read, memory_file, texts, model_folder) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    read(texts / "b.txt")
    plain = MemoryBank.load(memory_file)
    tokenizer.bos_token = "<|end|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.bos_token_id)]
    )
    read(texts / "b.txt", tokenizer=tokenizer)
    bank = MemoryBank.load(memory_file)
    assert bank.length() == plain.length() + 1
    # Layer 1's first value depends on the first token alone.
    wanted = load_long_model(model_folder, **SETTINGS).read([tokenizer.bos_token_id])
    torch.testing.assert_close(bank.values(1)[:, :1], wanted.values(1), atol=1e-5, rtol=1e-5)


# ---- once more -------------------------------------------------------------------------------------------------------


def test_only_what_is_new_or_changed_is_read_again(read, memory_file, texts) -> None:
    read(texts)
    before = tensors(memory_file)
    (texts / "b.txt").write_text(sentence(7, 20))
    (texts / "g.txt").write_text("silver letter")
    report = read(texts)
    assert (report.added, report.replaced, report.unchanged, report.removed) == (1, 1, 4, 0)
    after = tensors(memory_file)
    assert list(after) == [*before, "texts/g.txt"]
    assert report.tokens == after["texts/b.txt"][0].shape[1] + after["texts/g.txt"][0].shape[1]
    assert not same({"": before.pop("texts/b.txt")}, {"": after.pop("texts/b.txt")})
    del after["texts/g.txt"]
    assert same(before, after)


def test_nothing_new_leaves_the_file_alone(read, memory_file, texts) -> None:
    read(texts)
    before = memory_file.stat()
    report = read(texts / "b.txt", texts)
    assert (report.unchanged, report.tokens, report.tokens_per_second) == (5, 0, 0)
    assert (memory_file.stat().st_ino, memory_file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_not_named_stays(read, memory_file, texts) -> None:
    read(texts / "a.txt")
    report = read(texts / "b.txt")
    assert MemoryBank.load(memory_file).segments == ("a.txt", "b.txt")
    assert (report.added, report.documents) == (1, 2)


def test_settings_and_model_of_a_memory_need_not_be_said_again(read, memory_file, texts) -> None:
    read(texts / "a.txt")
    nothing = dict.fromkeys(("model", *SETTINGS))
    assert read(texts / "b.txt", **nothing).added == 1
    assert MemoryBank.load(memory_file).layers == (1,)


def test_lines_that_moved_are_known_again(read, memory_file, tmp_path) -> None:
    lines = [json.dumps({"text": sentence(i, 6 + i)}) for i in range(4)]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(lines))
    read(file)
    before = tensors(memory_file)
    new = json.dumps({"text": "winter window"})
    file.write_text("\n".join([new, lines[3], lines[0], lines[1]]))
    report = read(file)
    assert (report.added, report.replaced, report.unchanged, report.removed) == (1, 0, 3, 1)
    after = tensors(memory_file)
    moved = {"lines.jsonl:2": "lines.jsonl:4", "lines.jsonl:3": "lines.jsonl:1", "lines.jsonl:4": "lines.jsonl:2"}
    assert set(after) == {*moved, "lines.jsonl:1"}
    assert same({name: after[name] for name in moved}, {name: before[old] for name, old in moved.items()})
    assert MemoryBank.load(memory_file).metadata("lines.jsonl:2")["source"] == f"{file}:2"


def test_a_folder_that_was_moved_is_known_again(read, memory_file, texts, tmp_path) -> None:
    read(texts)
    before = tensors(memory_file)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(texts, tmp_path / "elsewhere" / "texts")
    report = read(tmp_path / "elsewhere" / "texts")
    assert (report.unchanged, report.added, report.tokens) == (5, 0, 0)
    assert same(before, tensors(memory_file))
    source = MemoryBank.load(memory_file).metadata("texts/a.txt")["source"]
    assert source == str(tmp_path / "elsewhere" / "texts" / "a.txt")


def interrupt(*_) -> None:
    raise KeyboardInterrupt


# ---- stopped runs ----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from llamory.ingest import checkpoint, encode
from llamory.common.progress import ProgressBar

checkpoint.SAVE_INTERVAL_SECONDS = checkpoint._SAVE_TIME_RATIO = 0
windows = 0

def advance(self, tokens, **_):
    global windows
    windows += 1
    if windows == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

ProgressBar.advance = advance
encode.read_documents_into(
    sys.argv[1], sys.argv[2], model=sys.argv[3], mem_layers=[1], context_length=16, mem_dtype="float32"
)
"""


def test_a_killed_run_goes_on_and_ends_as_if_in_one_go(read, memory_file, texts, model_folder) -> None:
    arguments = [str(memory_file), str(texts), str(model_folder), "8"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not memory_file.exists()
    with pytest.raises(LlamoryError, match=r"isn't finished.*book\.partial"):
        MemoryFileInfo(memory_file)
    report = read(texts)
    assert report.resumed > CONTEXT
    assert report.tokens + report.resumed == report.memory_tokens
    resumed = tensors(memory_file)
    assert sorted(path.name for path in memory_file.parent.iterdir()) == [".book.lock", "book", "texts"]
    memory_file.unlink()
    assert read(texts).resumed == 0
    assert same(resumed, tensors(memory_file))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("windows", [1, 3, 4, 6, 9, 12])
def test_a_run_stopped_anywhere_loses_no_whole_window(read, memory_file, texts, monkeypatch, dtype, windows) -> None:
    (texts / "f.txt").write_text(sentence(3, 150))
    monkeypatch.setattr(encode, "MAX_BATCH_ROWS", 1)  # so that a window is a step
    read(texts, mem_dtype=dtype)
    wanted = tensors(memory_file, dtype)
    memory_file.unlink()
    seen: list[int] = []

    def stop(model, rows, banks, start=0):
        encoding, encoded = encode_windows(model, rows, banks, start), start
        while encoded < len(rows[0]):
            if len(seen) == windows:
                # Within a window: its first layers have it, the others don't.
                banks[0].append(1, torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
                raise KeyboardInterrupt
            seen.append(next(encoding) - encoded)
            encoded += seen[-1]
            yield encoded

    with monkeypatch.context() as patch:
        patch.setattr(encode, "encode_windows", stop)
        with pytest.raises(KeyboardInterrupt):
            read(texts, mem_dtype=dtype)
    assert not memory_file.exists()
    report = read(texts, mem_dtype=dtype)
    assert report.resumed == sum(seen)
    assert same(tensors(memory_file, dtype), wanted)


def test_a_stopped_run_leaves_the_memory_and_other_documents_alone(read, memory_file, texts, monkeypatch) -> None:
    read(texts / "a.txt")
    before = memory_file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(IngestCheckpoint, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(texts / "c.txt", texts / "more" / "d.txt")
    assert memory_file.read_bytes() == before
    # c is finished but not asked for now: it waits beside.
    assert read(texts / "b.txt").resumed == 0
    assert MemoryBank.load(memory_file).segments == ("a.txt", "b.txt")
    assert MemoryBank.load(checkpoint_path(memory_file)).segments == (str(texts / "c.txt"),)
    report = read(texts / "c.txt")
    assert (report.tokens, report.added) == (0, 1)
    assert report.resumed == MemoryBank.load(memory_file).length(segment="c.txt")
    assert not checkpoint_path(memory_file).exists()


def test_a_document_that_changed_since_the_stop_is_read_anew(read, memory_file, texts, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(IngestCheckpoint, "start", interrupt)
        with pytest.raises(KeyboardInterrupt):
            read(texts)
    (texts / "c.txt").write_text("market morning")
    changed = read(texts).resumed
    found = tensors(memory_file)
    assert changed == sum(found[f"texts/{name}.txt"][0].shape[1] for name in ("a", "more/e"))
    memory_file.unlink()
    read(texts)
    for name, parts in tensors(memory_file).items():
        torch.testing.assert_close(found[name], parts, atol=1e-5, rtol=1e-5)


def test_saving_takes_a_small_part_of_the_time(monkeypatch, tmp_path, model_folder) -> None:
    now, saved = [0.0], []
    monkeypatch.setattr(checkpoint_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    kept = IngestCheckpoint(tmp_path / "p", load_long_model(model_folder, **SETTINGS), "model")
    kept._saved_at, kept._save_seconds = 0.0, 2.0
    monkeypatch.setattr(kept, "save", lambda: saved.append(now[0]))
    for now[0] in (10.0, 39.0, 41.0):
        kept.save_if_due()
    assert saved == [41.0]
    kept.start(TokenizedDocument("/a.txt", "A", "digest", torch.zeros(2 * CONTEXT)))
    for now[0] in (50.0, 61.0):
        kept.save_if_due(mid_document=True)
    assert saved == [41.0, 61.0]


def test_an_unfinished_document_goes_on_with_offloaded_weights(tmp_path, model_folder) -> None:
    from accelerate import cpu_offload

    model = load_long_model(model_folder, **SETTINGS)
    ids = torch.arange(3, 3 + 3 * CONTEXT, dtype=torch.int32) % 90
    document = TokenizedDocument("/a.txt", "A", "digest", ids, file="/a.txt", label="a.txt")
    unfinished_bank = model.read(ids[:CONTEXT], segment="/a.txt")
    read = unfinished_bank.fork()
    unfinished_bank.set_metadata("/a.txt", **document.metadata("model", CONTEXT), unfinished=True)
    cpu_offload(model, torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    kept = IngestCheckpoint(tmp_path / "p", model, "model", unfinished_bank)
    bank = kept.start(document)
    for layer in bank.layers:
        assert bank.length(layer) == CONTEXT
        assert torch.equal(bank.keys(layer), read.keys(layer))
        assert torch.equal(bank.values(layer), read.values(layer))

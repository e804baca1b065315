"""Documents are read each by itself, only what changed is read again, and a run that was stopped goes on."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from transformers import AutoTokenizer

from llamory.errors import LlamoryError
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank
from llamory.reading import partial, passes, reading, room
from llamory.reading.reading import ReadReport, read_documents_into

CONTEXT = 16
SETTINGS = {"mem_layers": [1], "context_length": CONTEXT, "mem_dtype": "float32"}
WORDS = "river stone bridge winter garden letter window market silver morning".split()


def sentence(start: int, words: int) -> str:
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(words))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """Three documents of a window at most and two longer ones."""
    folder = tmp_path / "texts"
    (folder / "more").mkdir(parents=True)
    for number, (name, words) in enumerate({"a": 3, "b": 40, "c": 5, "more/d": 90, "more/e": 2}.items()):
        (folder / f"{name}.txt").write_text(sentence(number, words))
    return folder


@pytest.fixture
def read(model_folder: Path, tmp_path: Path):
    """Reads into one memory file with the tiny model."""

    def run(*paths: Path, **settings) -> ReadReport:
        settings = {"model": model_folder, "progress": False} | SETTINGS | settings
        return read_documents_into(tmp_path / "book", paths, **settings)

    return run


@pytest.fixture
def book(tmp_path: Path) -> Path:
    return tmp_path / "book"


def tensors(path: Path, dtype: str = "float32") -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    bank = MemoryBank.load(path, dtype=dtype)
    return {name: (bank.keys(1, name), bank.values(1, name)) for name in bank.segments}


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(
        torch.equal(a, b) for name in one for a, b in zip(one[name], two[name], strict=True)
    )


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_every_document_is_read_by_itself(read, book, texts, model_folder) -> None:
    report = read(texts)
    model, tokenizer = load_long_model(model_folder, **SETTINGS), AutoTokenizer.from_pretrained(model_folder)
    found = tensors(book)
    assert list(found) == [f"texts/{name}.txt" for name in ("a", "b", "c", "more/d", "more/e")]
    total = 0
    for name, (keys, values) in found.items():
        ids = tokenizer((texts.parent / name).read_text())["input_ids"]
        alone = model.read(ids)
        torch.testing.assert_close(keys, alone.keys(1), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, alone.values(1), atol=1e-5, rtol=1e-5)
        total += len(ids)
    assert (report.added, report.documents, report.tokens, report.memory_tokens) == (5, 5, total, total)
    assert report.bytes == book.stat().st_size
    assert report.tokens_per_second == pytest.approx(total / report.seconds)


def test_the_memory_says_where_its_documents_are_from(read, book, texts, model_folder) -> None:
    (texts / "f.md").write_text("# Bridges\n\nThey cross rivers.")
    read(texts / "f.md")
    facts = MemoryBank.load(book).describe("f.md")
    assert facts["source"] == str(texts / "f.md")
    assert facts["title"] == "Bridges"
    assert facts["tokens"] == MemoryBank.load(book).length()
    assert facts["model"] == str(model_folder)
    assert facts["context_length"] == CONTEXT
    assert len(facts["digest"]) == 32


def test_documents_of_the_same_name_get_different_ones(read, book, tmp_path) -> None:
    for folder in ("one/x", "two/x", "three"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.txt").write_text(f"river {folder}")
    read(tmp_path / "one/x", tmp_path / "two/x", tmp_path / "three/a.txt")
    assert MemoryBank.load(book).segments == ("x/a.txt", "two/x/a.txt", "a.txt")


def test_a_title_beside_the_text_is_read_with_it(read, book, tmp_path, model_folder) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps({"title": "Bridge", "text": "stone"}))
    read(tmp_path / "lines.jsonl")
    tokens = AutoTokenizer.from_pretrained(model_folder)("Bridge\n\nstone")["input_ids"]
    assert MemoryBank.load(book).length(segment="lines.jsonl:1") == len(tokens)


def test_a_special_token_in_a_text_is_plain_text(read, book, tmp_path) -> None:
    (tmp_path / "x.txt").write_text("<|end|>")
    read(tmp_path / "x.txt")
    assert MemoryBank.load(book).length() == len("<|end|>")  # no merges: the tokenizer's training has no such letters


def test_documents_begin_with_a_token_if_the_tokenizer_says_so(read, book, texts, model_folder) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    read(texts / "b.txt")
    plain = MemoryBank.load(book)
    tokenizer.bos_token = "<|end|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", tokenizer.bos_token_id)]
    )
    read(texts / "b.txt", tokenizer=tokenizer)
    bank = MemoryBank.load(book)
    assert bank.length() == plain.length() + 1
    # Layer 1's first value depends on the first token alone.
    wanted = load_long_model(model_folder, **SETTINGS).read([tokenizer.bos_token_id])
    torch.testing.assert_close(bank.values(1)[:, :1], wanted.values(1), atol=1e-5, rtol=1e-5)


# ---- once more -------------------------------------------------------------------------------------------------------


def test_only_what_is_new_or_changed_is_read_again(read, book, texts) -> None:
    read(texts)
    before = tensors(book)
    (texts / "b.txt").write_text(sentence(7, 20))
    (texts / "g.txt").write_text("silver letter")
    report = read(texts)
    assert (report.added, report.replaced, report.unchanged, report.removed) == (1, 1, 4, 0)
    after = tensors(book)
    assert list(after) == [*before, "texts/g.txt"]
    assert report.tokens == after["texts/b.txt"][0].shape[1] + after["texts/g.txt"][0].shape[1]
    assert not same({"": before.pop("texts/b.txt")}, {"": after.pop("texts/b.txt")})
    del after["texts/g.txt"]
    assert same(before, after)


def test_nothing_new_leaves_the_file_alone(read, book, texts) -> None:
    read(texts)
    before = book.stat()
    report = read(texts / "b.txt", texts)
    assert (report.unchanged, report.tokens, report.tokens_per_second) == (5, 0, 0)
    assert (book.stat().st_ino, book.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_what_is_not_named_stays(read, book, texts) -> None:
    read(texts / "a.txt")
    report = read(texts / "b.txt")
    assert MemoryBank.load(book).segments == ("a.txt", "b.txt")
    assert (report.added, report.documents) == (1, 2)


def test_settings_and_model_of_a_memory_need_not_be_said_again(read, book, texts) -> None:
    read(texts / "a.txt")
    nothing = dict.fromkeys(("model", *SETTINGS))
    assert read(texts / "b.txt", **nothing).added == 1
    assert MemoryBank.load(book).layers == (1,)


def test_lines_that_moved_are_known_again(read, book, tmp_path) -> None:
    lines = [json.dumps({"text": sentence(i, 6 + i)}) for i in range(4)]
    file = tmp_path / "lines.jsonl"
    file.write_text("\n".join(lines))
    read(file)
    before = tensors(book)
    new = json.dumps({"text": "winter window"})
    file.write_text("\n".join([new, lines[3], lines[0], lines[1]]))
    report = read(file)
    assert (report.added, report.replaced, report.unchanged, report.removed) == (1, 0, 3, 1)
    after = tensors(book)
    moved = {"lines.jsonl:2": "lines.jsonl:4", "lines.jsonl:3": "lines.jsonl:1", "lines.jsonl:4": "lines.jsonl:2"}
    assert set(after) == {*moved, "lines.jsonl:1"}
    assert same({name: after[name] for name in moved}, {name: before[old] for name, old in moved.items()})
    assert MemoryBank.load(book).describe("lines.jsonl:2")["source"] == f"{file}:2"


def test_a_folder_that_was_moved_is_known_again(read, book, texts, tmp_path) -> None:
    read(texts)
    before = tensors(book)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(texts, tmp_path / "elsewhere" / "texts")
    report = read(tmp_path / "elsewhere" / "texts")
    assert (report.unchanged, report.added, report.tokens) == (5, 0, 0)
    assert same(before, tensors(book))
    source = MemoryBank.load(book).describe("texts/a.txt")["source"]
    assert source == str(tmp_path / "elsewhere" / "texts" / "a.txt")


# ---- stopped runs ----------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from llamory.reading import partial, reading
from llamory.reading.progress import ReadingBar

partial.SAVE_EVERY = partial._SHARE = 0
windows = 0

def advance(self, name, tokens):
    global windows
    windows += 1
    if windows == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)

ReadingBar.advance = advance
reading.read_documents_into(
    sys.argv[1], sys.argv[2], model=sys.argv[3], mem_layers=[1], context_length=16, mem_dtype="float32"
)
"""


def test_a_killed_run_goes_on_and_ends_as_if_in_one_go(read, book, texts, model_folder) -> None:
    arguments = [str(book), str(texts), str(model_folder), "8"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not book.exists()
    with pytest.raises(LlamoryError, match=r"isn't finished.*book\.partial"):
        reading.Book(book)
    report = read(texts)
    assert report.resumed > CONTEXT
    assert report.tokens + report.resumed == report.memory_tokens
    resumed = tensors(book)
    assert sorted(path.name for path in book.parent.iterdir()) == ["book", "texts"]
    book.unlink()
    assert read(texts).resumed == 0
    assert same(resumed, tensors(book))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("windows", [1, 3, 4, 6, 9, 12])
def test_a_run_stopped_anywhere_loses_no_whole_window(read, book, texts, monkeypatch, dtype, windows) -> None:
    (texts / "f.txt").write_text(sentence(3, 150))
    monkeypatch.setattr(passes, "ROWS_TOGETHER", 1)  # so that a window is a step
    read(texts, mem_dtype=dtype)
    wanted = tensors(book, dtype)
    book.unlink()
    seen = []

    def stop(self, rows, banks):
        if len(seen) == windows:
            # Within a window: its first layers have it, the others don't.
            banks[0].append(1, torch.zeros(2, 3, 8), torch.zeros(2, 3, 8))
            raise KeyboardInterrupt
        seen.extend(map(len, rows))
        window(self, rows, banks)

    window = reading._Reading._window
    monkeypatch.setattr(reading._Reading, "_window", stop)
    with pytest.raises(KeyboardInterrupt):
        read(texts, mem_dtype=dtype)
    assert not book.exists()
    monkeypatch.setattr(reading._Reading, "_window", window)
    report = read(texts, mem_dtype=dtype)
    assert report.resumed == sum(seen)
    assert same(tensors(book, dtype), wanted)


def test_a_stopped_run_leaves_the_memory_and_other_documents_alone(read, book, texts, monkeypatch) -> None:
    read(texts / "a.txt")
    before = book.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(reading._Reading, "_read_long", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            read(texts / "c.txt", texts / "more" / "d.txt")
    assert book.read_bytes() == before
    # c is finished but not asked for now: it waits beside.
    assert read(texts / "b.txt").resumed == 0
    assert MemoryBank.load(book).segments == ("a.txt", "b.txt")
    assert MemoryBank.load(reading.partial_path(book)).segments == (str(texts / "c.txt"),)
    report = read(texts / "c.txt")
    assert (report.tokens, report.added) == (0, 1)
    assert report.resumed == MemoryBank.load(book).length(segment="c.txt")
    assert not reading.partial_path(book).exists()


def test_a_document_that_changed_since_the_stop_is_read_anew(read, book, texts, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(reading._Reading, "_read_long", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            read(texts)
    (texts / "c.txt").write_text("market morning")
    changed = read(texts).resumed
    found = tensors(book)
    assert changed == sum(found[f"texts/{name}.txt"][0].shape[1] for name in ("a", "more/e"))
    book.unlink()
    read(texts)
    for name, parts in tensors(book).items():
        torch.testing.assert_close(found[name], parts, atol=1e-5, rtol=1e-5)


def test_saving_takes_a_small_part_of_the_time(monkeypatch, tmp_path, model_folder) -> None:
    now, saved = [0.0], []
    monkeypatch.setattr(partial, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    kept = partial.Partial(tmp_path / "p", load_long_model(model_folder, **SETTINGS), None)
    kept._saved, kept._cost = 0.0, 2.0
    monkeypatch.setattr(kept, "save", lambda: saved.append(now[0]))
    for now[0] in (10.0, 39.0, 41.0):
        kept.save_if_due()
    assert saved == [41.0]
    for now[0] in (50.0, 61.0):
        kept.save_if_due(within=True)
    assert saved == [41.0, 61.0]


# ---- what is wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture
def refused(read, book, texts):
    """The sentence with which reading is refused; the memory must stay as it is."""
    read(texts / "a.txt")
    before = {path: path.read_bytes() for path in book.parent.iterdir() if path.is_file()}

    def run(*paths, **settings) -> str:
        with pytest.raises(LlamoryError) as error:
            read(*paths, **settings)
        assert {path: path.read_bytes() for path in book.parent.iterdir() if path.is_file()} == before
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


def test_an_empty_document_among_others_is_passed_over(read, book, texts, caplog) -> None:
    for name in ("empty.txt", "more/blank.html"):
        (texts / name).write_text("" if name == "empty.txt" else "<p></p>")
    with caplog.at_level(logging.WARNING):
        read(texts / "empty.txt", texts / "a.txt", texts / "more")
    assert [record.getMessage() for record in caplog.records if record.name.startswith("llamory")] == [
        f"Passed over {texts / 'empty.txt'}: it is empty.",
        f"Passed over {texts / 'more' / 'blank.html'}: it is empty.",
    ]
    assert MemoryBank.load(book).segments == ("a.txt", "more/d.txt", "more/e.txt")


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


def test_layers_that_do_not_exist_and_contexts_too_long_are_refused(read, book, texts) -> None:
    with pytest.raises(LlamoryError, match="layer 7, but the model has 2 layers"):
        read(texts, mem_layers=[0, 7])
    with pytest.raises(LlamoryError, match="context is 2048"):
        read(texts, context_length=4096)
    with pytest.raises(LlamoryError, match="no memory layers"):
        read(texts, mem_layers=[])
    assert [path.name for path in book.parent.iterdir()] == ["texts"]


def test_a_damaged_memory_is_refused_and_stays(read, book, texts) -> None:
    read(texts)
    for damaged in (book.read_bytes()[:-100], book.read_bytes()[:-4] + b"abcd", b"river"):
        book.write_bytes(damaged)
        with pytest.raises(LlamoryError, match="book"):
            read(texts)
        assert book.read_bytes() == damaged


def test_a_partial_file_of_another_model_is_refused(read, book, texts, other_model) -> None:
    read(texts / "a.txt", model=other_model)
    book.rename(reading.partial_path(book))
    with pytest.raises(LlamoryError, match=r"book\.partial was made by another model.*remove that file"):
        read(texts / "a.txt")
    assert not book.exists()


def test_a_damaged_partial_file_is_refused(read, book, texts) -> None:
    read(texts)
    part = reading.partial_path(book)
    book.rename(part)
    part.write_bytes(part.read_bytes()[:-4] + b"abcd")
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

    monkeypatch.setattr(reading._Reading, "_window", short)
    message = refused(texts)
    assert "too little memory" in message
    assert "int8" in message


def test_too_little_memory_for_the_weights_is_said_too(refused, texts, monkeypatch) -> None:
    def short(*_, **__):
        try:
            raise RuntimeError("unable to mmap 9 bytes: Cannot allocate memory (12)")
        except RuntimeError as error:
            raise LlamoryError("The weights can't be read.") from error

    monkeypatch.setattr(reading, "load_model_for", short)
    assert "too little memory" in refused(texts)


def test_memory_is_asked_for_before_the_system_ends_the_process(refused, texts, monkeypatch) -> None:
    monkeypatch.setattr(room, "available", lambda: room.RESERVE - 1)
    assert "too little memory" in refused(texts)


def test_other_errors_are_not_taken_for_too_little_memory(read, texts, monkeypatch) -> None:
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(reading._Reading, "_window", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        read(texts)


def test_a_disk_too_small_is_said_before_reading(refused, texts, monkeypatch) -> None:
    monkeypatch.setattr(reading.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    assert "free some space" in refused(texts)


def test_two_runs_at_once_are_refused(read, book, texts) -> None:
    with FileLock(book.with_name(".book.lock")), pytest.raises(LlamoryError, match="Another run"):
        read(texts)
    assert not book.exists()
    read(texts)


def test_a_folder_in_place_of_the_memory_is_refused(read, book, texts) -> None:
    book.mkdir()
    with pytest.raises(LlamoryError, match="is a folder"):
        read(texts)


def test_available_memory_is_within_the_machines(monkeypatch, tmp_path) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < room.available() <= machine
    for name, text in {"max": "5000", "current": "4000", "stat": "anon 3000\ninactive_file 700"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(room, "_GROUP", tmp_path)
    assert room.available() == 1700

"""`llamory read`, `ask` and `info` together: from texts to a memory to an answer, for people and as JSON."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llamory.memory import MemoryBank
from processes import heed_interrupts


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "rivers.txt").write_text("silver river " * 20)
    (folder / "bridges.md").write_text("# On bridges\n\nA stone bridge.")
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    return tmp_path / "book"


@pytest.fixture
def read(llamory, book, model_folder):
    def run(*arguments: object):
        settings = ("--model", model_folder, "--mem-layers", "0-1", "--context-length", "16")
        return llamory("read", *arguments, "--memory", book, *settings)

    return run


def test_read_says_what_it_did(read, llamory, texts, book) -> None:
    ran = read(texts, "--quiet")
    assert (ran.code, ran.err) == (0, "")
    first, second = ran.out.splitlines()
    assert first.startswith(f"{book}: 2 added, 0 replaced, 0 unchanged, 0 removed; ")
    assert first.endswith(" tokens/s.")
    assert second.startswith("It holds 2 documents, ")
    (texts / "rivers.txt").write_text("golden river")
    again = json.loads(llamory("read", texts, "--memory", book, "--json").out)
    counts = {key: again[key] for key in ("added", "replaced", "unchanged", "removed", "documents")}
    assert counts == {"added": 0, "replaced": 1, "unchanged": 1, "removed": 0, "documents": 2}
    assert again["memory"] == str(book)
    assert again["memory_tokens"] == MemoryBank.load(book).length()
    assert again["tokens_per_second"] > 0


def test_read_shows_speed_and_time_left(read, texts, monkeypatch) -> None:
    monkeypatch.setattr("llamory.common.progress.SECONDS_BETWEEN_LINES", 0.0)
    lines = [line for line in read(texts).err.splitlines() if "tokens/s" in line]
    assert lines
    assert lines[-1].startswith("Reading texts/rivers.txt: ")
    assert lines[-1].endswith(" tokens/s, 0:00 remaining")


def test_info_says_what_a_memory_holds(read, llamory, texts, book, model_folder) -> None:
    read(texts, "--mem-dtype", "int8")
    facts = json.loads(llamory("info", book, "--json").out)
    bank = MemoryBank.load(book)
    assert facts["model"] == str(model_folder)
    assert facts["mem_layers"] == [0, 1]
    assert facts["mem_dtype"] == "int8"
    assert facts["context_length"] == 16
    assert facts["bytes"] == book.stat().st_size
    assert facts["tokens"] == bank.length()
    assert [(each["name"], each["tokens"], each["title"]) for each in facts["documents"]] == [
        ("texts/bridges.md", bank.length(segment="texts/bridges.md"), "On bridges"),
        ("texts/rivers.txt", bank.length(segment="texts/rivers.txt"), "rivers"),
    ]
    shown = llamory("info", book).out
    for line in ("documents       2", "memory layers   0-1", "memory dtype    int8"):
        assert line in shown
    assert "texts/bridges.md  On bridges" in shown


def test_ask_needs_no_more_than_the_memory(read, llamory, texts, book) -> None:
    read(texts)
    ran = llamory("ask", "which river", "--memory", book, "--max-new-tokens", "5", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    answer = json.loads(llamory("ask", "which river", "--memory", book, "--max-new-tokens", "5", "--json").out)
    assert answer["question"] == "which river"
    assert answer["documents"] == ["texts/bridges.md", "texts/rivers.txt"]
    assert answer["memory_tokens"] == MemoryBank.load(book).length()
    assert 0 < answer["seconds_to_first_token"] <= answer["seconds"]
    printable = "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in answer["answer"])
    assert ran.out.strip() == printable.strip()


def test_ask_takes_several_memories_and_chosen_documents(read, llamory, texts, book) -> None:
    read(texts)
    other = book.with_name("other")
    assert llamory("read", texts / "rivers.txt", "--memory", other, "--model", _model_of(book)).code == 0
    mixed = llamory("ask", "which", "--memory", book, "--memory", other)
    assert mixed.code == 2  # other was read in all default layers and windows
    chosen = llamory("ask", "which", "--memory", book, "--document", "bridges.md", "--max-new-tokens", "2", "--json")
    assert json.loads(chosen.out)["documents"] == ["texts/bridges.md"]


def _model_of(book: Path) -> str:
    bank = MemoryBank.load(book)
    return str(bank.metadata(bank.segments[0])["model"])


def test_ask_focuses_as_it_is_told(read, llamory, texts, book, monkeypatch) -> None:
    read(texts)
    monkeypatch.setattr("llamory.qa.evidence.question_likelihoods", lambda *_: torch.tensor([-9.0, -3.0]))
    for evidence_ratio, documents in (
        ([], 1),
        (["--evidence-ratio", "500"], 2),
        (["--evidence-ratio", "0"], 2),
        (["--evidence-ratio", "400"], 1),
    ):
        ran = llamory("ask", "which river", "--memory", book, "--max-new-tokens", "2", "--json", *evidence_ratio)
        answer = json.loads(ran.out)
        assert (len(answer["evidence_documents"]), len(answer["documents"])) == (documents, 2)
        assert (answer["evidence_tokens"] < answer["memory_tokens"]) == (documents == 1)


def test_streaming_reaches_the_reader_before_the_end(read, texts, book, monkeypatch, llamory) -> None:
    """Each piece is flushed, so that a pipe has it at once."""
    read(texts)
    flushed = []

    class Out:
        encoding = "ascii"

        def write(self, text: str) -> None:
            flushed.append(text)

        def flush(self) -> None:
            flushed.append(None)

    from llamory.cli.output import write_printable

    write_printable(Out(), "Ein Fluß\x1b[31m\n")  # type: ignore[arg-type]
    assert flushed == ["Ein Flu? [31m\n", None]


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def refused(ran, *words: str) -> None:
    assert (ran.code, ran.out) == (2, "")
    told = [line for line in ran.err.splitlines() if line.startswith("Error: ")]
    assert told == ran.err.splitlines()[-1:]
    for word in words:
        assert word in told[0]


def test_wrong_input_is_one_sentence_and_code_2(read, llamory, texts, book, make_other) -> None:
    read(texts)
    before = book.read_bytes()
    (texts / "empty.txt").write_text("")
    ask = ("ask", "which river", "--memory", book)
    refused(llamory("read", texts / "empty.txt", "--memory", book), "empty.txt is empty")
    refused(llamory("read", texts, "--memory", book, "--max-tokens", "8"), "bridges.md has 12 tokens", "limit of 8")
    refused(llamory("read", texts, "--memory", book, "--model", make_other), "made by another model")
    refused(llamory("read", texts, "--memory", book.with_name("new"), "--mem-layers", "0,9", "--model", make_other))
    refused(llamory("read", texts, "--memory", book, "--mem-layers", "a-3"), "--mem-layers", "6,12,18 or 5-29")
    refused(llamory("read", texts / "none.txt", "--memory", book), "none.txt")
    refused(llamory(*ask, "--model", make_other), "made by another model")
    refused(llamory(*ask, "--last-context-length", "99"), "last_context_length is 99", "16")
    refused(llamory(*ask, "--max-question-tokens", "2"), "limit of 2")
    refused(llamory(*ask, "--document", "none.txt"), "none.txt", "texts/rivers.txt")
    refused(llamory("ask", "", "--memory", book), "blank")
    refused(llamory(*ask, "--evidence-ratio", "0.5"), "must be at least 1, or 0", "0.5")
    assert book.read_bytes() == before
    assert sorted(path.name for path in book.parent.iterdir() if path.suffix != ".lock") == ["book", "texts"]
    book.write_bytes(before[:-20])
    refused(llamory(*ask), "cut short")
    refused(llamory("info", book), "cut short")
    refused(llamory("read", texts, "--memory", book), "cut short")
    assert book.read_bytes() == before[:-20]
    refused(llamory("info", texts / "rivers.txt"), "not a memory file")


@pytest.fixture
def make_other(tmp_path_factory, model_folder) -> Path:
    """A model of the same shape with other weights, and the same tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("other")
    model = LlamaForCausalLM.from_pretrained(model_folder)
    torch.nn.init.normal_(model.model.layers[1].self_attn.v_proj.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    return folder


def test_an_empty_document_among_others_is_told(read, texts, book, caplog) -> None:
    (texts / "empty.txt").write_text("")
    assert read(texts).code == 0
    assert f"Skipped {texts / 'empty.txt'}: it is empty." in caplog.text
    assert len(MemoryBank.load(book).segments) == 2


@pytest.mark.slow
def test_ctrl_c_leaves_the_memory_and_keeps_what_was_read(texts, book, model_folder) -> None:
    (texts / "long.txt").write_text("silver river winter " * 30000)
    arguments = ("--model", model_folder, "--context-length", "16")
    command = [sys.executable, "-m", "llamory", "read", texts, "--memory", book, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=heed_interrupts,
    )
    partial, until = book.with_name("book.partial"), time.monotonic() + 60
    while not partial.exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert (out, err.splitlines()[-1]) == ("", "Interrupted.")
    assert sorted(path.name for path in book.parent.iterdir()) == [".book.lock", "book.partial", "texts"]
    assert str(texts / "bridges.md") in MemoryBank.load(partial).segments


def test_read_lists_links_that_lead_out(read, texts, tmp_path, book, llamory) -> None:
    (tmp_path / "secret.txt").write_text("the safe opens with 4417")
    (texts / "todo.txt").symlink_to(tmp_path / "secret.txt")
    out = read(texts, "--quiet").out
    assert "1 skipped:" in out
    assert f"{texts / 'todo.txt'}: a link that leads out of the given folders" in out
    assert "todo.txt" not in llamory("info", book).out

"""`llamory ask` and `llamory chat`, and memories that `llamory index` precomputes."""

import io
import json
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer

from llamory.cli.ask import share_bar
from llamory.memory import MemoryBank

READING = ("--mem-layers", "0-1", "--context-length", "16")
SHORT = ("--max-new-tokens", "5")


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Path:
    """A model whose vectors count a few words."""
    import numpy as np
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["silver", "stone", "winter"]
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0} | {w: i for i, w in enumerate(words, 1)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.vstack([np.zeros(len(words)), np.eye(len(words))]).astype(np.float32)
    folder = tmp_path_factory.mktemp("embedder")
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture
def texts(tmp_path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "rivers.md").write_text("# Rivers\n\nsilver river in the morning\n\n# Harbours\n\nsilver candle market\n")
    (folder / "bridges.txt").write_text("stone bridge in the forest\n")
    return folder


@pytest.fixture
def library(tmp_path, texts, embedder, llamory, model_folder) -> str:
    made = llamory(
        "index", texts, "--library", tmp_path / "lib", "--model", embedder, "--reader", model_folder, *READING
    )
    assert made.code == 0, made.err
    return str(tmp_path / "lib")


@pytest.fixture
def typed(monkeypatch):
    def lines(*questions: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{question}\n" for question in questions)))

    return lines


# ---- ask -------------------------------------------------------------------------------------------------------------


def test_an_answer_comes_with_bars_and_places(llamory, library, texts) -> None:
    ran = llamory("ask", "the silver river", "--library", library, "--top-documents", "1", *SHORT, "--quiet")
    assert (ran.code, ran.err) == (0, "")
    answer, cited = ran.out.rstrip("\n").rsplit("\n\n", 1)
    found = json.loads(
        llamory("ask", "the silver river", "--library", library, "--top-documents", "1", *SHORT, "--json").out
    )
    assert "".join(c if c.isprintable() or c in "\n\t" else " " for c in found["answer"]).strip() == answer.strip()
    assert len(found["citations"]) == len(cited.splitlines())
    for line, citation in zip(cited.splitlines(), found["citations"], strict=True):
        assert line.startswith(share_bar(citation["share"]))
        assert f"{citation['share']:>4.0%}  {citation['location']}" in line
    assert {each["location"] for each in found["citations"]} <= {f"{texts}/rivers.md:1", f"{texts}/rivers.md:5"}


def test_json_has_the_numbers(llamory, library, texts, model_folder) -> None:
    ran = llamory("ask", "silver", "--library", library, *SHORT, "--json")
    found = json.loads(ran.out)
    assert (found["library"], found["model"]) == (library, str(model_folder))
    assert found["documents"] == [f"{texts}/rivers.md", f"{texts}/bridges.txt"]
    assert sum(each["share"] for each in found["citations"]) == pytest.approx(1)
    assert set(found["citations"][0]) == {"location", "share", "attention", "source", "title", "line", "text"}
    assert found["tokens_read"] > 0
    times = [found[f"seconds_to_{what}"] for what in ("find", "attach", "first_token")] + [found["seconds"]]
    assert all(time > 0 for time in times)


def test_documents_are_picked_by_hand(llamory, library, texts) -> None:
    ran = llamory("ask", "silver", "--library", library, "--document", "bridges", *SHORT, "--json")
    assert json.loads(ran.out)["documents"] == [f"{texts}/bridges.txt"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "either --library DIR or --memory FILE"),
        (("--library", "lib", "--memory", "book"), "either --library DIR or --memory FILE"),
        (("--memory", "book", "--top-documents", "3"), "--top-documents goes with --library"),
        (("--memory", "book", "--mem-dtype", "int8"), "--mem-dtype goes with --library"),
        (("--library", "nowhere"), "There is no library at nowhere"),
    ],
)
@pytest.mark.parametrize("verb", [("ask", "why"), ("chat",)])
def test_what_is_wrong_is_one_sentence(llamory, tmp_path, monkeypatch, verb, arguments, words) -> None:
    monkeypatch.chdir(tmp_path)
    ran = llamory(*verb, *arguments)
    assert (ran.code, ran.out) == (2, "")
    assert words in ran.err
    assert len(ran.err.splitlines()) == 1


def test_unknown_documents_are_one_sentence(llamory, library) -> None:
    ran = llamory("ask", "why", "--library", library, "--document", "none")
    assert (ran.code, ran.out) == (2, "")
    assert "no document none" in ran.err.splitlines()[-1]


def test_bars_are_as_long_as_their_shares() -> None:
    assert [len(share_bar(share).strip()) for share in (0, 0.5, 1)] == [0, 6, 12]
    assert [share_bar(share).strip() for share in (0.25, 0.26, 0.27)] == ["███", "███▏", "███▎"]
    assert share_bar(0.5, "ascii") == "######      "


# ---- memory ahead ----------------------------------------------------------------------------------------------------


def test_memory_is_read_ahead_within_a_budget(llamory, tmp_path, texts, embedder, model_folder) -> None:
    index = ("index", texts, "--library", tmp_path / "lib", "--model", embedder, "--precompute-memory")
    ran = llamory(*index, "--reader", model_folder, *READING, "--mem-dtype", "int8", "--json", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    memory = json.loads(ran.out)["memory"]
    assert (memory["read"], memory["existing"], memory["remaining"]) == (2, 0, 0)
    files = list((tmp_path / "lib" / "memory").glob("*.safetensors"))
    assert memory["bytes"] == sum(path.stat().st_size for path in files)
    assert all(MemoryBank.load(path).dtype.itemsize == 1 for path in files)
    again = llamory(*index)  # the reader is known
    assert "Memory: 0 read, 2 existing; 0 tokens read" in again.out
    for path in files:
        path.unlink()
    assert "0 read, 0 existing, 2 left because the budget is full" in llamory(*index, "--memory-budget", "1kB").out
    wrong = llamory(*index, "--memory-budget", "much")
    assert wrong.code == 2
    assert "10GB" in wrong.err


# ---- chat ------------------------------------------------------------------------------------------------------------


def test_a_piped_chat_reads_as_a_dialogue(llamory, library, typed) -> None:
    typed("the silver river", "", "stone", "/quit", "never asked")
    ran = llamory("chat", "--library", library, *SHORT, "--citations", "1", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    assert [line for line in ran.out.splitlines() if line.startswith("> ")] == ["> the silver river", "> stone"]
    assert ran.out.count("%  ") == 2


def test_a_chat_as_json_is_one_document(llamory, library, typed) -> None:
    typed("the silver river", "stone")
    found = json.loads(llamory("chat", "--library", library, *SHORT, "--json", "--top-documents", "1").out)
    assert [turn["question"] for turn in found["turns"]] == ["the silver river", "stone"]
    assert [len(turn["documents"]) for turn in found["turns"]] == [1, 2]


def test_a_chat_with_a_memory_file_can_be_kept(llamory, texts, tmp_path, model_folder, typed) -> None:
    book = tmp_path / "book"
    llamory("read", texts, "--memory", book, "--model", model_folder, *READING)
    typed("the silver river", "stone")
    ran = llamory("chat", "--memory", book, *SHORT, "--json", "--save", book)
    assert [len(turn["documents"]) for turn in json.loads(ran.out)["turns"]] == [2, 2]
    assert MemoryBank.load(book).segments == ("texts/bridges.txt", "texts/rivers.md", "conversation")
    asked = json.loads(llamory("ask", "stone", "--memory", book, *SHORT, "--json").out)
    assert asked["documents"][-1] == "conversation"


def test_a_byte_that_is_not_utf_8_is_replaced_and_the_chat_goes_on(llamory, library, monkeypatch) -> None:
    lines = io.BytesIO(b"the silver river\nWer ist Frau M\xfcller?\nstone\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(lines, encoding="utf-8", errors="surrogateescape"))
    found = json.loads(llamory("chat", "--library", library, *SHORT, "--json").out)
    assert [turn["question"] for turn in found["turns"]] == ["the silver river", "Wer ist Frau M\ufffdller?", "stone"]


def test_a_chat_ends_with_its_input(llamory, library, typed) -> None:
    typed()
    ran = llamory("chat", "--library", library, "--quiet")
    assert (ran.code, ran.out) == (0, "")
    typed()
    assert json.loads(llamory("chat", "--library", library, "--json").out)["turns"] == []


def test_somebody_at_the_keyboard_is_told_and_goes_on(llamory, library, monkeypatch) -> None:
    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("sys.stdin", Keyboard("why is it that this question is so long\nstone\n"))
    ran = llamory("chat", "--library", library, *SHORT, "--max-question-tokens", "16")
    assert ran.code == 0
    assert "limit of 16" in ran.err
    assert "/quit" in ran.err
    assert ran.out.count("%  ") >= 1

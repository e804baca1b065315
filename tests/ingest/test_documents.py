"""A document is read as its passages joined, and every token belongs to one of them."""

import json
import logging
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llamory.documents import Chunk
from llamory.ingest.documents import StoredDocument
from llamory.longllama.loading import load_long_model
from llamory.memory import MemoryBank
from small_texts import SETTINGS


def document(*texts: str, title: str = "") -> StoredDocument:
    return StoredDocument("a.md", tuple(Chunk(text, "a.md", title, i + 1) for i, text in enumerate(texts)))


@pytest.fixture(scope="module")
def tokenizer(model_folder):
    return AutoTokenizer.from_pretrained(model_folder)


def test_passages_are_joined_and_the_title_goes_first() -> None:
    assert document("one", "two", title="Top").chunk_texts == ["Top\n\none\n\n", "two"]
    assert document("# Top\n\none", "two", title="Top").chunk_texts == ["# Top\n\none\n\n", "two"]
    assert document("one").chunk_texts == ["one"]


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=5),
    with_prefix=st.booleans(),
)
def test_every_token_is_of_the_passage_that_its_text_is_of(tokenizer, texts, with_prefix) -> None:
    prefix_ids = [0] if with_prefix else []
    found = document(*texts)
    tokens = found.tokenize(tokenizer, prefix_ids)
    assert tokens.starts[0] == len(prefix_ids)
    assert tokens.ids[: len(prefix_ids)].tolist() == prefix_ids
    parts = [tokens.ids[a:b] for a, b in pairwise([*tokens.starts, len(tokens.ids)])]
    # A byte-level token may stand over an edge only within the blank lines between passages.
    assert [tokenizer.decode(part).strip("\n") for part in parts] == [
        text.strip("\n") for text in tokenize_alone(found, tokenizer)
    ]


def tokenize_alone(found, tokenizer) -> list[str]:
    return [tokenizer.decode(tokenizer(text, split_special_tokens=True)["input_ids"]) for text in found.chunk_texts]


def test_a_special_token_that_is_spelt_out_is_plain_text(tokenizer) -> None:
    tokens = document("a<|end|>b").tokenize(tokenizer)
    assert tokenizer.eos_token_id not in tokens.ids.tolist()


def test_the_digest_changes_with_text_title_and_chunks_and_with_nothing_else() -> None:
    digests = [
        document("one", "two").digest,
        document("one", "twos").digest,
        document("one\n\ntwo").digest,
        document("one", "two", title="Top").digest,
    ]
    assert len(set(digests)) == len(digests)
    elsewhere = StoredDocument("b.md", tuple(Chunk(text, "b.md", "", 9) for text in ("one", "two")))
    assert elsewhere.digest == digests[0]


# ---- documents of files ----------------------------------------------------------------------------------------------


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

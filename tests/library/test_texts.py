"""A document is read as its passages joined, and every token belongs to one of them."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llamory.documents import Chunk
from llamory.ingest.stored_documents import StoredDocument, tokenized


def document(*texts: str, title: str = "") -> StoredDocument:
    return StoredDocument("a.md", tuple(Chunk(text, "a.md", title, i + 1) for i, text in enumerate(texts)))


@pytest.fixture(scope="module")
def tokenizer(reader_folder):
    return AutoTokenizer.from_pretrained(reader_folder)


def test_passages_are_joined_and_the_title_goes_first() -> None:
    assert document("one", "two", title="Top").pieces == ["Top\n\none\n\n", "two"]
    assert document("# Top\n\none", "two", title="Top").pieces == ["# Top\n\none\n\n", "two"]
    assert document("one").pieces == ["one"]


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(min_size=1, max_size=30).filter(str.strip), min_size=1, max_size=5), marks=st.booleans())
def test_every_token_is_of_the_passage_that_its_text_is_of(tokenizer, texts, marks) -> None:
    begins = [0] if marks else []
    found = document(*texts)
    reading = tokenized(found, tokenizer, begins)
    assert reading.starts[0] == len(begins)
    assert reading.ids[: len(begins)].tolist() == begins
    parts = [reading.ids[a:b] for a, b in pairwise([*reading.starts, len(reading.ids)])]
    # A byte-level token may stand over an edge only within the blank lines between passages.
    assert [tokenizer.decode(part).strip("\n") for part in parts] == [
        piece.strip("\n") for piece in tokenized_alone(found, tokenizer)
    ]


def tokenized_alone(found, tokenizer) -> list[str]:
    return [tokenizer.decode(tokenizer(piece, split_special_tokens=True)["input_ids"]) for piece in found.pieces]


def test_a_special_token_that_is_spelt_out_is_plain_text(tokenizer) -> None:
    reading = tokenized(document("a<|end|>b"), tokenizer, [])
    assert tokenizer.eos_token_id not in reading.ids.tolist()


def test_the_key_changes_with_text_title_cut_and_reader_and_with_nothing_else() -> None:
    keys = [
        document("one", "two").key("reader"),
        document("one", "twos").key("reader"),
        document("one\n\ntwo").key("reader"),
        document("one", "two", title="Top").key("reader"),
        document("one", "two").key("another"),
    ]
    assert len(set(keys)) == len(keys)
    elsewhere = StoredDocument("b.md", tuple(Chunk(text, "b.md", "", 9) for text in ("one", "two")))
    assert elsewhere.key("reader") == keys[0]

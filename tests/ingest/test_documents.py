"""A document is read as its passages joined, and every token belongs to one of them."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from llamory.documents import Chunk
from llamory.ingest.documents import StoredDocument


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

"""The benchmark of asking gives documents of the lengths that it says, and compares what it should."""

import ask
from llamory.ingest.documents import StoredDocument
from llamory.models.base import load_tokenizer


def test_documents_have_about_the_tokens_that_are_said(model_folder) -> None:
    library = ask.StubLibrary("nowhere", 300, 3, str(model_folder))
    assert len(library.sources()) == 3
    tokenizer, found = load_tokenizer(model_folder), library.passages_of(library.sources())
    for source in library.sources():
        tokens = StoredDocument(source, tuple(found[source])).tokenize(tokenizer)
        assert abs(len(tokens.ids) - 300) < 15
        assert all(passage.text.strip() for passage in found[source])


def test_the_spread_is_the_longest_documents_time_over_the_shortest_ones() -> None:
    way = "(c) mounting, pages, open"
    rows = [
        {"way": way, "tokens_each": tokens, "median": time} for tokens, time in ((4000, 9.0), (1000, 2.0), (16000, 3.0))
    ]
    rows += [{"way": "(b) reading, pages", "tokens_each": 1000, "median": 7.0}, {"way": way, "tokens_each": 1}]
    assert ask._spread(rows) == {way: 1.5}

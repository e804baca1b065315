"""benchmarks/ask.py: lengths of the documents, and the spread of times."""

import ask
from llamory.ingest.documents import StoredDocument
from llamory.models.base import load_tokenizer


def test_documents_have_the_requested_length(model_folder) -> None:
    library = ask.StubLibrary("nowhere", 300, 3, str(model_folder))
    assert len(library.sources()) == 3
    tokenizer, found = load_tokenizer(model_folder), library.passages_of(library.sources())
    for source in library.sources():
        tokens = StoredDocument(source, tuple(found[source])).tokenize(tokenizer)
        assert abs(len(tokens.ids) - 300) < 15
        assert all(passage.text.strip() for passage in found[source])


def test_spread_is_the_time_ratio_of_longest_to_shortest() -> None:
    way = "(c) mounting, pages, open"
    rows = [
        {"way": way, "tokens_each": tokens, "median": time} for tokens, time in ((4000, 9.0), (1000, 2.0), (16000, 3.0))
    ]
    rows += [{"way": "(b) reading, pages", "tokens_each": 1000, "median": 7.0}, {"way": way, "tokens_each": 1}]
    assert ask._spread(rows) == {way: 1.5}

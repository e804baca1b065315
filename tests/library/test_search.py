"""Search by words agrees with a plain BM25, fused search with reciprocal ranks summed by hand."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from llamory.errors import LlamoryError
from llamory.library import Library

TEXTS = {
    "a.txt": "the cat likes the river more than the dog does",
    "b.txt": "a dog, a dog and another dog",
    "c.txt": "quarterly figures of money in the bank",
    "d.txt": "the river bank is where figures of cats were seen by a cat",
    "e.txt": "subprocess.getoutput(command) runs snake_case commands",
    "f.txt": "図書館で猫を見た",
}


@pytest.fixture
def library(tmp_path, model_folder) -> Library:
    docs = tmp_path / "docs"
    docs.mkdir()
    for name, text in TEXTS.items():
        (docs / name).write_text(text)
    library = Library(tmp_path / "library", model_folder)
    library.add(docs, progress=False)
    return library


def found(library: Library, query: str, **settings) -> list[str]:
    return [Path(hit.source).name for hit in library.search(query, **settings)]


def plain_bm25(query: list[str], texts: dict[str, list[str]], k1: float = 1.2, b: float = 0.75) -> dict[str, float]:
    """The formula of Robertson and Zaragoza (2009), with the idf that is never negative."""
    mean = sum(map(len, texts.values())) / len(texts)
    scores = {}
    for name, words in texts.items():
        counts, score = Counter(words), 0.0
        for word in query:
            holding = sum(word in other for other in texts.values())
            idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
            score += idf * counts[word] * (k1 + 1) / (counts[word] + k1 * (1 - b + b * len(words) / mean))
        if score:
            scores[name] = score
    return scores


def test_words_are_ranked_as_by_plain_bm25(tmp_path, model_folder):
    # Words that have no other form, so that stems need no rule here.
    words = [f"q{letter}x" for letter in "abcdefghij"]
    draw = np.random.default_rng(0)
    texts = {f"{i:02}.txt": list(draw.choice(words, draw.integers(3, 40))) for i in range(40)}
    for name, chosen in texts.items():
        (tmp_path / name).write_text(" ".join(chosen))
    library = Library(tmp_path / "library", model_folder)
    library.add(tmp_path, progress=False)
    for query in (["qax"], ["qbx", "qcx"], ["qdx", "qex", "qfx"]):
        expected = plain_bm25(query, texts)
        hits = library.search(" ".join(query), top=40, mode="bm25")
        scores = {Path(hit.source).name: hit.score for hit in hits}
        assert scores.keys() == expected.keys()
        assert [hit.score for hit in hits] == sorted(scores.values(), reverse=True)
        ranked = sorted(expected, key=lambda name: -expected[name])
        assert [scores[name] for name in ranked] == pytest.approx([expected[name] for name in ranked], rel=0.02)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("dogs", ["b.txt", "a.txt"]),  # stems
        ("getoutput", ["e.txt"]),  # parts of names in code
        ("snake", ["e.txt"]),
        ("猫", ["f.txt"]),  # a language without spaces
        ("図書館", ["f.txt"]),
        ("the", []),  # in every English text
        ("zebra", []),
        ('"dog" AND (bank OR ~x*', ["b.txt", "a.txt", "c.txt", "d.txt"]),  # no language of queries
    ],
)
def test_words_are_found(library, query, expected):
    assert sorted(found(library, query, mode="bm25")) == sorted(expected)


def test_words_are_found_without_a_model(library, monkeypatch):
    from llamory.embedding import pipeline as retriever

    monkeypatch.setattr(retriever, "load_embedder", None)
    hit = Library(library.path).search("bank figures", mode="bm25", top=1)[0]
    assert Path(hit.source).name in ("c.txt", "d.txt")
    assert hit.bm25 == hit.score and hit.cosine is None


def test_fused_search_sums_reciprocal_ranks(library):
    query = "the cat at the bank with money"
    ranks = [
        {hit.source: rank for rank, hit in enumerate(library.search(query, top=99, mode=mode), 1)}
        for mode in ("dense", "bm25")
    ]
    assert ranks[0].keys() != ranks[1].keys()
    expected = {source: sum(1 / (60 + r[source]) for r in ranks if source in r) for source in ranks[0] | ranks[1]}
    hits = library.search(query, top=99, mode="fused")
    assert {hit.source: hit.score for hit in hits} == pytest.approx(expected, abs=1e-7)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    dense = {hit.source: hit.score for hit in library.search(query, top=99, mode="dense")}
    assert {hit.source: hit.cosine for hit in hits if hit.cosine is not None} == pytest.approx(dense)
    words = {hit.source: hit.score for hit in library.search(query, top=99, mode="bm25")}
    assert {hit.source: hit.bm25 for hit in hits if hit.bm25 is not None} == pytest.approx(words)


def test_fused_search_works_if_no_word_is_found(library):
    assert found(library, "zebra the", mode="fused") == found(library, "zebra the", mode="dense")


@pytest.mark.parametrize("mode", ["dense", "bm25", "fused"])
def test_every_search_can_be_limited_to_sources(library, mode):
    query = "cat dog river money bank"
    assert set(found(library, query, mode=mode, source="docs/*")) >= {"a.txt", "b.txt", "c.txt", "d.txt"}
    assert found(library, query, mode=mode, source="b.txt") == ["b.txt"]
    assert set(found(library, query, mode=mode, source=["b.txt", "*c.txt"])) == {"b.txt", "c.txt"}
    assert found(library, query, mode=mode, source="none") == []


def test_new_words_are_found_at_once(tmp_path, library):
    (tmp_path / "docs" / "new.txt").write_text("a walrus")
    library.add(tmp_path / "docs", progress=False)
    assert found(library, "walrus", mode="bm25") == ["new.txt"]
    library.remove(tmp_path / "docs" / "new.txt")
    assert found(library, "walrus", mode="bm25") == []


def test_equal_passages_come_in_the_order_of_their_places(tmp_path, model_folder):
    library = Library(tmp_path / "library", model_folder)
    for name in "cadb":
        (tmp_path / f"{name}.txt").write_text("the very same cat")
        library.add(tmp_path / f"{name}.txt", progress=False)
    for mode in ("dense", "bm25", "fused"):
        assert found(library, "cat", mode=mode, top=3) == ["a.txt", "b.txt", "c.txt"]


def test_an_unknown_search_is_refused(library):
    with pytest.raises(LlamoryError, match=r"no search 'sparse'; it should be one of dense, bm25, fused"):
        library.search("cat", mode="sparse")


# ---- odd queries and numbers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "bm25", "fused"])
@pytest.mark.parametrize("top", [len(TEXTS), 10**6, 2**31, 2**63, 99999999999999999999])
def test_a_number_of_hits_beyond_the_passages_gives_all(library, mode, top):
    query = "cat dog river money bank"
    assert found(library, query, mode=mode, top=top) == found(library, query, mode=mode, top=99)


@pytest.mark.parametrize("mode", ["dense", "bm25", "fused"])
@pytest.mark.parametrize("query", ["\udce6\udcb8\udca9", "cat \udcff\udcfe"])
def test_a_query_that_is_no_unicode_is_named(library, mode, query):
    with pytest.raises(LlamoryError, match=r"The query is not valid Unicode text at character \d"):
        library.search(query, mode=mode)


@pytest.mark.parametrize("mode", ["dense", "bm25", "fused"])
@pytest.mark.parametrize("query", ["\0", "'", '"', "\\", "[a-", "(", "%", "{}", "cat\0dog", "🐈" * 9, "a" * 100_000])
def test_odd_queries_find_something_or_nothing(library, mode, query):
    library.search(query, mode=mode)


@pytest.mark.parametrize("source", ["(", "[a-", "\\", "'; DROP TABLE", "\0"])
def test_odd_sources_match_nothing(library, source):
    assert found(library, "cat", source=source) == []


def test_a_source_that_is_no_unicode_is_named(library):
    with pytest.raises(LlamoryError, match="The source is not valid Unicode"):
        library.search("cat", source="caf\udce9")

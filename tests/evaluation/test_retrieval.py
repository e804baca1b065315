"""Rankings, metrics and bootstrap intervals, compared with formulas and other libraries."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamory.errors import LlamoryError
from llamory.evaluation import retrieval
from llamory.evaluation.qrels import RetrievalDataset, sample
from llamory.evaluation.retrieval import differences, interval, score_queries, search_bm25, search_vectors, summarize


def make_set(queries: dict[str, str], qrels: dict[str, dict[str, int]], documents: dict[str, str], **more):
    return RetrievalDataset("made up", "test", queries, qrels, list(documents), lambda: iter(documents.items()), **more)


def ranked(*ids: str) -> list[tuple[str, float]]:
    return [(key, 1.0 - rank / 1000) for rank, key in enumerate(ids)]


def numbers(count: int) -> dict[str, str]:
    return {f"d{number}": f"text {number}" for number in range(count)}


def test_scores_are_those_of_the_formulas() -> None:
    qrels = {"a": {"d2": 1}, "b": {"d0": 2, "d3": 1}, "c": {"d150": 1}, "d": {"d11": 1}, "e": {"d1": 1}}
    data = make_set(dict.fromkeys(qrels, "?"), qrels, numbers(200))
    whole = ranked(*data.ids)[:100]
    found = {"a": whole, "b": [whole[1], whole[0], whole[3]], "c": whole, "d": whole}  # e found nothing
    scores = {score.query: score for score in score_queries(data, found)}
    log = math.log2
    ideal = 2 / log(2) + 1 / log(3)
    expected = {
        "a": (1 / log(4), 1 / 3, 1),
        "b": ((2 / log(3) + 1 / log(4)) / ideal, 1 / 2, 1),
        "c": (0, 0, 0),
        "d": (0, 0, 1),  # in place 12
        "e": (0, 0, 0),
    }
    for query, values in expected.items():
        assert list(scores[query].values.values()) == pytest.approx(values, abs=1e-6), query
    assert list(scores) == list(qrels)
    assert scores["b"].found == ["d1", "d0", "d3"]
    assert list(scores["a"].values) == ["nDCG@10", "MRR@10", "Recall@100"]
    assert summarize(list(scores.values()))["MRR@10"] == pytest.approx((1 / 3 + 1 / 2) / 5)


def test_a_document_judged_0_is_not_relevant() -> None:
    data = make_set({"a": "?"}, {"a": {"d0": 0, "d1": 1}}, numbers(3))
    (score,) = score_queries(data, {"a": ranked("d0", "d1")})
    assert score.values["MRR@10"] == 0.5


def test_the_interval_of_a_fraction_is_that_of_the_binomial_distribution() -> None:
    values = [1.0] * 30 + [0.0] * 70
    low, high = interval(values)
    deviation = math.sqrt(0.3 * 0.7 / 100)
    assert (low, high) == pytest.approx((0.3 - 1.96 * deviation, 0.3 + 1.96 * deviation), abs=0.015)
    assert interval([0.4] * 5) == pytest.approx([0.4, 0.4])
    assert interval([0.4]) is None


def test_differences_are_of_the_same_queries() -> None:
    qrels = {f"q{number}": {f"d{number}": 1} for number in range(40)}
    data = make_set(dict.fromkeys(qrels, "?"), qrels, numbers(40))
    right = {query: ranked(*judged) for query, judged in qrels.items()}
    second = {query: ranked("d99", *judged) for query, judged in qrels.items()}
    scores = {name: score_queries(data, found) for name, found in {"one": right, "two": second}.items()}
    (gap,) = differences(scores)
    assert (gap["model"], gap["minus"]) == ("one", "two")
    assert gap["MRR@10"] == pytest.approx(0.5)
    # Each query differs by the same, so that the interval has no width, however the queries are drawn.
    assert gap["intervals"]["MRR@10"] == pytest.approx([0.5, 0.5])


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_search_in_chunks_is_sorting_all(data) -> None:
    documents = data.draw(st.integers(1, 30), "documents")
    seed = data.draw(st.integers(0, 9999), "seed")
    chance = np.random.default_rng(seed)
    # Few different values, so that many documents tie.
    queries, vectors = chance.integers(-1, 2, (3, 2)), chance.integers(-1, 2, (documents, 2))
    texts = {f"{chance.integers(10**9)}-{number}": str(number) for number in range(documents)}
    asked = {f"q{number}": str(number) for number in range(3)}
    judged = make_set(asked, {query: {"x": 1} for query in asked}, texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "CHUNK", data.draw(st.integers(1, 31), "chunk"))
        patch.setattr(retrieval, "_QUERY_BATCH", data.draw(st.integers(1, 4), "rows"))
        patch.setattr(retrieval, "DEPTH", data.draw(st.integers(1, 8), "depth"))
        found = search_vectors(
            judged,
            lambda given: queries[list(map(int, given))],
            lambda given: vectors[list(map(int, given))],
            lambda one, other: one @ other.T,
        )
        depth = retrieval.DEPTH
    for query, row in zip(asked, queries @ vectors.T, strict=True):
        pairs = sorted(zip(row.tolist(), texts, strict=True), reverse=True)
        assert [(score, key) for key, score in found[query]] == pairs[:depth]


def test_a_query_that_is_a_document_does_not_find_itself() -> None:
    documents = {"q": "x", "other": "x", "third": "y"}
    data = make_set({"q": "x"}, {"q": {"other": 1}}, documents, self_documents=frozenset({"q"}))
    similar = search_vectors(data, np.array, np.array, lambda one, other: (one[:, None] == other) * 1.0)
    assert [key for key, _ in similar["q"]] == ["other", "third"]


def test_empty_documents_and_vectors_that_are_no_numbers_are_never_found() -> None:
    documents = {"a": "1", "b": "  ", "c": "nan", "d": "2"}
    data = make_set({"q": "1"}, {"q": {"a": 1}}, documents)
    embedded: list[str] = []

    def embed(texts: list[str]) -> np.ndarray:
        embedded.extend(texts)
        return np.array([[float(text)] for text in texts])

    found = search_vectors(data, embed, embed, lambda one, other: one @ other.T)
    assert [key for key, _ in found["q"]] == ["d", "a"]
    assert embedded == ["1", "1", "nan", "2"]


def plain_bm25(query: list[str], document: list[str], corpus: list[list[str]]) -> float:
    """Lucene's BM25 with k1 = 1.5 and b = 0.75, up to the factor k1 + 1 that it leaves out."""
    mean = sum(map(len, corpus)) / len(corpus)
    total = 0.0
    for word in query:
        holders = sum(word in each for each in corpus)
        if holders:
            rarity = math.log(1 + (len(corpus) - holders + 0.5) / (holders + 0.5))
            count = document.count(word)
            total += rarity * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
    return total


def test_bm25_is_the_formula_and_words_that_nothing_shares_find_nothing() -> None:
    documents = {
        "a": "river stone river",
        "b": "stone bridge garden letter",
        "c": "winter",
        "d": "garden river",
        "e": "",
    }
    queries = {"one": "River, the stone!", "two": "zebra", "three": "", "four": "garden zebra"}
    data = make_set(queries, {query: {"a": 1} for query in queries}, documents)
    found = search_bm25(data)
    corpus = [text.split() for text in documents.values()]
    for query, words in {"one": ["river", "stone"], "four": ["garden"]}.items():
        scores = {key: plain_bm25(words, text.split(), corpus) for key, text in documents.items()}
        expected = {key: score for key, score in scores.items() if score > 0}
        assert dict(found[query]) == pytest.approx(expected, rel=1e-5)
        assert [key for key, _ in found[query]] == sorted(expected, key=expected.__getitem__, reverse=True)
    assert found["two"] == found["three"] == []


def test_bm25_of_documents_without_words_finds_nothing() -> None:
    data = make_set({"q": "cat"}, {"q": {"a": 1}}, {"a": "", "b": "the of"})
    assert search_bm25(data) == {"q": []}


def test_a_sample_keeps_what_is_relevant_and_is_the_same_in_any_order() -> None:
    qrels = {f"q{number}": {f"d{number}": 1, f"d{number + 50}": 0} for number in range(20)}
    queries = {query: f"text of {query}" for query in qrels}
    data = make_set(queries, qrels, numbers(200))
    small = sample(data, queries=5, documents=30)
    assert len(small.queries) == len(small.qrels) == 5
    assert len(small.ids) == 30 and dict(small.read()) == {key: numbers(200)[key] for key in small.ids}
    assert {f"d{query[1:]}" for query in small.queries} <= set(small.ids)
    turned = make_set(
        dict(reversed(queries.items())), dict(reversed(qrels.items())), dict(reversed(numbers(200).items()))
    )
    again = sample(turned, queries=5, documents=30)
    assert (dict(again.queries), set(again.ids)) == (dict(small.queries), set(small.ids))
    assert sample(data).queries == data.queries
    with pytest.raises(LlamoryError, match="20 queries in the split test, not 21"):
        sample(data, queries=21)
    with pytest.raises(LlamoryError, match="20 documents are relevant to the 20 queries, more than the 19"):
        sample(data, documents=19)


def test_scores_are_those_of_another_library() -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    chance = np.random.default_rng(0)
    documents = numbers(150)
    qrels = {
        f"q{number}": {f"d{key}": 1 for key in chance.choice(150, chance.integers(1, 6), replace=False)}
        for number in range(60)
    }
    queries = dict.fromkeys(qrels, "?")
    similarity = chance.normal(size=(60, 150))
    data = make_set(queries, qrels, documents)
    found = search_vectors(
        data,
        lambda texts: np.arange(len(texts)),
        lambda texts: np.array([int(text.split()[1]) for text in texts]),
        lambda one, other: similarity[np.ix_(one, other)],
    )
    ours = summarize(score_queries(data, found))
    evaluator = InformationRetrievalEvaluator(
        queries,
        documents,
        {query: set(judged) for query, judged in qrels.items()},
        precision_recall_at_k=[100],
    )
    hits = [
        [{"corpus_id": key, "score": score} for key, score in zip(documents, row, strict=True)] for row in similarity
    ]
    theirs = evaluator.compute_metrics(hits)
    assert ours["nDCG@10"] == pytest.approx(theirs["ndcg@k"][10], abs=1e-6)
    assert ours["MRR@10"] == pytest.approx(theirs["mrr@k"][10], abs=1e-6)
    assert ours["Recall@100"] == pytest.approx(theirs["recall@k"][100], abs=1e-6)

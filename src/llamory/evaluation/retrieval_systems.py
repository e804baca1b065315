"""The best documents for each query: by vectors or by BM25, over a corpus that is read in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from llamory.evaluation.qrels import RetrievalDataset

if TYPE_CHECKING:
    import numpy as np
    import torch

DEPTH = 100  # documents per query; the deepest metric is Recall@100
CHUNK = 10_000  # documents whose texts and vectors are held at a time
_QUERY_BATCH = 256  # queries whose scores of a chunk are held at a time

Ranking = Mapping[str, Sequence[tuple[str, float]]]
"""Under each query's id the found documents' ids and scores, best first."""

Embed = Callable[[list[str]], "np.ndarray"]
Similarity = Callable[["np.ndarray", "np.ndarray"], "torch.Tensor"]
Advance = Callable[[int], None]


def search_vectors(
    data: RetrievalDataset,
    embed_queries: Embed,
    embed_documents: Embed,
    similarity: Similarity,
    advance: Advance = lambda _: None,
) -> Ranking:
    """The documents most similar to each query.

    No more than 10,000 documents' texts and vectors are held at a time. Documents without text are never found.

    Args:
        data: queries and documents.
        embed_queries: makes vectors (texts, dimension).
        embed_documents: the same for documents.
        similarity: scores (queries, documents) of vectors.
        advance: is told how many documents were embedded.
    """
    import numpy as np

    best = _TopDocuments(data)
    vectors = embed_queries(list(data.queries.values()))
    for chunk in _chunks(data.read(), CHUNK):
        texts = {key: text for key, text in chunk if text.strip()}
        if texts:
            documents = embed_documents(list(texts.values()))
            for start in range(0, len(vectors), _QUERY_BATCH):
                scores = np.asarray(similarity(vectors[start : start + _QUERY_BATCH], documents))
                best.add(start, list(texts), np.nan_to_num(scores, nan=-np.inf))
        advance(len(chunk))
    return best.ranking()


def search_bm25(data: RetrievalDataset, advance: Advance = lambda _: None) -> Ranking:
    """The documents with the highest BM25 score (bm25s: Lucene's variant, k1 1.5, b 0.75, English stop words dropped).

    Documents without a word of the query aren't found.
    """
    import bm25s
    import numpy as np
    from bm25s.tokenization import Tokenizer

    best = _TopDocuments(data)
    tokenizer = Tokenizer(stopwords="english")
    counted_texts = _count_texts((text for _, text in data.read()), advance)
    tokens = list(tokenizer.streaming_tokenize(counted_texts, allow_empty=False))
    if not any(tokens):
        return best.ranking()
    index = bm25s.BM25()
    index.index((tokens, tokenizer.get_vocab_dict()), show_progress=False)
    query_tokens = tokenizer.streaming_tokenize(data.queries.values(), update_vocab=False, allow_empty=False)
    for row, words in enumerate(query_tokens):
        if words:
            scores = index.get_scores_from_ids(words)
            best.add(row, data.ids, np.where(scores > 0, scores, -np.inf)[None])
    return best.ranking()


class _TopDocuments:
    """The best documents so far, per query; of equal scores the greater id is better, as in trec_eval."""

    def __init__(self, data: RetrievalDataset) -> None:
        self.data = data
        self.names = list(data.queries)
        self.found: list[list[tuple[float, str]]] = [[] for _ in self.names]

    def add(self, start: int, ids: Sequence[str], scores: np.ndarray) -> None:
        """Take up scores (queries, documents) of the queries from `start` on; minus infinity is not found."""
        import numpy as np

        kept = min(DEPTH + 1, scores.shape[1])  # one more, as a query's self_documents document may have to go
        worst = np.partition(scores, -kept, axis=1)[:, -kept]
        for row, (line, threshold) in enumerate(zip(scores, worst, strict=True), start):
            # All that tie with the last place are looked at: which of them is in must not depend on chance.
            candidates = np.flatnonzero(line >= threshold if np.isfinite(threshold) else np.isfinite(line))
            merged = self.found[row] + [(float(line[i]), ids[i]) for i in candidates.tolist()]
            self.found[row] = sorted(merged, reverse=True)[: DEPTH + 1]

    def ranking(self) -> Ranking:
        ranked = {}
        for query, found in zip(self.names, self.found, strict=True):
            self_documents = query if query in self.data.self_documents else None
            ranked[query] = [(key, score) for score, key in found if key != self_documents][:DEPTH]
        return ranked


def _chunks(pairs: Iterator[tuple[str, str]], size: int) -> Iterator[list[tuple[str, str]]]:
    while chunk := list(islice(pairs, size)):
        yield chunk


def _count_texts(texts: Iterator[str], advance: Advance) -> Iterator[str]:
    for text in texts:
        yield text
        advance(1)

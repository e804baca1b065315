"""Retrieval quality: rankings by vectors or BM25, scored by trec_eval with bootstrap intervals."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import combinations, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.extras import require
from llamory.common.io import write_json_lines
from llamory.common.progress import ProgressBar
from llamory.errors import LlamoryError
from llamory.evaluation.qrels import RetrievalDataset, load_beir, read_mteb, sample
from llamory.evaluation.results import ResultsFile, display_names

if TYPE_CHECKING:
    import numpy as np
    import torch
    from sentence_transformers import SentenceTransformer

METRICS = {"nDCG@10": "ndcg_cut_10", "MRR@10": "recip_rank", "Recall@100": "recall_100"}  # names of trec_eval
DEPTH = 100  # documents per query; the deepest metric is Recall@100
CHUNK = 10_000  # documents whose texts and vectors are in RAM at a time
CONFIDENCE = 0.95
BM25 = "BM25"
_NUM_SHOWN = 10  # documents in a query's line; MRR and nDCG use these
_QUERY_BATCH = 256  # queries whose scores of a chunk are in RAM at a time
_RESAMPLES, _RESAMPLE_BATCH = 10_000, 250  # in all, and in RAM at a time

Ranking = Mapping[str, Sequence[tuple[str, float]]]
"""For each query id, the ids and scores of the retrieved documents, best first."""
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
    """The documents most similar to each query; documents without text are never retrieved.

    The functions make vectors (texts, dimension) and from these scores (queries, documents); `advance` is called with
    the number of documents embedded.
    """
    import numpy as np

    best = _TopDocuments(data)
    vectors = embed_queries(list(data.queries.values()))
    documents = data.read()
    while chunk := list(islice(documents, CHUNK)):
        texts = {key: text for key, text in chunk if text.strip()}
        if texts:
            document_vectors = embed_documents(list(texts.values()))
            for start in range(0, len(vectors), _QUERY_BATCH):
                scores = np.asarray(similarity(vectors[start : start + _QUERY_BATCH], document_vectors))
                best.add(start, list(texts), np.nan_to_num(scores, nan=-np.inf))
        advance(len(chunk))
    return best.ranking()


def search_bm25(data: RetrievalDataset, advance: Advance = lambda _: None) -> Ranking:
    """The documents with the highest BM25 score (bm25s: Lucene, k1 1.5, b 0.75, English stop words removed)."""
    import bm25s
    import numpy as np
    from bm25s.tokenization import Tokenizer

    best = _TopDocuments(data)
    tokenizer = Tokenizer(stopwords="english")

    def texts() -> Iterator[str]:
        for _, text in data.read():
            yield text
            advance(1)

    tokens = list(tokenizer.streaming_tokenize(texts(), allow_empty=False))
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
    """The best documents so far for each query; ties are broken by the greater id, as in trec_eval."""

    def __init__(self, data: RetrievalDataset) -> None:
        self.data = data
        self.found: list[list[tuple[float, str]]] = [[] for _ in data.queries]

    def add(self, start: int, ids: Sequence[str], scores: np.ndarray) -> None:
        """Merge scores (queries, documents) of the queries from `start` on; minus infinity means not retrieved."""
        import numpy as np

        kept = min(DEPTH + 1, scores.shape[1])  # one more, since a query's own document may be removed
        worst = np.partition(scores, -kept, axis=1)[:, -kept]
        for row, (line, threshold) in enumerate(zip(scores, worst, strict=True), start):
            # Keep all ties with the last rank, so that the choice among them is deterministic.
            candidates = np.flatnonzero(line >= threshold if np.isfinite(threshold) else np.isfinite(line))
            merged = self.found[row] + [(float(line[i]), ids[i]) for i in candidates.tolist()]
            self.found[row] = sorted(merged, reverse=True)[: DEPTH + 1]

    def ranking(self) -> Ranking:
        ranked = {}
        for query, found in zip(self.data.queries, self.found, strict=True):
            excluded = query if query in self.data.self_documents else None
            ranked[query] = [(key, score) for score, key in found if key != excluded][:DEPTH]
        return ranked


@dataclass(frozen=True)
class QueryScore:
    """The metrics of the query with an id."""

    query: str
    values: Mapping[str, float]
    found: Sequence[str]  # ids of the best ten documents


def score_queries(data: RetrievalDataset, ranking: Ranking) -> list[QueryScore]:
    """The metrics of each query, computed by trec_eval; a query without results has 0."""
    require("eval")
    import pytrec_eval

    # Ranks instead of scores: trec_eval sorts again, and in its lower precision scores may tie.
    run = {query: {key: float(-rank) for rank, (key, _) in enumerate(found)} for query, found in ranking.items()}
    top_ten = {query: dict(list(found.items())[:10]) for query, found in run.items()}
    qrels = {query: dict(scores) for query, scores in data.qrels.items()}
    full_results = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    mrr_results = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top_ten)
    scores = []
    for query in data.queries:
        metrics = {**full_results.get(query, {}), **mrr_results.get(query, {})}
        values = {name: metrics.get(key, 0.0) for name, key in METRICS.items()}
        scores.append(QueryScore(query, values, [key for key, _ in ranking.get(query, ())[:_NUM_SHOWN]]))
    return scores


def summarize(scores: Sequence[QueryScore]) -> dict[str, Any]:
    """Means over queries and their 95% intervals (None for a single query)."""
    return _summarize({metric: [score.values[metric] for score in scores] for metric in METRICS})


def differences(scores: Mapping[str, Sequence[QueryScore]]) -> list[dict[str, Any]]:
    """For each pair of models, the mean difference over the same queries and its 95% interval."""
    entries = []
    for one, other in combinations(scores, 2):
        pairs = [(first.values, second.values) for first, second in zip(scores[one], scores[other], strict=True)]
        deltas = {metric: [first[metric] - second[metric] for first, second in pairs] for metric in METRICS}
        entries.append({"model": one, "minus": other, **_summarize(deltas)})
    return entries


def _summarize(by_metric: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    means = {metric: sum(values) / len(values) for metric, values in by_metric.items()}
    return {**means, "intervals": {metric: interval(values) for metric, values in by_metric.items()}}


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95% percentile bootstrap interval of a mean (10,000 resamples of seed 0); None for a single value."""
    if len(values) < 2:
        return None
    import numpy as np
    from scipy.stats import bootstrap

    data, settings = (np.asarray(values, dtype=float),), {"n_resamples": _RESAMPLES, "batch": _RESAMPLE_BATCH}
    rng = np.random.default_rng(0)
    result = bootstrap(data, np.mean, confidence_level=CONFIDENCE, method="percentile", rng=rng, **settings)
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]


class RetrievalResultsFile(ResultsFile[QueryScore]):
    """Results of several models: means in `retrieval.json`, one line per query and model in `queries.jsonl`."""

    evaluation = "retrieval"
    summary_keys = (*METRICS, "intervals", "seconds")

    def __init__(self, data: RetrievalDataset, folder: Path | None = None, per_query: Path | None = None) -> None:
        """Load the results in `folder`; None writes none. `per_query` is another file for the lines."""
        self.folder, self.per_query = folder, per_query
        self._queries = list(data.queries)
        self.seconds: dict[str, float] = {}  # of each model
        settings = {
            "data": data.name,
            "split": data.split,
            "queries": len(data.queries),
            "documents": len(data.ids),
            "relevant_documents_missing": data.missing_relevant,
            "queries_that_are_documents": len(data.self_documents),
            "fingerprint": data.fingerprint,
            "confidence": CONFIDENCE,
            "trec_eval": f"pytrec-eval-terrier {version('pytrec-eval-terrier')}",
        }
        super().__init__(None if folder is None else folder / "retrieval.json", settings)

    def document(self) -> dict[str, Any]:
        """The content of the file."""
        return super().document() | {"differences": differences(self.scores)}

    def write(self) -> None:
        """Write both files, the lines first: a model counts as scored when it is in the JSON file."""
        if self.folder is not None:
            write_json_lines(self.folder / "queries.jsonl", self._lines())
        super().write()
        if self.per_query is not None:
            write_json_lines(self.per_query, self._lines())

    def _lines(self) -> Iterator[dict[str, Any]]:
        for name, scores in self.scores.items():
            for score in scores:
                yield {"model": name, "query": score.query, **score.values, "found": list(score.found)}

    def _entries(self, name: str) -> dict[str, Any]:  # noqa: ARG002 (scores are in the lines)
        return {}

    def _summary(self, name: str) -> dict[str, Any]:
        return {**summarize(self.scores[name]), "seconds": self.seconds[name]}

    def _load(self, path: Path) -> dict[str, Any]:
        settings = super()._load(path)
        # A run that was interrupted between the two files has lines of too few queries.
        for name in [name for name, found in self.scores.items() if [score.query for score in found] != self._queries]:
            del self.scores[name], self.metadata[name]
        return settings

    def _load_scores(self, name: str, run: Mapping[str, Any]) -> list[QueryScore]:
        assert self.folder is not None
        self.seconds[name] = run["seconds"]
        with (self.folder / "queries.jsonl").open(encoding="utf-8") as file:
            return [
                QueryScore(entry["query"], {metric: entry[metric] for metric in METRICS}, entry["found"])
                for entry in map(json.loads, file)
                if entry["model"] == name
            ]


def read_dataset(data: str, split: str | None = None, *, ignore_identical_ids: bool = False) -> RetrievalDataset:
    """Read a BEIR folder or a task of mteb."""
    path = Path(data)
    if path.is_dir():
        return load_beir(path, split, ignore_identical_ids=ignore_identical_ids)
    if path.exists() or path.name != data or data.startswith("."):
        problem = f"{data} is a file" if path.exists() else f"There is no folder {data}"
        raise LlamoryError(f"{problem}; give a BEIR folder, or the name of an mteb task.")
    return read_mteb(data, split, ignore_identical_ids=ignore_identical_ids)


def mean_pooling_name(model: str) -> str:
    """The name in results of a model that embeds by mean pooling."""
    return f"mean of {model}"


def evaluate(
    data: str,
    models: Sequence[str],
    *,
    mean_pooling: Sequence[str] = (),
    bm25: bool = True,
    split: str | None = None,
    num_queries: int | None = None,
    num_documents: int | None = None,
    ignore_identical_ids: bool = False,
    max_length: int | None = None,
    query_prompt: str | None = None,
    bf16: bool = False,
    device: str | None = None,
    output: Path | None = None,
    per_query: Path | None = None,
) -> RetrievalResultsFile:
    """Score retrievers and BM25 on a dataset; existing results in `output` are resumed.

    Raises a LlamoryError if the data or a model can't be read, or the output has other results.

    Args:
        data: a BEIR folder, or the name of an mteb task, read as by `load_beir` and reduced as by `sample`.
        mean_pooling: models that embed by the mean of their last hidden states.
        max_length: tokens of a text that a model reads.
        output, per_query: as `folder` and `per_query` of `RetrievalResultsFile`.
    """
    from llamory.embedding import pipeline
    from llamory.embedding.encoder import embed_passages, embed_queries, fingerprint, is_llara
    from llamory.models.base import load_config

    for name in models:
        pipeline.check_embedder(name)
    for name in mean_pooling:
        load_config(name)
    dataset = sample(read_dataset(data, split, ignore_identical_ids=ignore_identical_ids), num_queries, num_documents)
    if per_query is not None and not per_query.parent.is_dir():
        raise LlamoryError(f"There is no folder {per_query.parent} for the per-query file.")
    results = RetrievalResultsFile(dataset, output, per_query)
    shown = display_names([*models, *mean_pooling])

    def score(name: str, title: str, metadata: Mapping[str, Any], search: Callable[[Advance], Ranking]) -> None:
        scores, started = results.run(name, metadata), time.perf_counter()
        if scores:  # of an earlier run
            return
        with ProgressBar(title, len(dataset.ids), unit="documents") as bar:
            scores += score_queries(dataset, search(bar.advance))
            results.seconds[name] = seconds = time.perf_counter() - started
            results.write()
            bar.print(f"{title}: nDCG@10 {summarize(scores)['nDCG@10']:.3f} ({seconds:.1f} s)")

    def score_embedder(name: str, title: str, embedder: SentenceTransformer) -> None:
        dtype, limit = "bfloat16" if bf16 else None, embedder.max_seq_length
        metadata = {
            "kind": "vectors",
            "fingerprint": fingerprint(embedder),
            "similarity": embedder.similarity_fn_name,
            "max_length": limit if limit is not None and math.isfinite(limit) else None,  # JSON has no infinity
            "bf16": bf16,
        }
        prompt = pipeline.query_prompt(embedder)
        metadata |= {} if prompt is None else {"query_prompt": prompt}

        def search(advance: Advance) -> Ranking:
            return search_vectors(
                dataset,
                lambda texts: embed_queries(embedder, texts, dtype=dtype),
                lambda texts: embed_passages(embedder, texts, advance, dtype=dtype),
                embedder.similarity,
            )

        score(name, title, metadata, search)

    if bm25:
        metadata = {"kind": "bm25", "library": f"bm25s {version('bm25s')}"}
        score(BM25, BM25, metadata, lambda advance: search_bm25(dataset, advance))
    limits = {} if max_length is None else {"max_length": max_length}
    for name in mean_pooling:
        embedder = pipeline.mean_embedder(name, device=device, **limits)
        score_embedder(mean_pooling_name(name), mean_pooling_name(shown[name]), embedder)
    for name in models:
        embedder = pipeline.load_embedder(name, max_length=max_length, device=device)
        if query_prompt is not None and is_llara(embedder):
            pipeline.set_query_prompt(embedder, query_prompt)
        score_embedder(name, shown[name], embedder)
    results.write()
    return results

"""How well documents were ranked: nDCG@10, MRR@10 and Recall@100 by trec_eval, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from llamory.common.extras import require
from llamory.evaluation.qrels import RetrievalDataset
from llamory.evaluation.retrieval_systems import Ranking

METRICS = ("nDCG@10", "MRR@10", "Recall@100")
NUM_SHOWN = 10  # documents that a query's line names; MRR and nDCG see these
CONFIDENCE = 0.95
_RESAMPLES = 10_000
_BATCH = 250  # resamples that are held at a time


@dataclass(frozen=True)
class QueryScore:
    """What one query found.

    Attributes:
        query: its id.
        values: of the metrics, by name.
        found: ids of the best ten documents.
    """

    query: str
    values: Mapping[str, float]
    found: Sequence[str]

    def line(self, model: str) -> dict[str, Any]:
        """As an object of the per-query file."""
        return {"model": model, "query": self.query, **self.values, "found": list(self.found)}


def score_queries(data: RetrievalDataset, ranking: Ranking) -> list[QueryScore]:
    """The metrics of each query, computed by trec_eval (through `pytrec_eval`); what found nothing has 0.

    nDCG takes the qrels' scores as gains, over the logarithm of rank + 1, as trec_eval and BEIR do.
    """
    require("eval")
    import pytrec_eval

    # Places, not scores: trec_eval sorts again, and in less digits two scores may be one.
    run = {query: {key: float(-rank) for rank, (key, _) in enumerate(found)} for query, found in ranking.items()}
    top_ten = {query: dict(list(found.items())[:10]) for query, found in run.items()}
    judged = {query: dict(scores) for query, scores in data.qrels.items()}
    full_results = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.100"}).evaluate(run)
    mrr_results = pytrec_eval.RelevanceEvaluator(judged, {"recip_rank"}).evaluate(top_ten)
    scores = []
    for query in data.queries:
        values = (
            full_results.get(query, {}).get("ndcg_cut_10", 0.0),
            mrr_results.get(query, {}).get("recip_rank", 0.0),
            full_results.get(query, {}).get("recall_100", 0.0),
        )
        found = [key for key, _ in ranking.get(query, ())[:NUM_SHOWN]]
        scores.append(QueryScore(query, dict(zip(METRICS, values, strict=True)), found))
    return scores


def summarize(scores: Sequence[QueryScore]) -> dict[str, Any]:
    """Means over queries and their 95% intervals (None for a single query)."""
    columns = {metric: [score.values[metric] for score in scores] for metric in METRICS}
    means = {metric: sum(values) / len(values) for metric, values in columns.items()}
    return {**means, "intervals": {metric: interval(values) for metric, values in columns.items()}}


def differences(scores: Mapping[str, Sequence[QueryScore]]) -> list[dict[str, Any]]:
    """For each two models, the mean difference over the same queries, and its 95% interval.

    An interval that doesn't hold 0 says that one is better, beyond what the choice of queries explains.
    """
    found = []
    for one, other in combinations(scores, 2):
        entry: dict[str, Any] = {"model": one, "minus": other, "intervals": {}}
        for metric in METRICS:
            pairs = zip(scores[one], scores[other], strict=True)
            deltas = [top_ten.values[metric] - second.values[metric] for top_ten, second in pairs]
            entry[metric] = sum(deltas) / len(deltas)
            entry["intervals"][metric] = interval(deltas)
        found.append(entry)
    return found


def interval(values: Sequence[float]) -> list[float] | None:
    """The 95% percentile bootstrap interval of a mean (10,000 resamples of seed 0); None for a single value."""
    if len(values) < 2:
        return None
    import numpy as np
    from scipy.stats import bootstrap

    result = bootstrap(
        (np.asarray(values, dtype=float),),
        np.mean,
        n_resamples=_RESAMPLES,
        batch=_BATCH,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return [float(result.confidence_interval.low), float(result.confidence_interval.high)]

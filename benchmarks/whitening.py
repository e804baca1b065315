"""How the vectors of LLARA embedders lie, and what whitening them would give: nDCG@10 on a BEIR folder.

    python benchmarks/whitening.py BEIR MODEL [MODEL ...] --texts UNLABELLED.jsonl [--split dev] [--json FILE]

Of each model, with the summary and with the prediction prompt for queries: as it is; centred, the mean of the queries
and that of the documents taken out; whitened with half the power (Su et al. 2021, arXiv:2103.15316, which uses all of
it), fitted on pieces of LLARA's own training text: the `input` of 256 long ones read as documents and 256 short ones
read as queries, each about their own mean. Nothing of the set itself goes into the last.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from transformers import logging

from llamory.evaluation.beir import read_beir
from llamory.evaluation.judged import RetrievalSet, sample
from llamory.evaluation.retrieval import score_queries
from llamory.evaluation.searching import search_vectors
from llamory.library.embedding import embed_passages, embed_queries
from llamory.llara.retriever import load_embedder, set_query_prompt

PIECES = 256
LONG, SHORT = 36, range(4, 15)  # words
POWER, SHRINKAGE = 0.5, 0.1


def ndcg(data: RetrievalSet, queries: np.ndarray, documents: np.ndarray) -> float:
    """Mean nDCG@10 of vectors (queries, dimension) and (documents, dimension) by their cosines."""

    def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other))
        return one @ other.T

    ranking = search_vectors(data, lambda _: queries, lambda _: documents, cosines)  # type: ignore[arg-type,return-value]
    return float(np.mean([score.values["nDCG@10"] for score in score_queries(data, ranking)]))


def whitening(pieces: np.ndarray) -> np.ndarray:
    """(dimension, dimension) what damps the directions in which centred pieces (pieces, dimension) differ most."""
    values, directions = np.linalg.eigh(pieces.T @ pieces / len(pieces))
    scale = (values + SHRINKAGE * values.mean()) ** (-POWER / 2)
    damped: np.ndarray = directions @ (scale[:, None] * directions.T)
    return damped


def measure(name: str, data: RetrievalSet, texts: list[str], max_length: int) -> dict[str, dict[str, float]]:
    """All figures of one model, by query prompt."""
    embedder = load_embedder(name, max_length=max_length)
    long = [text for text in texts if len(text.split()) >= LONG][:PIECES]
    short = [text for text in texts if len(text.split()) in SHORT][:PIECES]
    documents, long_vectors = (
        embed_passages(embedder, each, bf16=True) for each in ([text for _, text in data.read()], long)
    )
    found = {}
    for prompt in ("summary", "prediction"):
        set_query_prompt(embedder, prompt)
        queries, short_vectors = (
            embed_queries(embedder, each, bf16=True) for each in (list(data.queries.values()), short)
        )
        of_documents, of_queries = long_vectors.mean(0), short_vectors.mean(0)
        matrix = whitening(np.concatenate([long_vectors - of_documents, short_vectors - of_queries]))
        found[prompt] = {
            "plain": ndcg(data, queries, documents),
            "centred": ndcg(data, queries - queries.mean(0), documents - documents.mean(0)),
            "whitened": ndcg(data, (queries - of_queries) @ matrix, (documents - of_documents) @ matrix),
        }
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--split", default="dev")
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=160)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    data = sample(read_beir(options.data, options.split), options.queries, options.documents)
    texts = [json.loads(line)["input"] for line in options.texts.read_text(encoding="utf-8").splitlines()]
    results = {}
    for name in options.models:
        results[Path(name).name] = found = measure(name, data, texts, options.max_length)
        told = "; ".join(
            f"{prompt} {', '.join(f'{way} {value:.3f}' for way, value in ways.items())}"
            for prompt, ways in found.items()
        )
        print(f"{name}: {told}", flush=True)
    if options.json:
        settings = {"split": options.split, "queries": options.queries, "documents": options.documents}
        options.json.write_text(json.dumps(settings | {"models": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()

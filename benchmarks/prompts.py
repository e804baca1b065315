"""Which prompt suits queries, and which documents: nDCG@10 of a LLARA model for each kind of task, without a label.

    python benchmarks/prompts.py MODEL --set BEIR [--set ...] --texts UNLABELLED.jsonl [--json FILE]

Queries and documents are read with the summary or the prediction prompt, all four ways; each way has a whitening of its
own, fitted on passages of LLARA's training text and on their first words (embedding.whitening). The dev part of a
set is query_vectors, or its test part if it has no other.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import logging

from llamory.embedding.encoder import embed_queries
from llamory.embedding.pipeline import load_embedder, sample_passages, set_query_prompt
from llamory.embedding.whitening import Whitening, fit_whitening, pseudo_queries, whitening_router
from llamory.evaluation.qrels import RetrievalDataset, load_beir, sample
from llamory.llara.template import QUERY_PROMPTS
from whitening import arguments, ndcg, table


def load_dataset(folder: Path, queries: int, documents: int) -> RetrievalDataset:
    """The part of a set that is query_vectors."""
    part = "dev" if (folder / "dev").exists() else "test"
    data = load_beir(folder / part, part)
    return sample(data, min(queries, len(data.queries)), min(documents, len(data.ids)))


def apply_whitening(
    fitted: Whitening, prompt: str, queries: np.ndarray, documents: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Both kinds of vectors behind a whitening."""
    matrix = fitted.matrix.numpy()
    return (queries - fitted.query_centres[prompt].numpy()) @ matrix, (
        documents - fitted.document_centre.numpy()
    ) @ matrix


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("model")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    embedder = load_embedder(options.model, max_length=options.max_length)
    if whitening_router(embedder) is not None:
        del embedder[-1], embedder[-1]
    texts = sample_passages(options.model, options.texts, number=options.pieces)
    sets = {folder.name: load_dataset(folder, options.queries, options.documents) for folder in options.set}
    fitted: dict[str, dict[str, np.ndarray]] = {}
    query_vectors: dict[str, dict[str, np.ndarray]] = {}
    document_vectors: dict[str, dict[str, np.ndarray]] = {}
    for prompt in QUERY_PROMPTS:
        set_query_prompt(embedder, prompt)

        def read(inputs: list[str]) -> np.ndarray:
            return embed_queries(embedder, inputs, dtype="bfloat16")

        fitted[prompt] = {"documents": read(texts), "queries": read(pseudo_queries(texts))}
        query_vectors[prompt] = {name: read(list(data.queries.values())) for name, data in sets.items()}
        document_vectors[prompt] = {name: read([text for _, text in data.read()]) for name, data in sets.items()}
    results: dict[str, dict[str, float]] = {}
    for query in QUERY_PROMPTS:
        for document in QUERY_PROMPTS:
            parts = [torch.from_numpy(fitted[document]["documents"]), torch.from_numpy(fitted[query]["queries"])]
            whitening = fit_whitening(parts[0], {query: parts[1]})
            results[f"queries: {query}, documents: {document}"] = {
                name: ndcg(
                    data,
                    *apply_whitening(whitening, query, query_vectors[query][name], document_vectors[document][name]),
                )
                for name, data in sets.items()
            }
    if options.json:
        settings = {name: getattr(options, name) for name in ("queries", "documents", "pieces")}
        options.json.write_text(json.dumps(settings | {"ways": results}, indent=1) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()

"""What whitening gives LLARA embedders that were trained for longer and longer: nDCG@10 on BEIR folders.

    python benchmarks/whitening.py MODEL [MODEL ...] --set BEIR [--set ...] --texts UNLABELLED.jsonl [--json FILE]

Of each LLARA checkpoint or adapter, with the summary and with the prediction prompt for queries: its vectors as they
are; centred, the mean of the set's queries and that of its documents taken out, which nobody has in practice; and
whitened, fitted on passages of LLARA's training text (llamory.embedding.whitening), nothing of the set itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from transformers import logging

from llamory.embedding.encoder import embed_passages, embed_queries
from llamory.embedding.pipeline import fit_whitening_on_texts, load_embedder, sample_passages, set_query_prompt
from llamory.embedding.whitening import whitening_router
from llamory.evaluation.qrels import RetrievalDataset, load_beir, sample
from llamory.evaluation.retrieval import score_queries, search_vectors
from llamory.llara.template import QUERY_PROMPTS


def ndcg(data: RetrievalDataset, queries: np.ndarray, documents: np.ndarray) -> float:
    """Mean nDCG@10 of vectors (queries, dimension) and (documents, dimension) by their cosines."""

    def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other))
        return one @ other.T

    ranking = search_vectors(data, lambda _: queries, lambda _: documents, cosines)  # type: ignore[arg-type,return-value]
    return float(np.mean([score.values["nDCG@10"] for score in score_queries(data, ranking)]))


def measure(
    name: str, sets: dict[str, RetrievalDataset], texts: Path, pieces: int, max_length: int
) -> dict[str, float]:
    """All figures of one model, named by set, query prompt and what is done to the vectors."""
    embedder = load_embedder(name, max_length=max_length)
    if whitening_router(embedder) is not None:
        del embedder[-1], embedder[-1]
    whitening = fit_whitening_on_texts(name, sample_passages(name, texts, number=pieces), max_length=max_length)
    matrix, centre = whitening.matrix.numpy(), whitening.document_centre.numpy()
    found = {}
    for where, data in sets.items():
        documents = embed_passages(embedder, [text for _, text in data.read()], dtype="bfloat16")
        for prompt in QUERY_PROMPTS:
            set_query_prompt(embedder, prompt)
            queries = embed_queries(embedder, list(data.queries.values()), dtype="bfloat16")
            query_centre = whitening.query_centres[prompt].numpy()
            variants = {
                "plain": (queries, documents),
                "centred": (queries - queries.mean(0), documents - documents.mean(0)),
                "whitened": ((queries - query_centre) @ matrix, (documents - centre) @ matrix),
            }
            found |= {f"{where}, {prompt}, {way}": ndcg(data, *vectors) for way, vectors in variants.items()}
    return found


def dev_sets(folders: list[Path], queries: int, documents: int) -> dict[str, RetrievalDataset]:
    """The dev parts of folders of `llamory dataset`, drawn smaller by hash."""
    return {folder.name: sample(load_beir(folder / "dev", "dev"), queries, documents) for folder in folders}


def table(results: dict[str, dict[str, float]]) -> str:
    """The Markdown of it, a row per model."""
    headers = list(next(iter(results.values())))
    lines = ["| | " + " | ".join(headers) + " |", "|---" * (len(headers) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(f"{found[head]:.3f}" for head in headers) + " |" for name, found in results.items()
    ]
    return "\n".join(lines)


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser of what is measured on."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", type=Path, action="append", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--pieces", type=int, default=512)
    parser.add_argument("--queries", type=int, default=400)
    parser.add_argument("--documents", type=int, default=1000)
    parser.add_argument("--max-length", type=int, default=160)
    return parser


def main() -> None:
    """Measure, print, write."""
    parser = arguments(__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    sets = dev_sets(options.set, options.queries, options.documents)
    results = {}
    for name in options.models:
        results[Path(name).name] = measure(name, sets, options.texts, options.pieces, options.max_length)
        print(f"{name} measured", flush=True)
        if options.json:
            settings = {name: getattr(options, name) for name in ("queries", "documents", "pieces")}
            options.json.write_text(json.dumps(settings | {"models": results}, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()

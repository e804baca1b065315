"""Hard-negative mining before training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from sentence_transformers import SentenceTransformer

from llamory.common.io import write_text
from llamory.documents.readers import read_json_lines
from llamory.errors import LlamoryError
from llamory.training.pairs import Pairs
from llamory.training.run import user_errors
from llamory.training.settings import RetrieverSettings

MINED_FILE = "mined.jsonl"
_CANDIDATES_PER_NEGATIVE = 10


def add_mined_negatives(pairs: Pairs, embedder: SentenceTransformer, settings: RetrieverSettings, file: Path) -> Pairs:
    """Add mined negatives to the data; they are written to a file, and read from it if it exists.

    Args:
        pairs: the data.
        embedder: ranks the documents for each query.
        settings: `mine` and the settings that start with it.
        file: JSONL of `query`, `pos` and the mined `neg`.

    Raises:
        LlamoryError: a setting can't be used, or no negatives are found.
    """
    if not file.exists():
        _write(_mine(pairs, embedder, settings), pairs, file)
    mined = dict(entry for _, entry in read_json_lines(file, lambda entry: (entry["query"], entry["neg"])))
    return Pairs((each.with_negatives(mined.get(each.query, [])) for each in pairs.examples), pairs.documents)


def _mine(pairs: Pairs, embedder: SentenceTransformer, settings: RetrieverSettings) -> dict[str, list[str]]:
    """The negatives of each query that has any."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    answers = [(query, text) for query, texts in pairs.answers.items() for text in sorted(texts)]
    depth = settings.mine_depth or settings.mine_skip + _CANDIDATES_PER_NEGATIVE * settings.mine
    if not settings.quiet:
        message = f"Mining negatives for {len(pairs.answers)} queries among {len(pairs.documents)} documents"
        Console(file=sys.stderr).print(message, highlight=False, soft_wrap=True)
    lower = torch.autocast(embedder.device.type, torch.bfloat16, enabled=settings.bf16)
    with user_errors("These mining settings can't be used"), lower:
        found: Any = mine_hard_negatives(
            Dataset.from_dict({"query": [a[0] for a in answers], "positive": [a[1] for a in answers]}),
            embedder,
            corpus=pairs.documents,
            range_min=settings.mine_skip,
            range_max=depth,
            relative_margin=None if settings.mine_margin < 0 else settings.mine_margin,
            num_negatives=settings.mine,
            output_format="triplet",
            batch_size=settings.mini_batch,
            verbose=False,
        )
    mined: dict[str, dict[str, None]] = {}
    for query, negative in zip(found["query"], found["negative"], strict=True):
        mined.setdefault(query, {})[negative] = None
    if not mined:
        raise LlamoryError(
            "No hard negatives were found: all documents score too close to the positive. Set a lower mine_margin (-1 "
            "for none), or mine to 0."
        )
    return {query: list(negatives) for query, negatives in mined.items()}


def _write(mined: dict[str, list[str]], pairs: Pairs, file: Path) -> None:
    entries = [{"query": query, "pos": sorted(pairs.answers[query]), "neg": neg} for query, neg in mined.items()]
    write_text(file, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))

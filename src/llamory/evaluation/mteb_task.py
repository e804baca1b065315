"""Retrieval tasks of the mteb package (Muennighoff et al. 2022, arXiv:2210.07316), an optional extra, by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from llamory.errors import LlamoryError
from llamory.evaluation.qrels import RetrievalDataset, queries_with_qrels


def read_mteb(name: str, split: str | None = None, *, ignore_identical_ids: bool = False) -> RetrievalDataset:
    """Load a task's data, from the hub or from where it was loaded before.

    Args:
        name: of a retrieval task, such as "NFCorpus"; one of several subsets is named behind a colon, as "A:en".
        split: of its data; by default the one that mteb evaluates, "test" if splits are several.
        ignore_identical_ids: as for `read_beir`; a task that asks for it gets it anyway.

    Raises:
        LlamoryError: mteb isn't installed, it has no such retrieval task, or its data can't be loaded.
    """
    try:
        import mteb
        from mteb.abstasks import AbsTaskRetrieval
    except ImportError as error:
        raise LlamoryError(
            f"There is no folder {name}; if it is a task of mteb, install that first: pip install 'llamory[mteb]'."
        ) from error
    task_name, _, subset = name.partition(":")
    try:
        task: Any = mteb.get_task(task_name)
    except KeyError as error:
        raise LlamoryError(f"There is no folder {name}, and mteb has no such task{_suggestion(error)}.") from error
    if not isinstance(task, AbsTaskRetrieval):
        raise LlamoryError(f"The mteb task {name} is of the kind {task.metadata.type}; name a retrieval task.")
    try:
        task.load_data()
    except Exception as error:  # whatever the hub, the network or a loader script may raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LlamoryError(
            f"The data of the mteb task {name} can't be loaded, which needs the hub or a copy in its cache: {reason}."
        ) from error
    subset, split = _select_split(task, task_name, subset, split)
    return _to_dataset(
        task, name, subset, split, ignore_identical_ids=ignore_identical_ids or task.ignore_identical_ids
    )


def _suggestion(error: KeyError) -> str:
    """mteb's self_documents guess at what was meant."""
    _, found, guess = str(error.args[0]).partition("Did you mean: ")
    return f" (did you mean {guess.strip(chr(39) + '?')}?)" if found else ""


def _select_split(task: Any, name: str, subset: str, split: str | None) -> tuple[str, str]:
    subsets = list(task.dataset)
    if not subset and len(subsets) == 1:
        subset = subsets[0]
    if subset not in subsets:
        raise LlamoryError(
            f"Name one subset of the mteb task {name}, as {name}:{subsets[0]}; it has {_format_names(subsets)}."
        )
    splits = list(task.dataset[subset])
    if split is None:
        evaluated = [each for each in task.metadata.eval_splits if each in splits]
        split = "test" if "test" in evaluated else (evaluated or splits)[0]
    if split not in splits:
        raise LlamoryError(f"The mteb task {name} has no split {split!r}; it has {_format_names(splits)}.")
    return subset, split


def _format_names(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (" and more" if len(names) > 8 else "")


def _plain_texts(table: Any) -> bool:
    return "text" in table.column_names and (len(table) == 0 or isinstance(table[0]["text"], str))


def _to_dataset(task: Any, name: str, subset: str, split: str, *, ignore_identical_ids: bool) -> RetrievalDataset:
    data = task.dataset[subset][split]
    corpus, query_table = data["corpus"], data["queries"]
    if data.get("top_ranked"):
        raise LlamoryError(f"The mteb task {name} reorders given documents; name one that searches all of them.")
    if "instruction" in query_table.column_names or not all(_plain_texts(table) for table in (corpus, query_table)):
        raise LlamoryError(f"The mteb task {name} asks with instructions, or not about texts; name a plain text task.")
    queries = dict(zip(query_table["id"], query_table["text"], strict=True))
    qrels = {
        query: {key: int(score) for key, score in judged.items()} for query, judged in data["relevant_docs"].items()
    }
    judged_texts = queries_with_qrels(name, queries, qrels)
    ids = list(corpus["id"])
    self_documents = {key for key in ids if ignore_identical_ids and key in judged_texts and qrels[key].get(key, 0) < 1}

    def read() -> Iterator[tuple[str, str]]:
        for row in corpus:
            yield row["id"], f"{row.get('title') or ''} {row['text']}".strip()

    state = {"revision": task.metadata.revision, "judgements": qrels, "ids": len(ids)}
    return RetrievalDataset(
        name=name,
        split=split,
        queries=judged_texts,
        qrels={query: qrels[query] for query in judged_texts},
        ids=ids,
        read=read,
        self_documents=frozenset(self_documents),
        fingerprint=hashlib.sha256(json.dumps(state, sort_keys=True, default=str).encode()).hexdigest(),
    )

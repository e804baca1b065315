"""Retrieval sets: queries, qrels, and documents that are read as a stream; tasks of the optional mteb package."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from llamory.common.io import file_digest, json_digest
from llamory.documents.beir import read_beir
from llamory.errors import LlamoryError


@dataclass(frozen=True)
class RetrievalDataset:
    """Queries, documents and relevance judgements."""

    name: str
    split: str  # of the qrels, such as "test"
    queries: Mapping[str, str]  # by id, those with a relevant document
    qrels: Mapping[str, Mapping[str, int]]  # of each query: scores of documents, by id; below 1 is not relevant
    ids: Sequence[str]  # of all documents
    read: Callable[[], Iterator[tuple[str, str]]]  # iterates over the ids and texts of all documents, in order
    self_documents: frozenset[str] = frozenset()  # queries that aren't to find the document of the same id
    fingerprint: str = ""  # of everything that scores depend on

    @property
    def missing_relevant(self) -> int:
        """Number of relevant documents that are not in the corpus and can't be retrieved."""
        return len(_relevant(self.qrels) - set(self.ids))


Qrels = dict[str, dict[str, int]]


def queries_with_qrels(name: str, queries: Mapping[str, str], qrels: Qrels) -> tuple[dict[str, str], Qrels]:
    """The queries that have a relevant document, in the order of the qrels, and their qrels."""
    found = {}
    for query, scores in qrels.items():
        if query not in queries:
            raise LlamoryError(f"{name} has qrels for the query {query!r}, which its queries don't have.")
        if max(scores.values(), default=0) > 0:
            found[query] = queries[query]
    if not found:
        raise LlamoryError(f"{name} has no query with a relevant document; its qrels should have scores above 0.")
    return found, {query: qrels[query] for query in found}


def sample(data: RetrievalDataset, queries: int | None = None, documents: int | None = None) -> RetrievalDataset:
    """A sample of the queries and documents, drawn by the hash of their ids: the same on every machine.

    The documents include all that are relevant to a kept query; None keeps all. Raises a LlamoryError if the dataset
    has fewer, or more documents than requested are relevant.
    """
    for kind, requested, all_ids in (("queries", queries, data.queries), ("documents", documents, data.ids)):
        if requested is not None and requested > len(all_ids):
            raise LlamoryError(f"{data.name} has {len(all_ids):,} {kind} in the split {data.split}, not {requested:,}.")
    if queries is not None:
        sampled = set(heapq.nsmallest(queries, data.queries, key=_hash_order))
        kept = {query: text for query, text in data.queries.items() if query in sampled}
        data = replace(data, queries=kept, qrels={query: data.qrels[query] for query in kept})
    if documents is None:
        return data
    needed = _relevant(data.qrels).intersection(data.ids)
    if len(needed) > documents:
        raise LlamoryError(
            f"{len(needed):,} documents are relevant to the {len(data.queries):,} queries, more than the {documents:,}."
        )
    rest = (key for key in data.ids if key not in needed)
    kept_ids = needed | set(heapq.nsmallest(documents - len(needed), rest, key=_hash_order))

    def read() -> Iterator[tuple[str, str]]:
        return ((key, text) for key, text in data.read() if key in kept_ids)

    return replace(data, ids=[key for key in data.ids if key in kept_ids], read=read)


def _relevant(qrels: Mapping[str, Mapping[str, int]]) -> set[str]:
    return {key for scores in qrels.values() for key, score in scores.items() if score > 0}


def _hash_order(key: str) -> tuple[int, str]:
    return xxhash.xxh64_intdigest(key.encode()), key


def load_beir(folder: Path, split: str | None = None, *, ignore_identical_ids: bool = False) -> RetrievalDataset:
    """A BEIR folder as a dataset; the corpus is streamed.

    A document with the id and the text of a query is the query itself and not counted as found, unless it is relevant;
    with `ignore_identical_ids` its text doesn't matter, as in BEIR. Raises a LlamoryError if a file is missing, a line
    is broken, an id is repeated, or no query has a relevant document.
    """
    data = read_beir(folder, split)
    qrels: Qrels = {}
    for query, scores in data.qrels.items():
        for name, score in scores.items():
            if not score.is_integer():
                raise LlamoryError(f"{data.locations[query, name]}: the score should be a whole number, not {score}.")
            qrels.setdefault(query, {})[name] = int(score)
    queries, qrels = queries_with_qrels(str(data.files[-1]), data.queries, qrels)
    ids: dict[str, None] = {}
    self_documents = set()
    for document in data.documents():
        name, text = document.id, document.text
        if name in ids:
            raise LlamoryError(f"{document.location}: the id {name!r} is repeated; ids must be unique.")
        ids[name] = None
        texts = (" ".join(each.split()) for each in (text, f"{document.title} {text}"))
        is_query = name in queries and (ignore_identical_ids or " ".join(queries[name].split()) in texts)
        if is_query and qrels[name].get(name, 0) < 1:
            self_documents.add(name)
    if not ids:
        raise LlamoryError(f"{data.files[0]} has no documents.")
    digest = hashlib.sha256()
    for file in data.files:
        digest.update(bytes.fromhex(file_digest(file)))

    def read() -> Iterator[tuple[str, str]]:
        return ((document.id, document.full_text) for document in data.documents())

    fingerprint, self_ids = digest.hexdigest(), frozenset(self_documents)
    return RetrievalDataset(data.name, data.split, queries, qrels, list(ids), read, self_ids, fingerprint)


def read_mteb(name: str, split: str | None = None, *, ignore_identical_ids: bool = False) -> RetrievalDataset:
    """Load a retrieval task of the mteb package (Muennighoff et al. 2022, arXiv:2210.07316) from the hub or its cache.

    Raises a LlamoryError if mteb isn't installed, has no such retrieval task, or its data can't be loaded.

    Args:
        name: of the task, such as "NFCorpus"; a subset follows a colon, as in "A:en".
        split: of its data; by default the one that mteb evaluates, "test" if there are several.
        ignore_identical_ids: as for `load_beir`; also on where the task says so.
    """
    try:
        import mteb
        from mteb.abstasks import AbsTaskRetrieval
    except ImportError as error:
        raise LlamoryError(f"There is no folder {name}; for mteb's tasks, pip install 'llamory[mteb]'.") from error
    task_name, _, subset = name.partition(":")
    try:
        task: Any = mteb.get_task(task_name)
    except KeyError as error:
        _, found, guess = str(error.args[0]).partition("Did you mean: ")
        suggestion = f" (did you mean {guess.strip(chr(39) + '?')}?)" if found else ""
        raise LlamoryError(f"There is no folder {name}, and mteb has no such task{suggestion}.") from error
    if not isinstance(task, AbsTaskRetrieval):
        raise LlamoryError(f"The mteb task {name} is of the kind {task.metadata.type}; name a retrieval task.")
    try:
        task.load_data()
    except Exception as error:  # the hub, the network or a loader script may raise anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise LlamoryError(f"The data of the mteb task {name} can't be loaded: {reason}.") from error
    subset, split = _select_split(task, task_name, subset, split)
    ignore_identical_ids = ignore_identical_ids or task.ignore_identical_ids
    data = task.dataset[subset][split]
    corpus, query_table = data["corpus"], data["queries"]
    if data.get("top_ranked"):
        raise LlamoryError(f"The mteb task {name} reorders given documents; name one that searches all documents.")
    if "instruction" in query_table.column_names or not all(map(_plain_texts, (corpus, query_table))):
        raise LlamoryError(f"The mteb task {name} asks with instructions, or not about texts; name a plain text task.")
    judgements = data["relevant_docs"].items()
    qrels = {query: {key: int(score) for key, score in scores.items()} for query, scores in judgements}
    queries, kept = queries_with_qrels(name, dict(zip(query_table["id"], query_table["text"], strict=True)), qrels)
    ids = list(corpus["id"])

    def read() -> Iterator[tuple[str, str]]:
        for row in corpus:
            yield row["id"], f"{row.get('title') or ''} {row['text']}".strip()

    self_ids = {key for key in ids if ignore_identical_ids and key in queries and qrels[key].get(key, 0) < 1}
    state = {"revision": task.metadata.revision, "judgements": qrels, "ids": len(ids)}
    return RetrievalDataset(name, split, queries, kept, ids, read, frozenset(self_ids), json_digest(state, digits=64))


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

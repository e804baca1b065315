"""A retrieval set as evaluations see it: queries, qrels, and documents that are read as a stream."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import xxhash

from llamory.errors import LlamoryError


@dataclass(frozen=True)
class RetrievalDataset:
    """Queries that documents answer, and which ones do.

    Attributes:
        name: of the set.
        split: of its qrels, such as "test".
        queries: text of each query that has a relevant document, under its id.
        qrels: for each of these queries, the score of each judged document's id; below 1 is not relevant.
        ids: of all documents.
        read: reads all documents again, as pairs of id and text, in the order of `ids`; a text may be empty.
        self_documents: queries whose document of the same id is the query itself, which it must not find.
        fingerprint: of all that scores depend on.
    """

    name: str
    split: str
    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[str, int]]
    ids: Sequence[str]
    read: Callable[[], Iterator[tuple[str, str]]]
    self_documents: frozenset[str] = field(default_factory=frozenset)
    fingerprint: str = ""

    @property
    def missing_relevant(self) -> int:
        """How many relevant documents, of all queries together, aren't among the documents: no one can find them."""
        known = set(self.ids)
        relevant = {key for judged in self.qrels.values() for key, score in judged.items() if score > 0}
        return len(relevant - known)


def queries_with_qrels(name: str, queries: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]]) -> dict[str, str]:
    """The queries that have a relevant document, in the order of the qrels.

    Raises:
        LlamoryError: available is none, or a judged query has no text.
    """
    found = {}
    for query, judged in qrels.items():
        if query not in queries:
            raise LlamoryError(f"{name} judges documents for the query {query!r}, which its queries don't have.")
        if max(judged.values(), default=0) > 0:
            found[query] = queries[query]
    if not found:
        raise LlamoryError(f"{name} has no query with a relevant document; its qrels should have scores above 0.")
    return found


def sample(data: RetrievalDataset, queries: int | None = None, documents: int | None = None) -> RetrievalDataset:
    """A smaller set of some queries and documents, drawn by the hash of their ids: the same on every machine.

    Args:
        data: the whole set.
        queries: how many to keep; None keeps all.
        documents: how many to keep, those that are relevant to a kept query among them; None keeps all.

    Raises:
        LlamoryError: available are fewer than requested for, or the relevant documents alone are more.
    """
    for requested, available, kind in (
        (queries, len(data.queries), "queries"),
        (documents, len(data.ids), "documents"),
    ):
        if requested is not None and requested > available:
            raise LlamoryError(f"{data.name} has {available:,} {kind} in the split {data.split}, not {requested:,}.")
    if queries is not None:
        chosen = set(heapq.nsmallest(queries, data.queries, key=_hash_order))
        kept = {query: text for query, text in data.queries.items() if query in chosen}
        judged = {query: data.qrels[query] for query in kept}
        data = replace(data, queries=kept, qrels=judged)
    return data if documents is None else _sample_documents(data, documents)


def _sample_documents(data: RetrievalDataset, documents: int) -> RetrievalDataset:
    relevant = {key for judged in data.qrels.values() for key, score in judged.items() if score > 0}
    needed = relevant.intersection(data.ids)
    if len(needed) > documents:
        raise LlamoryError(
            f"{len(needed):,} documents are relevant to the {len(data.queries):,} queries, more than the "
            f"{documents:,} to keep; keep more documents or fewer queries."
        )
    rest = (key for key in data.ids if key not in needed)
    chosen = needed | set(heapq.nsmallest(documents - len(needed), rest, key=_hash_order))

    def read() -> Iterator[tuple[str, str]]:
        return ((key, text) for key, text in data.read() if key in chosen)

    return replace(data, ids=[key for key in data.ids if key in chosen], read=read)


def _hash_order(key: str) -> tuple[int, str]:
    return xxhash.xxh64_intdigest(key.encode()), key

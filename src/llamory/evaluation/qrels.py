"""A retrieval set as evaluations see it: queries, judgements, and documents that are read as a stream."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import xxhash

from llamory.errors import LlamoryError


@dataclass(frozen=True)
class RetrievalSet:
    """Queries that documents answer, and which ones do.

    Attributes:
        name: of the set.
        split: of its judgements, such as "test".
        queries: text of each query that has a relevant document, under its id.
        judgements: for each of these queries, the score of each judged document's id; below 1 is not relevant.
        ids: of all documents.
        read: reads all documents again, as pairs of id and text, in the order of `ids`; a text may be empty.
        own: queries whose document of the same id is the query itself, which it must not find.
        fingerprint: of all that scores depend on.
    """

    name: str
    split: str
    queries: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]
    ids: Sequence[str]
    read: Callable[[], Iterator[tuple[str, str]]]
    own: frozenset[str] = field(default_factory=frozenset)
    fingerprint: str = ""

    @property
    def missing(self) -> int:
        """How many relevant documents, of all queries together, aren't among the documents: no one can find them."""
        known = set(self.ids)
        relevant = {key for judged in self.judgements.values() for key, score in judged.items() if score > 0}
        return len(relevant - known)


def judged_queries(
    name: str, queries: Mapping[str, str], judgements: Mapping[str, Mapping[str, int]]
) -> dict[str, str]:
    """The queries that have a relevant document, in the order of the judgements.

    Raises:
        LlamoryError: there is none, or a judged query has no text.
    """
    found = {}
    for query, judged in judgements.items():
        if query not in queries:
            raise LlamoryError(f"{name} judges documents for the query {query!r}, which its queries don't have.")
        if max(judged.values(), default=0) > 0:
            found[query] = queries[query]
    if not found:
        raise LlamoryError(f"{name} has no query with a relevant document; its judgements should have scores above 0.")
    return found


def sample(data: RetrievalSet, queries: int | None = None, documents: int | None = None) -> RetrievalSet:
    """A smaller set of some queries and documents, drawn by the hash of their ids: the same on every machine.

    Args:
        data: the whole set.
        queries: how many to keep; None keeps all.
        documents: how many to keep, those that are relevant to a kept query among them; None keeps all.

    Raises:
        LlamoryError: there are fewer than asked for, or the relevant documents alone are more.
    """
    for asked, there, what in ((queries, len(data.queries), "queries"), (documents, len(data.ids), "documents")):
        if asked is not None and asked > there:
            raise LlamoryError(f"{data.name} has {there:,} {what} in the split {data.split}, not {asked:,}.")
    if queries is not None:
        chosen = set(heapq.nsmallest(queries, data.queries, key=_draw))
        kept = {query: text for query, text in data.queries.items() if query in chosen}
        judged = {query: data.judgements[query] for query in kept}
        data = replace(data, queries=kept, judgements=judged)
    return data if documents is None else _fewer_documents(data, documents)


def _fewer_documents(data: RetrievalSet, documents: int) -> RetrievalSet:
    relevant = {key for judged in data.judgements.values() for key, score in judged.items() if score > 0}
    needed = relevant.intersection(data.ids)
    if len(needed) > documents:
        raise LlamoryError(
            f"{len(needed):,} documents are relevant to the {len(data.queries):,} queries, more than the "
            f"{documents:,} to keep; keep more documents or fewer queries."
        )
    rest = (key for key in data.ids if key not in needed)
    chosen = needed | set(heapq.nsmallest(documents - len(needed), rest, key=_draw))

    def read() -> Iterator[tuple[str, str]]:
        return ((key, text) for key, text in data.read() if key in chosen)

    return replace(data, ids=[key for key in data.ids if key in chosen], read=read)


def _draw(key: str) -> tuple[int, str]:
    return xxhash.xxh64_intdigest(key.encode()), key

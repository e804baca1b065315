"""Search one table of passages: by meaning, by words, or by both."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from llamory.errors import LlamoryError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from lancedb.table import Table

SearchMode = Literal["dense", "bm25", "fused"]
MODES: tuple[str, ...] = get_args(SearchMode)

# Passages that each of the two searches gives to be fused, and the least that either gives: equal scores are put in
# order here, and the table gives them in none.
_EXTRA_CANDIDATES = 100
_COLUMNS = ("text", "source", "title", "line", "page")


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        text: the passage.
        source: the document's source: its path, for a line of JSON lines `path:line`.
        title: the title of the part of the document that it stands in.
        line: where it starts, counted from 1.
        score: what the hits are ordered by: the cosine (dense), BM25, or the sum of reciprocal ranks (fused).
        page: the page (PDF) or cell (notebook) where it starts; lines are then counted in it.
        cosine: of its vector and the query's, from -1 to 1; None if it wasn't found by meaning.
        bm25: its BM25 score; None if it wasn't found by words.
    """

    text: str
    source: str
    title: str
    line: int
    score: float
    page: int | None = None
    cosine: float | None = None
    bm25: float | None = None

    @property
    def location(self) -> str:
        """Where it starts: `path:line`, or `path, page 3`."""
        from llamory.documents import location

        return location(self.source, self.line, self.page)


def check_mode(mode: str) -> None:
    """Raise LlamoryError for an unknown way to search."""
    if mode not in MODES:
        raise LlamoryError(f"There is no search {mode!r}; it should be one of {', '.join(MODES)}.")


def search_table(
    table: Table, mode: SearchMode, text: str, vector: np.ndarray | None, top: int, condition: str | None
) -> list[Hit]:
    """The best passages of a table, best first.

    Args:
        table: the passages.
        mode: `dense` (greatest cosine), `bm25`, or `fused` (reciprocal ranks of both, k = 60).
        text: the query.
        vector: its embedding; not used by `bm25`.
        top: how many to give at most.
        condition: SQL that passages must meet.
    """
    depth = max(top + _EXTRA_CANDIDATES, 2 * top)
    dense = _dense(table, vector, depth, condition) if mode != "bm25" and vector is not None else None
    lexical = _bm25(table, text, depth, condition) if mode != "dense" else None
    if dense is not None and lexical is not None:
        return _fused(text, dense, lexical)[:top]
    rows = dense if dense is not None else lexical
    assert rows is not None
    return [_to_hit(row, row["_score"] if dense is None else 1.0 - row["_distance"]) for row in rows.to_pylist()[:top]]


def source_filter(sources: str | Iterable[str]) -> str:
    """SQL for prefixes or patterns of sources, as `Library.search` explains them."""
    sources = [sources] if isinstance(sources, str) else list(sources)
    return " OR ".join(map(_source_condition, sources))


def _dense(table: Table, vector: np.ndarray, depth: int, condition: str | None) -> pa.Table:
    query = table.search(vector).metric("cosine").limit(depth)  # type: ignore[attr-defined]
    return _execute(table, query, condition, "_distance", "ascending")


def _bm25(table: Table, text: str, depth: int, condition: str | None) -> pa.Table:
    from lancedb.query import MatchQuery

    query = table.search(MatchQuery(text, "text"), query_type="fts").limit(depth)
    return _execute(table, query, condition, "_score", "descending")


def _execute(table: Table, query: Any, condition: str | None, score: str, order: str) -> pa.Table:
    """Run a query; passages of one score are put in the order of their places, so that results never vary."""
    if condition:
        query = query.where(condition, prefilter=True)
    columns = [name for name in _COLUMNS if name in table.schema.names]
    rows = query.select([*columns, score]).with_row_id(True).to_arrow()
    return rows.sort_by([(score, order), ("source", "ascending"), ("line", "ascending"), ("text", "ascending")])


def _fused(text: str, dense: pa.Table, lexical: pa.Table) -> list[Hit]:
    from lancedb.rerankers import RRFReranker

    fused = RRFReranker(return_score="all").rerank_hybrid(text, dense, lexical).to_pylist()
    # What both searches found comes with the first one's score only.
    scores = dict(zip(lexical["_rowid"].to_pylist(), lexical["_score"].to_pylist(), strict=True))
    hits = [_to_hit(row | {"_score": scores.get(row["_rowid"])}, row["_relevance_score"]) for row in fused]
    # First of one search equals first of the other: those found by meaning go first.
    return sorted(hits, key=lambda hit: (-hit.score, -(hit.cosine if hit.cosine is not None else -2), *_tie_break(hit)))


def _to_hit(row: dict[str, Any], score: float) -> Hit:
    distance = row.get("_distance")
    return Hit(
        text=row["text"],
        source=row["source"],
        title=row["title"],
        line=row["line"],
        score=score,
        page=row.get("page"),
        cosine=None if distance is None else 1.0 - distance,
        bm25=row.get("_score"),
    )


def _tie_break(hit: Hit) -> tuple[Any, ...]:
    return hit.source, hit.line, hit.text


def _source_condition(source: str) -> str:
    """SQL for a prefix or a pattern of sources; a relative one may begin after any folder."""
    pattern = "".join({"*": ".*", "?": "."}.get(letter) or re.escape(letter) for letter in source)
    start = "^" if source.startswith("/") or "://" in source or Path(source).is_absolute() else r"(^|[/\\])"
    end = "$" if "*" in source or "?" in source else ""
    expression = sql_string(f"(?s){start}{pattern}{end}")
    return f"(regexp_like(source, {expression}) OR regexp_like(file, {expression}))"


def sql_string(text: str) -> str:
    """A string of SQL."""
    return "'" + text.replace("'", "''") + "'"

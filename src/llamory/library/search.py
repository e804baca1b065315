"""Search a table of passages: dense (cosine), lexical (BM25), or both fused by reciprocal ranks."""

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
SEARCH_MODES: tuple[str, ...] = get_args(SearchMode)

_EXTRA_CANDIDATES = 100  # beyond `top`: equal scores come in any order, and fusion needs the ranks of both searches
_RESULT_COLUMNS = ("text", "source", "title", "line", "page")


@dataclass(frozen=True)
class Hit:
    """A passage found by a search."""

    text: str
    source: str  # the document's source: its path, for a line of JSON lines `path:line`
    title: str  # of the document's section that holds the passage
    line: int  # the first, counted from 1
    score: float  # sorts hits: cosine (dense), BM25, or the sum of reciprocal ranks (fused)
    page: int | None = None  # page (PDF) or cell (notebook) of the first line, which is then counted within it
    cosine: float | None = None  # None if the dense search did not find it
    bm25: float | None = None  # None if the lexical search did not find it

    @property
    def location(self) -> str:
        """Where the passage starts: `path:line`, or `path, page 3`."""
        from llamory.documents import location

        return location(self.source, self.line, self.page)


def check_search(query: str, top: int, mode: str) -> None:
    """Raise LlamoryError for a query, a number of hits or a mode that no search takes."""
    if not query.strip():
        raise LlamoryError("The query is blank; give at least one word to search for.")
    check_unicode(query, "query")
    if top < 1:
        raise LlamoryError(f"A search must be for at least 1 passage, not {top}.")
    if mode not in SEARCH_MODES:
        raise LlamoryError(f"There is no search {mode!r}; it should be one of {', '.join(SEARCH_MODES)}.")


def check_unicode(text: str, name: str) -> None:
    """Raise LlamoryError for a text with half a surrogate pair, as an argument has that isn't valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LlamoryError(f"The {name} is not valid Unicode text at character {error.start + 1}.") from error


def search_table(
    table: Table, mode: SearchMode, text: str, vector: np.ndarray | None, top: int, condition: str | None
) -> list[Hit]:
    """The best passages of a table, best first.

    Args:
        mode: `dense` (greatest cosine), `bm25`, or `fused` (sum of 1 / (60 + rank) over both).
        vector: (dimension,) embedding of the query `text`; not used by `bm25`.
        condition: SQL condition that a passage must meet.
    """
    top = min(top, table.count_rows())
    depth = max(top + _EXTRA_CANDIDATES, 2 * top)
    if mode == "bm25":
        lexical = _bm25(table, text, depth, condition)
        return [_to_hit(row, row["_score"]) for row in lexical.to_pylist()[:top]]
    assert vector is not None
    dense = _dense(table, vector, depth, condition)
    if mode == "dense":
        return [_to_hit(row, 1.0 - row["_distance"]) for row in dense.to_pylist()[:top]]
    return _fuse(text, dense, _bm25(table, text, depth, condition))[:top]


def source_filter(sources: str | Iterable[str]) -> str:
    """SQL condition for prefixes or patterns of sources, which `Library.search` explains."""
    return " OR ".join(map(_source_condition, [sources] if isinstance(sources, str) else sources))


def _dense(table: Table, vector: np.ndarray, depth: int, condition: str | None) -> pa.Table:
    query = table.search(vector).metric("cosine").limit(depth)  # type: ignore[attr-defined]
    return _execute(table, query, condition, "_distance", "ascending")


def _bm25(table: Table, text: str, depth: int, condition: str | None) -> pa.Table:
    from lancedb.query import MatchQuery

    query = table.search(MatchQuery(text, "text"), query_type="fts").limit(depth)
    return _execute(table, query, condition, "_score", "descending")


def _execute(table: Table, query: Any, condition: str | None, score: str, order: str) -> pa.Table:
    """Run a query; passages of equal score are sorted by source, line and text, so that results never vary."""
    if condition:
        query = query.where(condition, prefilter=True)
    columns = [name for name in _RESULT_COLUMNS if name in table.schema.names]
    rows = query.select([*columns, score]).with_row_id(True).to_arrow()
    return rows.sort_by([(score, order), ("source", "ascending"), ("line", "ascending"), ("text", "ascending")])


def _fuse(text: str, dense: pa.Table, lexical: pa.Table) -> list[Hit]:
    from lancedb.rerankers import RRFReranker

    fused = RRFReranker(return_score="all").rerank_hybrid(text, dense, lexical).to_pylist()
    # A passage found by both searches comes with the score of the first one only.
    scores = dict(zip(lexical["_rowid"].to_pylist(), lexical["_score"].to_pylist(), strict=True))
    hits = [_to_hit(row | {"_score": scores.get(row["_rowid"])}, row["_relevance_score"]) for row in fused]

    def order(hit: Hit) -> tuple[Any, ...]:  # equal sums of ranks: the greater cosine comes first
        return -hit.score, 2 if hit.cosine is None else -hit.cosine, hit.source, hit.line, hit.text

    return sorted(hits, key=order)


def _to_hit(row: dict[str, Any], score: float) -> Hit:
    distance = row.get("_distance")
    cosine = None if distance is None else 1.0 - distance
    columns = row["text"], row["source"], row["title"], row["line"]
    return Hit(*columns, score, row.get("page"), cosine, row.get("_score"))


def _source_condition(source: str) -> str:
    """SQL condition for one prefix or pattern; a relative one may start after any folder."""
    check_unicode(source, "source")
    pattern = "".join({"*": ".*", "?": "."}.get(letter) or re.escape(letter) for letter in source)
    prefix = "^" if source.startswith("/") or "://" in source or Path(source).is_absolute() else r"(^|[/\\])"
    suffix = "$" if "*" in source or "?" in source else ""
    expression = sql_string(f"(?s){prefix}{pattern}{suffix}")
    return f"(regexp_like(source, {expression}) OR regexp_like(file, {expression}))"


def sql_string(text: str) -> str:
    """A SQL string literal."""
    return "'" + text.replace("'", "''") + "'"

"""Passages and their vectors in a LanceDB table, whose schema carries the library's settings as JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.documents import Passage
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from lancedb.table import Table

FORMAT_VERSION = 1
# Every commit leaves a small file and a list of all files; they are joined before the lists grow long.
COMMITS_PER_TIDY = 256

_TABLE = "passages"
_METADATA_KEY = b"llamory"


@dataclass(frozen=True)
class Settings:
    """What a library was made with; never changes.

    Attributes:
        model: folder or hub id of the embedding model, empty if the library was made with a loaded model.
        fingerprint: hash of the model, so that another one isn't taken for it.
        dimension: length of the vectors.
        passage_length: tokens that a passage has at most.
        version: of the library's format.
    """

    model: str
    fingerprint: str
    dimension: int
    passage_length: int
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Hit:
    """A passage that was found.

    Attributes:
        text: the passage.
        source: the document's source: its path, for a line of JSON lines `path:line`.
        title: the title of the part of the document that it stands in.
        line: where it starts, counted from 1.
        score: cosine of its vector and the query's, from -1 to 1.
    """

    text: str
    source: str
    title: str
    line: int
    score: float


class PassageStore:
    """One library's table. Every method that writes does so in one commit: all of it is seen, or nothing."""

    def __init__(self, table: Table, settings: Settings) -> None:
        self._table = table
        self._commits = 0
        self.settings = settings

    @classmethod
    def open(cls, uri: str) -> PassageStore | None:
        """Open the table of a library; None if there is none.

        Raises:
            LlamoryError: the table isn't a library's, or of a format that this version doesn't know.
        """
        import lancedb

        # Connecting makes the folder, which looking for a library must not.
        if not _is_remote(uri) and not Path(uri).is_dir():
            return None
        database = lancedb.connect(uri)
        try:
            table = database.open_table(_TABLE)
        except ValueError as error:
            if "not found" not in str(error):
                raise
            return None
        stored = (table.schema.metadata or {}).get(_METADATA_KEY)
        settings = json.loads(stored) if stored else {}
        if settings.get("version") != FORMAT_VERSION:
            raise LlamoryError(
                f"{uri} is not a library that this version of llamory can read; make it again with `llamory index`."
            )
        return cls(table, Settings(**{field.name: settings[field.name] for field in fields(Settings)}))

    @classmethod
    def create(cls, uri: str, settings: Settings) -> PassageStore:
        """Make an empty table."""
        import lancedb
        import pyarrow as pa

        schema = pa.schema(
            [
                ("text", pa.string()),
                ("source", pa.string()),
                ("title", pa.string()),
                ("line", pa.int32()),
                ("position", pa.int32()),  # of the passage in its document
                ("file", pa.string()),
                ("hash", pa.string()),  # of the whole document
                ("vector", pa.list_(pa.float32(), settings.dimension)),
            ],
            metadata={_METADATA_KEY: json.dumps(asdict(settings)).encode()},
        )
        return cls(lancedb.connect(uri).create_table(_TABLE, schema=schema), settings)

    def __len__(self) -> int:
        return self._table.count_rows()

    def documents(self) -> dict[str, tuple[str, str]]:
        """File and hash of each source."""
        columns = self._table.search().select(["source", "file", "hash"]).to_arrow()
        rows = columns.group_by(["source", "file", "hash"]).aggregate([]).to_pydict()
        return dict(zip(rows["source"], zip(rows["file"], rows["hash"], strict=True), strict=True))

    def vectors(self, sources: Collection[str]) -> dict[str, np.ndarray]:
        """The vector of each passage text of some sources."""
        if not sources:
            return {}
        found = self._table.search().where(_is_in("source", sources)).select(["text", "vector"]).to_arrow()
        vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(len(found), self.settings.dimension)
        return dict(zip(found["text"].to_pylist(), vectors, strict=True))

    def passages(self, sources: Collection[str]) -> dict[str, list[Passage]]:
        """All passages of some sources, in order, by source; a source that isn't there has none."""
        if not sources:
            return {}
        columns = ["source", "position", "text", "title", "line"]
        found = self._table.search().where(_is_in("source", sources)).select(columns).to_list()
        passages: dict[str, list[Passage]] = {}
        for row in sorted(found, key=lambda row: row["position"]):
            passage = Passage(row["text"], row["source"], row["title"], row["line"])
            passages.setdefault(row["source"], []).append(passage)
        return passages

    def write(self, rows: list[dict[str, Any]], vectors: np.ndarray, replaced: Collection[str]) -> None:
        """Add whole documents, and take away what was there of them.

        Args:
            rows: the passages: all columns but the vector.
            vectors: float32 (passages, dimension).
            replaced: sources among the rows that may have passages already.
        """
        data = self._arrow(rows, vectors)
        if replaced:
            merge = self._table.merge_insert(["source", "position"])
            merge = merge.when_matched_update_all().when_not_matched_insert_all()
            merge.when_not_matched_by_source_delete(_is_in("source", replaced)).execute(data)
        else:
            self._table.add(data)
        self._commits += 1
        if self._commits % COMMITS_PER_TIDY == 0:
            self.tidy()

    def remove(self, sources: Collection[str]) -> None:
        """Take away all passages of some sources."""
        if sources:
            self._table.delete(_is_in("source", sources))

    def tidy(self) -> None:
        """Join the small files that many commits leave behind."""
        self._table.optimize()

    def search(self, vector: np.ndarray, top: int, source: str | None) -> list[Hit]:
        """The passages with the greatest cosine, best first; `source` as `Library.search` explains it."""
        query = self._table.search(vector).metric("cosine").limit(top)  # type: ignore[attr-defined]
        if source:
            query = query.where(_matches(source), prefilter=True)
        hits = [
            Hit(row["text"], row["source"], row["title"], row["line"], 1.0 - row["_distance"])
            for row in query.select(["text", "source", "title", "line", "_distance"]).to_list()
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.source, hit.line))

    def _arrow(self, rows: list[dict[str, Any]], vectors: np.ndarray) -> pa.Table:
        import pyarrow as pa

        schema = self._table.schema
        columns = [
            pa.array([row[field.name] for row in rows], type=field.type) for field in schema if field.name != "vector"
        ]
        columns.append(pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.settings.dimension))
        return pa.table(columns, schema=schema)


def _is_remote(uri: str) -> bool:
    return "://" in uri


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _is_in(column: str, values: Collection[str]) -> str:
    return f"{column} IN ({', '.join(map(_quoted, sorted(values)))})"


def _matches(source: str) -> str:
    """SQL for a prefix or a pattern of sources; a relative one may begin after any folder."""
    pattern = "".join({"*": ".*", "?": "."}.get(letter) or re.escape(letter) for letter in source)
    start = "^" if source.startswith("/") or _is_remote(source) or Path(source).is_absolute() else r"(^|[/\\])"
    end = "$" if "*" in source or "?" in source else ""
    expression = _quoted(f"(?s){start}{pattern}{end}")
    return f"(regexp_like(source, {expression}) OR regexp_like(file, {expression}))"

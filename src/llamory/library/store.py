"""Passages and their vectors in a LanceDB table, whose schema holds the library's settings as JSON."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from llamory.common.io import local_folder
from llamory.documents import Chunk
from llamory.errors import LlamoryError
from llamory.library.search import Hit, SearchMode, check_unicode, search_table, source_filter, sql_string
from llamory.models.base import unshadowed_name

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from lancedb import DBConnection
    from lancedb.table import Table

FORMAT_VERSION = 2  # 1 had no `key` and `page` columns and no full-text index
COMMITS_PER_COMPACTION = 256  # each adds a small file and a list of all files
_CLEANUP_AGE = timedelta(minutes=1)  # of overwritten states, which other processes may read
# Lucene's list. The tokenizer's own list is of all languages at once, and has "cat" in it.
_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
).split()
_SQL_LIST_LENGTH = 1000  # longer lists take the parser long

_CHUNKS_TABLE, _FILES_TABLE, _PENDING_TABLE = "passages", "files", "pending"
_WRITE_MARKER = ""  # entry of the files table while a run writes
_MAX_REBUILD_CHUNKS = 50_000  # passages; the full-text index of a larger table isn't rebuilt after removals
_METADATA_KEY = b"llamory"


@dataclass(frozen=True)
class Settings:
    """Settings that a library keeps from its first document on."""

    model: str  # folder or hub id; empty if the library was made with a loaded model
    fingerprint: str  # hash of the model
    dimension: int
    chunk_size: int  # maximum tokens of a passage ("passage_length" in the file)
    version: int = FORMAT_VERSION


class PassageStore:
    """The table of one library. Each batch of whole documents is written in one commit."""

    def __init__(self, database: DBConnection, table: Table, settings: Settings, uri: str) -> None:
        self.settings = settings
        self._database, self._table, self._uri = database, table, uri
        self._file_index: Table | None = None
        self.unfinished = False  # whether an earlier run wrote without `finish_write`; known after `file_index`
        self._commits = self._uncompacted_rows = 0  # since the last compaction
        self._has_deletions = False  # since `start_write`
        self._has_keys = "key" in table.schema.names
        self._old_keys: np.ndarray | None = None  # sorted (passages,) int64, as of the first use
        self._new_keys: set[int] = set()  # of passages written since

    @classmethod
    def open(cls, uri: str) -> PassageStore | None:
        """Open the table of a library, if there is one; LlamoryError if it is damaged or of a later format."""
        import lancedb

        check_uri(uri)
        # Connecting creates the folder; looking for a library must not.
        if (folder := local_folder(uri)) is not None and not folder.is_dir():
            return None
        try:
            with _user_errors(uri):
                database = lancedb.connect(uri)
                table = _open_table(database, _CHUNKS_TABLE)
        except ValueError as error:
            raise LlamoryError(f"{uri} is no address of a library ({_first_words(error)}); check it.") from error
        return None if table is None else cls(database, table, _load_settings(table, uri), uri)

    @classmethod
    def create(cls, uri: str, settings: Settings) -> PassageStore:
        """Create an empty table."""
        import lancedb
        import pyarrow as pa

        stored = asdict(settings)
        stored["passage_length"] = stored.pop("chunk_size")  # the key of format 1
        schema = pa.schema(
            [
                ("text", pa.string()),
                ("source", pa.string()),
                ("title", pa.string()),
                ("line", pa.int32()),
                ("page", pa.int32()),  # or cell of a notebook; null for other formats
                ("position", pa.int32()),  # number of the passage in its document, from 0
                ("file", pa.string()),
                ("hash", pa.string()),  # of the whole document
                ("key", pa.int64()),  # of the text: finds its vector again
                ("vector", pa.list_(pa.float32(), settings.dimension)),
            ],
            metadata={_METADATA_KEY: json.dumps(stored).encode()},
        )
        with _user_errors(uri):
            database = lancedb.connect(uri)
            return cls(database, database.create_table(_CHUNKS_TABLE, schema=schema), settings, uri)

    @contextmanager
    def _latest_table(self) -> Iterator[Table]:
        """The table as of now: other processes write to it, and old states are deleted after a while."""
        with _user_errors(self._uri):
            self._table.checkout_latest()
            yield self._table

    def __len__(self) -> int:
        with self._latest_table() as table:
            return table.count_rows()

    def num_documents(self) -> int:
        """Number of documents."""
        with self._latest_table() as table:
            return table.count_rows("position = 0")

    def documents(self) -> dict[str, tuple[str, str]]:
        """File and hash of each source."""
        with self._latest_table() as table:  # the first passage of each document
            rows = table.search().where("position = 0").select(["source", "file", "hash"]).to_arrow().to_pydict()
        return dict(zip(rows["source"], zip(rows["file"], rows["hash"], strict=True), strict=True))

    def vectors(self, texts: Collection[str]) -> dict[str, np.ndarray]:
        """The vectors of those of some passage texts that the table holds, in any document."""
        requested = set(texts)
        if self._has_keys:
            conditions = _sql_in("key", filter(self._may_contain, map(text_key, requested)))
        else:
            conditions = _sql_in("text", requested)
        vectors: dict[str, np.ndarray] = {}
        for condition in conditions:
            with self._latest_table() as table:
                rows = table.search().where(condition).select(["text", "vector"]).to_arrow()
            found = zip(rows["text"].to_pylist(), _matrix(rows, self.settings.dimension), strict=True)
            vectors |= {text: vector for text, vector in found if text in requested}
        return vectors

    def _may_contain(self, key: int) -> bool:
        """Whether a passage may have this key: looked up in memory (8 bytes a passage), since most texts are new."""
        import numpy as np

        if self._old_keys is None:
            with self._latest_table() as table:
                self._old_keys = np.sort(table.search().select(["key"]).to_arrow()["key"].to_numpy())
        position = int(np.searchsorted(self._old_keys, key))
        return key in self._new_keys or (position < len(self._old_keys) and int(self._old_keys[position]) == key)

    def refresh(self) -> None:
        """Forget cached keys, since another process may have written."""
        self._old_keys, self._new_keys = None, set()

    def search(
        self,
        vector: np.ndarray | None,
        top: int,
        source: str | Iterable[str] | None = None,
        *,
        text: str = "",
        mode: SearchMode = "dense",
    ) -> list[Hit]:
        """The best passages, best first; arguments as for `Library.search`."""
        condition = source_filter(source) if source else None
        with self._latest_table() as table:
            return search_table(table, mode, text, vector, top, condition)

    def passages(self, sources: Collection[str]) -> dict[str, list[Chunk]]:
        """All passages of some sources, in order, by source; unknown sources are left out."""
        rows: list[dict[str, Any]] = []
        for condition in _sql_in("source", sources):
            with self._latest_table() as table:
                columns = ["source", "position", "text", "title", "line", *{"page"}.intersection(table.schema.names)]
                rows += table.search().where(condition).select(columns).to_list()
        passages: dict[str, list[Chunk]] = {}
        for row in sorted(rows, key=lambda row: row["position"]):
            passage = Chunk(row["text"], row["source"], row["title"], row["line"], row.get("page"))
            passages.setdefault(row["source"], []).append(passage)
        return passages

    def write(self, rows: list[dict[str, Any]], vectors: np.ndarray, replaced: Collection[str]) -> None:
        """Add whole documents and delete the old passages of `replaced` sources, in one commit; rows as in `Batch`."""
        data = self._to_arrow(rows, vectors)
        with _user_errors(self._uri):
            if replaced:
                self._has_deletions = True
                merge = self._table.merge_insert(["source", "position"])
                merge = merge.when_matched_update_all().when_not_matched_insert_all()
                merge.when_not_matched_by_source_delete(" OR ".join(_sql_in("source", replaced))).execute(data)
            else:
                self._table.add(data)
        if self._has_keys:
            self._new_keys.update(data["key"].to_pylist())
        self._commits += 1
        self._uncompacted_rows += len(rows)
        # Compaction rewrites the table, so the larger the table, the rarer it is.
        if self._commits >= COMMITS_PER_COMPACTION and self._uncompacted_rows * 10 >= self._table.count_rows():
            self.compact()

    def remove(self, sources: Collection[str]) -> None:
        """Delete all passages of some sources."""
        for condition in _sql_in("source", sources):
            self._has_deletions = True
            with _user_errors(self._uri):
                self._table.delete(condition)

    def start_write(self) -> None:
        """Record that a run writes; call it before the run's first write, and `finish_write` after the last."""
        self._has_deletions = False
        self.mark_indexed({_WRITE_MARKER: ""})

    def finish_write(self) -> None:
        """Compact the table after a run's writes and those of an earlier run that was killed."""
        self.compact(rebuild=(self._has_deletions or self.unfinished) and len(self) <= _MAX_REBUILD_CHUNKS)
        self.clear_indexed([_WRITE_MARKER])
        self.unfinished = False

    def compact(self, *, rebuild: bool = False) -> None:
        """Join the files of many commits and update the full-text index; `rebuild` takes deleted passages out of it."""
        from lancedb.index import FTS

        with _user_errors(self._uri):
            if rebuild or not self._table.list_indices():
                # Splits languages without spaces too, and identifiers at points and underscores.
                fts_config = FTS(base_tokenizer="icu/split", custom_stop_words=_STOP_WORDS)
                self._table.create_index("text", config=fts_config, replace=True)
            self._table.optimize(cleanup_older_than=_CLEANUP_AGE)
            self._commits = self._uncompacted_rows = 0
            if self._file_index is not None:
                self._file_index.optimize(cleanup_older_than=_CLEANUP_AGE)

    def _to_arrow(self, rows: list[dict[str, Any]], vectors: np.ndarray) -> pa.Table:
        import pyarrow as pa

        schema = self._table.schema
        columns: dict[str, Any] = {"key": [text_key(row["text"]) for row in rows]}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.settings.dimension)
        for name in set(schema.names) - set(columns):
            columns[name] = [row[name] for row in rows]
        return pa.table({name: columns[name] for name in schema.names}, schema=schema)

    def file_index(self) -> dict[str, str]:
        """The content key of each file that was indexed completely; an unchanged one need not be parsed again."""
        with _user_errors(self._uri):
            self._file_index = _open_table(self._database, _FILES_TABLE)
            if self._file_index is None:
                return {}
            rows = self._file_index.search().select(["file", "content"]).to_arrow().to_pydict()
        index = dict(zip(rows["file"], rows["content"], strict=True))
        self.unfinished = index.pop(_WRITE_MARKER, None) is not None
        return index

    def mark_indexed(self, contents: Mapping[str, str]) -> None:
        """Add files with their content keys to the index. All of their documents must have been written."""
        import pyarrow as pa

        if not contents:
            return
        schema = pa.schema([("file", pa.string()), ("content", pa.string())])
        rows = pa.table([list(contents), list(contents.values())], schema=schema)
        with _user_errors(self._uri):
            if self._file_index is None:
                self._file_index = self._database.create_table(_FILES_TABLE, schema=schema, exist_ok=True)
            merge = self._file_index.merge_insert("file")
            merge.when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def clear_indexed(self, files: Collection[str]) -> None:
        """Delete files from the index; call it before any of their passages changes."""
        if self._file_index is not None:
            for condition in _sql_in("file", files):
                with _user_errors(self._uri):
                    self._file_index.delete(condition)


class PendingVectors:
    """Vectors of passages of incomplete documents, in a table beside the library's: a killed run's work.

    A table of a model with another fingerprint is deleted, unless `read_only`.
    """

    def __init__(self, uri: str, fingerprint: str, *, read_only: bool = False) -> None:
        import lancedb

        self._uri, self._fingerprint = uri, fingerprint
        self.files: dict[str, str] = {}  # of each source that has vectors here
        self._vectors: dict[str, np.ndarray] = {}  # by the text's digest
        if read_only and (folder := local_folder(uri)) is not None and not folder.is_dir():
            return
        with _user_errors(uri):
            self._database = lancedb.connect(uri)
            self._table = _open_table(self._database, _PENDING_TABLE)
            if self._table is None:
                return
            if (self._table.schema.metadata or {}).get(_METADATA_KEY) != fingerprint.encode():
                if not read_only:
                    self._drop()
                return
            rows = self._table.to_arrow()
        self.files = dict(zip(rows["source"].to_pylist(), rows["file"].to_pylist(), strict=True))
        matrix = _matrix(rows, rows.schema.field("vector").type.list_size)
        self._vectors = dict(zip(rows["digest"].to_pylist(), matrix, strict=True))

    def get(self, texts: Collection[str]) -> dict[str, np.ndarray]:
        """The vectors of those of some texts that an earlier run computed."""
        digests = {text: _digest(text) for text in texts} if self._vectors else {}
        return {text: self._vectors[digest] for text, digest in digests.items() if digest in self._vectors}

    def add(self, rows: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> None:
        """Write the vectors (passages, dimension) of some rows, of which `text`, `source` and `file` are used."""
        import pyarrow as pa

        columns: dict[str, Any] = {"digest": [_digest(row["text"]) for row in rows]}
        columns |= {name: [row[name] for row in rows] for name in ("source", "file")}
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])
        data = pa.table(columns).replace_schema_metadata({_METADATA_KEY: self._fingerprint.encode()})
        with _user_errors(self._uri):
            if self._table is None:
                self._table = self._database.create_table(_PENDING_TABLE, data)
            else:
                self._table.add(data)
        self.files |= {row["source"]: row["file"] for row in rows}

    def clear(self, sources: Collection[str]) -> None:
        """Delete the vectors of some sources; those of others stay."""
        known = self.files.keys() & set(sources)
        if self._table is None or not known:
            return
        for source in known:
            del self.files[source]
        with _user_errors(self._uri):
            if not self.files:
                self._drop()
                return
            for condition in _sql_in("source", known):
                self._table.delete(condition)

    def _drop(self) -> None:
        self._database.drop_table(_PENDING_TABLE)
        self._table = None


def text_key(text: str) -> int:
    """64-bit hash of a passage's text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def check_uri(uri: str) -> None:
    """Raise LlamoryError for a path or URI that can't be a library's."""
    if not uri.strip() or "\0" in uri:
        raise LlamoryError(f"The library's path is {uri!r}; give a folder or the URI of an object store.")
    check_unicode(uri, "library's path")


def _load_settings(table: Table, uri: str) -> Settings:
    stored = (table.schema.metadata or {}).get(_METADATA_KEY)
    settings = json.loads(stored) if stored else {}
    version = settings.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        found = f"The library at {uri} was made by a later llamory (format {version}"
        raise LlamoryError(f"{found}; this one reads up to {FORMAT_VERSION}); upgrade llamory to use it.")
    if version not in (1, FORMAT_VERSION):
        raise LlamoryError(f"{uri} is not a library that this llamory can read; make it again with `llamory index`.")
    settings["chunk_size"] = settings.get("passage_length")
    settings["model"] = unshadowed_name(settings["model"])
    return Settings(**{field.name: settings[field.name] for field in fields(Settings)})


@contextmanager
def _user_errors(uri: str) -> Iterator[None]:
    """Turn LanceDB's RuntimeErrors into an OSError if they are about the disk, a LlamoryError if about a table."""
    try:
        yield
    except RuntimeError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            code = int(number[1])
            raise OSError(code, os.strerror(code), uri) from error
        if "lance error" not in str(error).lower():
            raise
        cause = f"The library at {uri} can't be read: it is damaged or out of reach ({_first_words(error)})"
        raise LlamoryError(f"{cause}; restore it, or make it again with `llamory index` elsewhere.") from error


def _first_words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _open_table(database: DBConnection, name: str) -> Table | None:
    try:
        return database.open_table(name)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        return None


def _matrix(rows: pa.Table, dimension: int) -> np.ndarray:
    """The vector column as an array (rows, dimension)."""
    vectors: np.ndarray = rows["vector"].combine_chunks().flatten().to_numpy().reshape(len(rows), dimension)
    return vectors


def _sql_in(column: str, values: Iterable[str] | Iterable[int]) -> list[str]:
    """SQL conditions that hold together for the rows whose column has one of some values."""
    literals = [sql_string(each) if isinstance(each, str) else str(each) for each in sorted(values)]
    starts = range(0, len(literals), _SQL_LIST_LENGTH)
    return [f"{column} IN ({', '.join(literals[start : start + _SQL_LIST_LENGTH])})" for start in starts]

"""Passages and their vectors in a LanceDB table, whose schema carries the library's settings as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from llamory.common.locks import local_folder
from llamory.documents import Chunk
from llamory.errors import LlamoryError
from llamory.library.search import Hit, SearchMode, search_table, source_filter, sql_string

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from lancedb import DBConnection
    from lancedb.table import Table

# Version 1 had no `key`, no `page` and no index of words.
FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)
# Every commit leaves a small file and a list of all files; they are joined before the lists grow long.
COMMITS_PER_COMPACTION = 256
# How long states that were written over are kept for those who read them.
_CLEANUP_AGE = timedelta(minutes=1)
# Lucene's. The list that comes with this tokenizer is of all languages at once, and takes "cat" for such a word.
_STOP_WORDS = (
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they this "
    "to was will with"
).split()

_CHUNKS_TABLE = "passages"
_FILES_TABLE = "files"
# Stands among the files that were read while a run writes.
_WRITE_MARKER = ""
# Up to so many passages the index of words is made anew after a run that took passages out: a few seconds.
_MAX_REBUILD_CHUNKS = 50_000
_METADATA_KEY = b"llamory"


@dataclass(frozen=True)
class Settings:
    """What a library was made with; never changes.

    Attributes:
        model: folder or hub id of the embedding model, empty if the library was made with a loaded model.
        fingerprint: hash of the model, so that another one isn't taken for it.
        dimension: length of the vectors.
        chunk_size: the most tokens of a chunk; "passage_length" in the stored settings.
        version: of the library's format.
    """

    model: str
    fingerprint: str
    dimension: int
    chunk_size: int
    version: int = FORMAT_VERSION


class PassageStore:
    """One library's table. Every method that writes does so in one commit: all of it is seen, or nothing."""

    def __init__(self, database: DBConnection, table: Table, settings: Settings, uri: str) -> None:
        self._database = database
        self._table = table
        self._file_index: Table | None = None
        self._unfinished = False
        self._uri = uri
        self._commits = self._uncompacted_rows = 0  # commits and rows since small files were last joined
        self._has_deletions = False  # whether passages were replaced or removed since `begin`
        self._has_keys = "key" in table.schema.names
        self._old_keys: np.ndarray | None = None  # of passages, sorted; as they were when first asked for
        self._new_keys: set[int] = set()  # of passages written since
        self.settings = settings

    @classmethod
    def open(cls, uri: str) -> PassageStore | None:
        """Open the table of a library; None if there is none.

        Raises:
            LlamoryError: the table isn't a library's, is damaged, or of a format that this version doesn't know.
        """
        import lancedb

        # Connecting makes the folder, which looking for a library must not.
        folder = local_folder(uri)
        if folder is not None and not folder.is_dir():
            return None
        with _user_errors(uri):
            database = lancedb.connect(uri)
            table = _open_table(database, _CHUNKS_TABLE)
        return None if table is None else cls(database, table, _settings(table, uri), uri)

    @classmethod
    def create(cls, uri: str, settings: Settings) -> PassageStore:
        """Make an empty table."""
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
                ("page", pa.int32()),  # or cell; null where there are no such
                ("position", pa.int32()),  # of the passage in its document
                ("file", pa.string()),
                ("hash", pa.string()),  # of the whole document
                ("key", pa.int64()),  # of the text, so that a text's vector is found again
                ("vector", pa.list_(pa.float32(), settings.dimension)),
            ],
            metadata={_METADATA_KEY: json.dumps(stored).encode()},
        )
        database = lancedb.connect(uri)
        return cls(database, database.create_table(_CHUNKS_TABLE, schema=schema), settings, uri)

    # ---- reading -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _latest_table(self) -> Iterator[Table]:
        """The table as it is now: others may have written, and old states are cleared away after a while."""
        with _user_errors(self._uri):
            self._table.checkout_latest()
            yield self._table

    def __len__(self) -> int:
        with self._latest_table() as table:
            return table.count_rows()

    def documents(self) -> dict[str, tuple[str, str]]:
        """File and hash of each source."""
        with self._latest_table() as table:
            columns = table.search().select(["source", "file", "hash"]).to_arrow()
        rows = columns.group_by(["source", "file", "hash"]).aggregate([]).to_pydict()
        return dict(zip(rows["source"], zip(rows["file"], rows["hash"], strict=True), strict=True))

    def vectors(self, texts: Collection[str]) -> dict[str, np.ndarray]:
        """The vectors of those of some passage texts that the table holds, wherever they stand."""
        text_by_key = {text_key(text): text for text in texts}
        if self._has_keys:
            text_by_key = {key: text for key, text in text_by_key.items() if self._may_contain(key)}
        if not text_by_key:
            return {}
        where = f"key IN ({', '.join(map(str, text_by_key))})" if self._has_keys else _sql_in("text", set(texts))
        with self._latest_table() as table:
            found = table.search().where(where).select(["text", "vector"]).to_arrow()
        vectors = found["vector"].combine_chunks().flatten().to_numpy().reshape(len(found), self.settings.dimension)
        requested = set(texts)
        return {
            text: vector for text, vector in zip(found["text"].to_pylist(), vectors, strict=True) if text in requested
        }

    def _may_contain(self, key: int) -> bool:
        """Whether there may be a passage with this key: asked in memory (8 bytes a passage), as most are new."""
        import numpy as np

        if self._old_keys is None:
            with self._latest_table() as table:
                self._old_keys = np.sort(table.search().select(["key"]).to_arrow()["key"].to_numpy())
        position = int(np.searchsorted(self._old_keys, key))
        return key in self._new_keys or (position < len(self._old_keys) and int(self._old_keys[position]) == key)

    def refresh(self) -> None:
        """Forget what was read: another process may have written since."""
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
        """The best passages, best first; the settings are those of `Library.search`."""
        with self._latest_table() as table:
            return search_table(table, mode, text, vector, top, source_filter(source) if source else None)

    def passages(self, sources: Collection[str]) -> dict[str, list[Chunk]]:
        """All passages of some sources, in order, by source; a source that isn't there has none."""
        if not sources:
            return {}
        columns = ["source", "position", "text", "title", "line"]
        with self._latest_table() as table:
            if "page" in table.schema.names:
                columns.append("page")
            rows = table.search().where(_sql_in("source", sources)).select(columns).to_list()
        passages: dict[str, list[Chunk]] = {}
        for row in sorted(rows, key=lambda row: row["position"]):
            passage = Chunk(row["text"], row["source"], row["title"], row["line"], row.get("page"))
            passages.setdefault(row["source"], []).append(passage)
        return passages

    # ---- writing -----------------------------------------------------------------------------------------------------

    def write(self, rows: list[dict[str, Any]], vectors: np.ndarray, replaced: Collection[str]) -> None:
        """Add whole documents, and take away what was there of them.

        Args:
            rows: the passages: all columns but the vector and the key.
            vectors: float32 (passages, dimension).
            replaced: sources among the rows that may have passages already.
        """
        data = self._arrow(rows, vectors)
        if replaced:
            self._has_deletions = True
            merge = self._table.merge_insert(["source", "position"])
            merge = merge.when_matched_update_all().when_not_matched_insert_all()
            merge.when_not_matched_by_source_delete(_sql_in("source", replaced)).execute(data)
        else:
            self._table.add(data)
        if self._has_keys:
            self._new_keys.update(data["key"].to_pylist())
        self._commits += 1
        self._uncompacted_rows += len(rows)
        # Joining rewrites the table, so it comes the more seldom the larger the table is.
        if self._commits >= COMMITS_PER_COMPACTION and self._uncompacted_rows * 10 >= self._table.count_rows():
            self.compact()

    def remove(self, sources: Collection[str]) -> None:
        """Take away all passages of some sources."""
        if sources:
            self._has_deletions = True
            self._table.delete(_sql_in("source", sources))

    def start_write(self) -> None:
        """Note that writing goes on. It comes before the first write of a run, and `end` after the last."""
        self._has_deletions = False
        self.mark_indexed({_WRITE_MARKER: ""})

    def finish_write(self) -> None:
        """Put the table in order after a run's writes, and those of a run before that was killed."""
        self.compact(rebuild=(self._has_deletions or self._unfinished) and len(self) <= _MAX_REBUILD_CHUNKS)
        self.clear_indexed([_WRITE_MARKER])
        self._unfinished = False

    @property
    def unfinished(self) -> bool:
        """Whether a run wrote to the table and didn't come to its `end`; `index` must have been asked."""
        return self._unfinished

    def compact(self, *, rebuild: bool = False) -> None:
        """Join the small files that many commits leave behind, and bring the index of words up to date.

        Args:
            rebuild: make the index of words anew; else passages that were taken out go on counting in its statistics.
        """
        from lancedb.index import FTS

        if rebuild or not self._table.list_indices():
            # Words of languages without spaces are found too; names in code are cut at points and underscores.
            fts_config = FTS(base_tokenizer="icu/split", custom_stop_words=_STOP_WORDS)
            self._table.create_index("text", config=fts_config, replace=True)
        self._table.optimize(cleanup_older_than=_CLEANUP_AGE)
        self._commits = self._uncompacted_rows = 0
        if self._file_index is not None:
            self._file_index.optimize(cleanup_older_than=_CLEANUP_AGE)

    def _arrow(self, rows: list[dict[str, Any]], vectors: np.ndarray) -> pa.Table:
        import pyarrow as pa

        schema = self._table.schema
        columns: dict[str, Any] = {
            "key": pa.array([text_key(row["text"]) for row in rows], type=pa.int64()),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), self.settings.dimension),
        }
        for field in schema:
            if field.name not in columns:
                columns[field.name] = pa.array([row[field.name] for row in rows], type=field.type)
        return pa.table([columns[name] for name in schema.names], schema=schema)

    # ---- files that were read to their end ---------------------------------------------------------------------------

    def file_index(self) -> dict[str, str]:
        """The content of each file that was read to its end; such a file need not be parsed again."""
        with _user_errors(self._uri):
            self._file_index = _open_table(self._database, _FILES_TABLE)
            if self._file_index is None:
                return {}
            rows = self._file_index.search().select(["file", "content"]).to_arrow().to_pydict()
        index = dict(zip(rows["file"], rows["content"], strict=True))
        self._unfinished = index.pop(_WRITE_MARKER, None) is not None
        return index

    def mark_indexed(self, contents: Mapping[str, str]) -> None:
        """Note files as read to their end. All of their documents must have been written."""
        import pyarrow as pa

        if not contents:
            return
        schema = pa.schema([("file", pa.string()), ("content", pa.string())])
        rows = pa.table([list(contents), list(contents.values())], schema=schema)
        if self._file_index is None:
            self._file_index = self._database.create_table(_FILES_TABLE, schema=schema, exist_ok=True)
        self._file_index.merge_insert("file").when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def clear_indexed(self, files: Collection[str]) -> None:
        """Forget that files were read. This must come before any passage of theirs is changed."""
        if files and self._file_index is not None:
            self._file_index.delete(_sql_in("file", files))


def text_key(text: str) -> int:
    """64 bits that tell a passage's text from others."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def _settings(table: Table, uri: str) -> Settings:
    stored = (table.schema.metadata or {}).get(_METADATA_KEY)
    settings = json.loads(stored) if stored else {}
    version = settings.get("version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise LlamoryError(
            f"The library at {uri} was made by a later llamory (format {version}; this one knows up to "
            f"{FORMAT_VERSION}); upgrade llamory to use it."
        )
    if version not in _READABLE_VERSIONS:
        raise LlamoryError(
            f"{uri} is not a library that this version of llamory can read; make it again with `llamory index`."
        )
    settings["chunk_size"] = settings.get("passage_length")
    return Settings(**{field.name: settings[field.name] for field in fields(Settings)})


@contextmanager
def _user_errors(uri: str) -> Iterator[None]:
    """Say in a sentence that a library can't be read."""
    try:
        yield
    except (LlamoryError, OSError):
        raise
    except Exception as error:  # LanceDB raises ValueError and RuntimeError for what is missing or broken
        reason = " ".join(str(error).split())[:300]
        raise LlamoryError(
            f"The library at {uri} can't be read: it is damaged or out of reach ({reason}); restore it, or make it "
            "again with `llamory index` in another place."
        ) from error


def _open_table(database: DBConnection, name: str) -> Table | None:
    try:
        return database.open_table(name)
    except ValueError as error:
        if "was not found" not in str(error):
            raise
        return None


def _sql_in(column: str, values: Collection[str]) -> str:
    return f"{column} IN ({', '.join(map(sql_string, sorted(values)))})"

"""Time, disk and memory to index and search a library's table, compared with Faiss flat.

    python benchmarks/index.py [--json docs/results/index.json] [--passages 100000] [--dimension 576] [--queries 100]

Vectors are synthetic (256 clusters with noise, normalised), so no model is timed; texts are parts of Python's standard
library. Each step has its own process, whose peak resident memory is measured above its start. Results are compared
with the exact ten best.

- llamory: passages are written as by `Library.add`, 64 per commit, with the look-up of existing texts; the index of
  words is made at the end.
- with ANN: an index of vectors added to the same table with LanceDB, one row per kind.
- Faiss flat: only the vectors, in memory, then in a file; no texts, sources or words, nothing to update or filter.

Search times are medians of single queries, one after the other, in a process that has searched before; `first` is the
first search of a new process, including the opening of the table or file, without imports.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import GIB, Peak, available_memory, in_child, processor

BATCH = 64
PASSAGES_PER_DOCUMENT = 8
CHARACTERS = 700
CLUSTERS = 256
TOP = 10
SECONDS = 3600.0
# LanceDB's kinds of index, each with its settings as they come.
ANN = ("IvfFlat", "IvfPq", "IvfHnswSq")


def make_vectors(passages: int, dimension: int) -> np.ndarray:
    """Made-up vectors float32 (passages, dimension) of length 1."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((CLUSTERS, dimension), dtype=np.float32)
    vectors = np.empty((passages, dimension), dtype=np.float32)
    for start in range(0, passages, 4096):
        part = vectors[start : start + 4096]
        rng.standard_normal(out=part, dtype=np.float32)
        part += centres[rng.integers(CLUSTERS, size=len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def make_queries(vectors: np.ndarray, count: int) -> np.ndarray:
    """Queries near some of the vectors."""
    rng = np.random.default_rng(1)
    chosen = vectors[rng.choice(len(vectors), size=count, replace=count > len(vectors))]
    queries = chosen + rng.standard_normal(chosen.shape, dtype=np.float32) * (0.5 / chosen.shape[1] ** 0.5)
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def make_texts(passages: int) -> list[str]:
    """Pieces of source text, each another one."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(folder.rglob("*.py")) if not {"test", "site-packages"} & set(path.parts)]
    # One byte a letter: a single wide one would quadruple the memory of all.
    source = "\n".join(path.read_text(errors="ignore").encode("ascii", "ignore").decode() for path in paths)
    texts = []
    for i in range(passages):
        wraps, offset = divmod(i * CHARACTERS, len(source) - 2 * CHARACTERS)
        offset += wraps * 37
        texts.append(source[offset : offset + CHARACTERS])
    return texts


def word_queries(count: int, passages: int) -> list[str]:
    """Three longer words each, from a text that is there."""
    texts = make_texts(min(passages, 5000))
    rng = np.random.default_rng(2)
    queries = []
    while len(queries) < count:
        words = [word for word in texts[rng.integers(len(texts))].split() if word.isalpha() and len(word) > 3]
        if len(words) >= 3:
            queries.append(" ".join(rng.choice(words, size=3, replace=False)))
    return queries


# ---- each runs in a process of its own -------------------------------------------------------------------------------


def index_library(folder: str, passages: int, dimension: int) -> dict[str, Any]:
    """Write the table."""
    import lancedb.index  # noqa: F401 -- so that it isn't counted
    import pyarrow  # noqa: F401

    from llamory.library.store import PassageStore, Settings

    vectors, texts = make_vectors(passages, dimension), make_texts(passages)
    peak, start = Peak(), time.perf_counter()
    store = PassageStore.create(folder, Settings("made up", "0", dimension, 256))
    store.start_write()
    for at in range(0, passages, BATCH):
        rows = [
            {
                "text": texts[i],
                "source": f"/documents/{i // PASSAGES_PER_DOCUMENT}.txt",
                "title": f"Document {i // PASSAGES_PER_DOCUMENT}",
                "line": 1 + i % PASSAGES_PER_DOCUMENT,
                "page": None,
                "position": i % PASSAGES_PER_DOCUMENT,
                "file": f"/documents/{i // PASSAGES_PER_DOCUMENT}.txt",
                "hash": f"{i // PASSAGES_PER_DOCUMENT:032}",
            }
            for i in range(at, min(at + BATCH, passages))
        ]
        store.vectors([row["text"] for row in rows])
        store.write(rows, vectors[at : at + len(rows)], [])
        store.mark_indexed({row["file"]: "content" for row in rows[:1]})
    writing = {"writing_seconds": time.perf_counter() - start, "writing_peak": peak.bytes()}
    store.finish_write()
    return writing | {"seconds": time.perf_counter() - start, "peak": peak.bytes()}


def clear_states(folder: str) -> dict[str, Any]:
    """Take away earlier states of a table, as any run does with those older than a minute; this one is too short."""
    import lancedb

    lancedb.connect(folder).open_table("passages").optimize(cleanup_older_than=timedelta(0))
    return {}


def index_ann(folder: str, kind: str) -> dict[str, Any]:
    """Add an index of vectors."""
    import lancedb
    from lancedb import index

    peak, start = Peak(), time.perf_counter()
    table = lancedb.connect(folder).open_table("passages")
    table.create_index("vector", config=getattr(index, kind)(distance_type="cosine"), replace=True)
    return {"seconds": time.perf_counter() - start, "peak": peak.bytes()}


def search_library(folder: str, passages: int, dimension: int, count: int) -> dict[str, Any]:
    """Search by meaning, by words and by both."""
    import lancedb.index  # noqa: F401 -- so that it isn't counted
    import pyarrow  # noqa: F401

    from llamory.library.store import PassageStore

    queries, words = make_queries(make_vectors(passages, dimension), count), word_queries(count, passages)
    peak, start = Peak(), time.perf_counter()
    store = PassageStore.open(folder)
    assert store is not None
    store.search(queries[0], TOP)
    first = time.perf_counter() - start
    found: list[list[int]] = []

    def dense(i: int) -> None:
        hits = store.search(queries[i], TOP)
        found.append([_number(hit.source, hit.line) for hit in hits])

    result = {"first": first, "dense": _median(dense, count), "found": found, "dense_peak": peak.bytes()}
    result["bm25"] = _median(lambda i: store.search(None, TOP, text=words[i], mode="bm25"), count)
    result["fused"] = _median(lambda i: store.search(queries[i], TOP, text=words[i], mode="fused"), count)
    one_source = "/documents/1*"
    result["filtered"] = _median(lambda i: store.search(queries[i], TOP, one_source), count)
    return result | {"peak": peak.bytes()}


def index_faiss(file: str, passages: int, dimension: int) -> dict[str, Any]:
    """Fill and save a flat index."""
    import faiss

    vectors = make_vectors(passages, dimension)
    peak, start = Peak(), time.perf_counter()
    flat = faiss.IndexFlatIP(dimension)
    for at in range(0, passages, BATCH):
        flat.add(vectors[at : at + BATCH])
    faiss.write_index(flat, file)
    return {"seconds": time.perf_counter() - start, "peak": peak.bytes()}


def search_faiss(file: str, passages: int, dimension: int, count: int) -> dict[str, Any]:
    """Search a flat index that was read from its file."""
    import faiss

    queries = make_queries(make_vectors(passages, dimension), count)
    peak, start = Peak(), time.perf_counter()
    flat = faiss.read_index(file)
    flat.search(queries[:1], TOP)
    first = time.perf_counter() - start
    found: list[list[int]] = []
    seconds = _median(lambda i: found.append(flat.search(queries[i : i + 1], TOP)[1][0].tolist()), count)
    return {"first": first, "dense": seconds, "found": found, "peak": peak.bytes()}


def _number(source: str, line: int) -> int:
    return int(Path(source).stem) * PASSAGES_PER_DOCUMENT + line - 1


def _median(function: Callable[[int], Any], count: int) -> float:
    times = []
    for i in range(count):
        start = time.perf_counter()
        function(i)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


# ---- the table -------------------------------------------------------------------------------------------------------


def disk_size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All rows by name."""
    size = (options.passages, options.dimension)
    vectors = make_vectors(*size)
    queries = make_queries(vectors, options.queries)
    exact = np.argsort(-(queries @ vectors.T), axis=1)[:, :TOP].tolist()
    del vectors
    limits: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "seconds": SECONDS,
        "memory": max(4 * GIB, available_memory() // 2),
    }
    table, file = folder / "table", folder / "faiss"
    rows: dict[str, Any] = {}

    def add(name: str, index: dict[str, Any], path: Path, search: Callable[..., dict]) -> None:
        if path.is_dir():
            in_child(clear_states, str(path), **limits)
        answer = {} if "skipped" in index else in_child(search, str(path), *size, options.queries, **limits)
        found = answer.pop("found", [])
        hits = [len(set(a) & set(b)) / TOP for a, b in zip(found, exact, strict=bool(found))]
        rows[name] = {
            "index": index,
            "search": answer,
            "disk": disk_size(path),
            "recall": statistics.fmean(hits or [0]),
        }
        show(name, rows[name])

    add("Faiss flat", in_child(index_faiss, str(file), *size, **limits), file, search_faiss)
    add("llamory", in_child(index_library, str(table), *size, **limits), table, search_library)
    for kind in ANN:
        copy = folder / kind
        shutil.copytree(table, copy)
        add(f"llamory with {kind}", in_child(index_ann, str(copy), kind, **limits), copy, search_library)
        shutil.rmtree(copy)
    return rows


def show(name: str, row: dict[str, Any]) -> None:
    """One line of the table."""
    index, search = row["index"], row["search"]
    if reason := index.get("skipped") or search.get("skipped"):
        print(f"{name:24}{reason}", flush=True)
        return
    times = "".join(f"{search[key] * 1e3:9.1f}" if key in search else f"{'':9}" for key in SEARCHES)
    print(
        f"{name:24}{index['seconds']:9.1f}{index['peak'] / 1e6:9.0f}{row['disk'] / 1e6:9.0f}{times}"
        f"{search['peak'] / 1e6:9.0f}{row['recall']:8.3f}",
        flush=True,
    )


SEARCHES = ("first", "dense", "bm25", "fused", "filtered")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=576)
    parser.add_argument("--queries", type=int, default=100)
    options = parser.parse_args()
    machine = f"{processor()}, {torch.get_num_threads()} threads"
    print(f"{machine}; {options.passages} passages, {options.dimension} dimensions, {options.queries} queries")
    print(f"{'':24}{'index s':>9}{'MB':>9}{'disk MB':>9}" + "".join(f"{key:>9}" for key in SEARCHES), end="")
    print(f"{'peak MB':>9}{'recall':>8}   (times of searches in ms)")
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options)
    if options.json:
        metadata = {
            "command": f"python benchmarks/index.py {shlex.join(sys.argv[1:])}".strip(),
            "machine": machine,
            "passages": options.passages,
            "dimension": options.dimension,
            "queries": options.queries,
            "characters": CHARACTERS,
        }
        options.json.write_text(json.dumps(metadata | {"results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""Time to first token: all documents in the prompt, encoded into memory, or attached from memory files.

    python benchmarks/ask.py [--json FILE] [--num-documents 10] [--tokens 4000] [--lengths 1000 4000 16000]

One question about some documents of equal length (source text of the standard library), without the time to load a
model:

(a) stock: the stock model with all text in its prompt and its full cache;
(b) reading: nothing is in memory; every document is encoded, its memory is written, then the answer begins;
(c) mounting: the memory files exist: "disk" (dropped from the page cache), "cache" (in the page cache, first question
    of a process) and "open" (a later question of the process).

(b) and (c) use exact search, then pages with documents of each of `--lengths`. Goals: (c) at least 20 times faster than
(a); with pages, a factor of at most 1.5 between the shortest and the longest documents. Each case has its own process;
(c) gives the median of some repeats.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from harness import available_memory, in_child, processor
from llamory.documents import Chunk

QUESTION = "Which function reads the lines of a file, and what does it return?"
PASSAGE_LINES = 20
UNLIMITED = 1 << 50  # mapped files count as resident memory


class StubLibrary:
    """What questions need of a library: passages by source.

    Args:
        path: folder of the memory files.
        tokens: of each document.
        count: number of documents.
        model: whose tokenizer counts.
    """

    def __init__(self, path: str, tokens: int, count: int, model: str):
        self.path = path
        self._documents = {f"{number:02}.py": text for number, text in enumerate(texts(tokens, count, model))}

    def sources(self) -> list[str]:
        return list(self._documents)

    def passages_of(self, sources: Iterable[str]) -> dict[str, list[Chunk]]:
        found = {}
        for source in sources:
            lines = self._documents[source].split("\n")
            parts = ["\n".join(lines[at : at + PASSAGE_LINES]) for at in range(0, len(lines), PASSAGE_LINES)]
            found[source] = [Chunk(part, source, "", at * PASSAGE_LINES + 1) for at, part in enumerate(parts) if part]
        return found


def texts(tokens: int, count: int, model: str) -> list[str]:
    """Different parts of the standard library's source text, each of `tokens` tokens."""
    from llamory.models.base import load_tokenizer

    tokenizer, wanted, found = load_tokenizer(model), count * tokens, list[int]()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        found += tokenizer(path.read_text(errors="replace"), add_special_tokens=False, verbose=False)["input_ids"]
        if len(found) >= wanted:
            return [tokenizer.decode(found[at : at + tokens]) for at in range(0, wanted, tokens)]
    raise SystemExit(f"The standard library has only {len(found):,} tokens, not {wanted:,}.")


# ---- the ways, each in a process of its own --------------------------------------------------------------------------


def stock(model: str, tokens: int, count: int) -> dict[str, Any]:
    """(a): everything in the prompt."""
    from llamory.models.base import load_model, load_tokenizer

    loaded, tokenizer = load_model(model, dtype=torch.float32), load_tokenizer(model)
    prompt = "\n\n".join([*texts(tokens, count, model), QUESTION])
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    started = time.perf_counter()
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt", verbose=False)["input_ids"]
    loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False, pad_token_id=0)
    return {"seconds": [time.perf_counter() - started], "prompt_tokens": ids.shape[1]}


def reading(model: str, tokens: int, count: int, folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """(b): nothing is in memory yet; the written memory files serve (c)."""
    source = _source(_reader(model, settings), StubLibrary(folder, tokens, count, model), settings)
    answer = _ask(source)
    size = source.reader.memory_cache.nbytes
    return {"seconds": [answer.seconds_to_first_token], "memory_tokens": answer.tokens_read, "bytes": size}


def mounting(
    model: str, tokens: int, count: int, folder: str, settings: dict[str, Any], cache_state: str, repeats: int
) -> dict[str, Any]:
    """(c): all memory files exist. `cache_state` is "disk", "cache" or "open"."""
    reader, library = _reader(model, settings), StubLibrary(folder, tokens, count, model)
    # The first pass of a model is slower; exclude it.
    reader.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=1, do_sample=False, pad_token_id=0)
    source, found = _source(reader, library, settings), []
    if cache_state == "open":
        _ask(source)
    for _ in range(repeats):
        if cache_state != "open":
            del source  # mapped files stay in the page cache
            gc.collect()
            if cache_state == "disk":
                drop_page_cache(Path(folder))
            source = _source(reader, library, settings)
        answer = _ask(source)
        assert answer.tokens_read == 0, "a memory was missing"
        found.append(answer)
    return {
        "seconds": [each.seconds_to_first_token for each in found],
        "seconds_to_attach": [each.seconds_to_attach for each in found],
        "memory_tokens": found[0].memory_tokens,
        "bytes": source.reader.memory_cache.nbytes,
    }


def drop_page_cache(folder: Path) -> None:
    """Drop all files of a folder from the page cache."""
    for path in folder.rglob("*.safetensors*"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _reader(model: str, settings: dict[str, Any]) -> Any:
    from llamory.library.reader import Reader, ReaderConfig

    return Reader(ReaderConfig(reader=model, **settings), Path(tempfile.gettempdir()))


def _source(reader: Any, library: Any, settings: dict[str, Any]) -> Any:
    """A source without loaded memories, with a loaded model."""
    from llamory.library.qa import LibrarySource
    from llamory.library.reader import ReaderConfig

    reader_settings = ReaderConfig(
        reader=reader.model, tokenizer=reader.tokenizer, memory_budget=settings["memory_budget"]
    )
    source = LibrarySource(library, reader_settings, progress=False)
    assert source.reader.model is reader.model
    return source


def _ask(source: Any) -> Any:
    return source.session(documents=["*"], citations=0).ask(QUESTION, max_new_tokens=1, evidence_ratio=0)


# ---- the run ---------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure all cases and print a table."""
    options = _options()
    machine = f"{processor()}, {options.threads} threads, torch {torch.__version__}"
    command = f"python benchmarks/{Path(sys.argv[0]).name} {shlex.join(sys.argv[1:])}".strip()
    print(f"{machine}; {options.num_documents} documents\n")
    print(f"{'way':36}{'tokens each':>12}{'first token':>13}{'mounting':>10}{'of (a)':>9}{'memory':>10}")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for way, tokens, result in _measurements(options, folder):
            row = {"way": way, "tokens_each": tokens, **result}
            if "seconds" in row:
                row["median"] = statistics.median(row["seconds"])
                base = next((each["median"] for each in rows if each["way"] == "(a) stock" and "median" in each), None)
                if base and tokens == options.tokens:
                    row["ratio"] = base / row["median"]
            rows.append(row)
            _print(row)
    spread = _spread(rows)
    for cache_state, value in spread.items():
        print(f"{cache_state}: longest documents {value:.2f} times the shortest ones' time")
    if options.json:
        facts = {"machine": machine, "command": command, "documents": options.num_documents, "question": QUESTION}
        options.json.write_text(json.dumps(facts | {"rows": rows, "spread": spread}, indent=1) + "\n")


def _measurements(options: argparse.Namespace, folder: str) -> Iterable[tuple[str, int, dict[str, Any]]]:
    limits = {"threads": options.threads, "seconds": options.time_limit}
    common = {"memory_budget": UNLIMITED, "mem_dtype": options.mem_dtype}
    arguments = (options.model, options.tokens, options.num_documents)
    if not options.without_baseline:
        yield "(a) stock", options.tokens, in_child(stock, *arguments, memory=available_memory(), **limits)
    for search in ("exact", "pages"):
        settings = common | {"mem_search": search}
        for tokens in [options.tokens] if search == "exact" else options.lengths:
            arguments = (options.model, tokens, options.num_documents, f"{folder}/{search}-{tokens}", settings)
            yield f"(b) reading, {search}", tokens, in_child(reading, *arguments, memory=UNLIMITED, **limits)
            for cache_state in ("disk", "cache", "open"):
                result = in_child(mounting, *arguments, cache_state, options.repeats, memory=UNLIMITED, **limits)
                yield f"(c) mounting, {search}, {cache_state}", tokens, result


def _print(row: dict[str, Any]) -> None:
    if "median" not in row:
        print(f"{row['way']:36}{row['tokens_each']:>12,}  {row['skipped']}", flush=True)
        return
    mounting = f"{statistics.median(row['seconds_to_attach']):>8.3f} s" if "seconds_to_attach" in row else f"{'':>10}"
    ratio = f"{row['ratio']:>8.1f}x" if "ratio" in row else f"{'':>9}"
    size = f"{row['bytes'] / 1e6:>7.0f} MB" if "bytes" in row else ""
    print(
        f"{row['way']:36}{row['tokens_each']:>12,}{row['median']:>11.3f} s{mounting}{ratio}{size}",
        flush=True,
    )


def _spread(rows: list[dict[str, Any]]) -> dict[str, float]:
    """With pages: the time for the longest documents over that for the shortest, for each cache state."""
    spread = {}
    for way in dict.fromkeys(row["way"] for row in rows if row["way"].startswith("(c) mounting, pages")):
        times = {row["tokens_each"]: row["median"] for row in rows if row["way"] == way and "median" in row}
        if len(times) > 1:
            spread[way] = times[max(times)] / times[min(times)]
    return spread


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--model", default="base", help="a folder, hub id, .gguf file or 'base'")
    parser.add_argument("--num-documents", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=4000, help="of each document, for (a), (b) and (c)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 4000, 16000], help="tokens each, for pages")
    parser.add_argument("--mem-dtype", default="bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="of (c)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--time-limit", type=float, default=3600.0, help="after so many a way is stopped")
    parser.add_argument("--folder", help="where the memories go meanwhile; some GB")
    parser.add_argument("--without-baseline", action="store_true", help="leave (a) out")
    return parser.parse_args()


if __name__ == "__main__":
    main()

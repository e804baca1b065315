"""The main tasks from end to end, with the packaged adapters and the Python standard library as documents.

Index functions, search them, and ask: the documents found are encoded into memory once, and the answer cites them. Then
encode a document that is longer than the model's context, and ask about its start. Last, find a number in the middle of
65,536 tokens.
"""

from __future__ import annotations

import ast
import json
import resource
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from llamory.library import Library

QUESTIONS = [
    "how do I parse a date from a string",
    "run a command and read its output",
    "wrap a paragraph to a given width",
]
LIBRARY_QUESTIONS = [
    "What does shlex.split do?",
    "What does bisect.insort_right do?",
    "What does bisect.insort_right do?",
]
# Common modules: some 1,100 functions, few enough for two cores.
MODULES = """
argparse base64 bisect calendar collections/__init__ configparser contextlib copy csv datetime difflib fnmatch
functools glob gzip heapq html/__init__ html/parser http/client http/server json/__init__ json/decoder json/encoder
linecache logging/__init__ os pathlib posixpath queue random re/__init__ secrets shelve shlex shutil socket statistics
string subprocess tempfile textwrap threading timeit traceback urllib/parse urllib/request zipapp zipfile _strptime
""".split()
CHUNK_SIZE = 96
# Longer than the context of SmolLM2, 8,192 tokens; the answer is in the first lines. The packaged adapter was not
# trained on it.
LONG_DOCUMENT, LONG_QUESTION = "http/client.py", "What is the value of _MAXHEADERS?"

# Tokens of the passkey prompt.
PROMPT = 65_536


def functions(folder: Path) -> Iterator[tuple[str, str]]:
    """Name with arguments, and docstring, of every documented function of the modules."""
    for name in MODULES:
        file = folder / f"{name}.py"
        if file.exists():
            yield from _walk(
                ast.parse(file.read_text(encoding="utf-8")), name.removesuffix("/__init__").replace("/", ".")
            )


def _walk(node: ast.AST, scope: str) -> Iterator[tuple[str, str]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{scope}.{child.name}"
            docstring = ast.get_docstring(child)
            if docstring and not isinstance(child, ast.ClassDef):
                yield f"{name}({ast.unparse(child.args)})", docstring
            yield from _walk(child, name)


def write_texts(folder: Path, texts: Path) -> int:
    """Write what is indexed, one function per line; returns the number of functions."""
    lines = [
        json.dumps({"title": signature.split("(")[0], "text": f"{signature}\n{docstring}"})
        for signature, docstring in functions(folder)
    ]
    texts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(lines)


def main() -> int:
    """Run the demo; returns the exit code."""
    started = time.perf_counter()
    console = Console(file=sys.stderr)

    def report_progress(text: str) -> None:
        minutes, seconds = divmod(int(time.perf_counter() - started), 60)
        console.print(f"[bold][{minutes}:{seconds:02}][/bold] {text}", highlight=False, soft_wrap=True)

    from llamory.cli.output import silence_libraries

    silence_libraries()
    from llamory.library import Library

    with tempfile.TemporaryDirectory(prefix="llamory-demo-") as name:
        folder = Path(name)
        texts = folder / "functions.jsonl"
        count = write_texts(Path(sysconfig.get_path("stdlib")), texts)
        report_progress(f"Indexing {count} functions of the standard library with the packaged retriever.")
        library = Library(folder / "library", model="default", bf16=True)
        report = library.add(texts, chunk_size=CHUNK_SIZE)
        report_progress(f"{report.passages} passages of {report.added} functions are indexed.")
        out = Console()
        for question in QUESTIONS:
            out.print(f"\n[bold]{question}?[/bold]", highlight=False)
            for rank, hit in enumerate(library.search(question, top=3), start=1):
                summary = hit.text.partition("\n")[2] or hit.text
                line = f"  {rank}. {hit.title}: {' '.join(summary.split())[:80]}"
                out.print(line, highlight=False, markup=False, soft_wrap=True)
        report_progress("Asking the library: documents are encoded into memory once, and attached from then on.")
        for question in LIBRARY_QUESTIONS:
            ask(library, question, out)
        report_progress(f"Encoding {LONG_DOCUMENT} into memory, window by window.")
        read_and_ask(Path(sysconfig.get_path("stdlib")) / LONG_DOCUMENT, folder / "memory_file", out)
        report_progress(f"Finding the passkey in the middle of {PROMPT:,} tokens.")
        find_passkey(out)
        report_progress("Done.")
    return 0


def ask(library: Library, question: str, out: Console) -> None:
    """Ask the library, and show the citations."""
    answer = library.ask(question, top_documents=3, citations=3, max_new_tokens=40)
    out.print(f"\n[bold]{question}[/bold]", highlight=False)
    out.print(f"  {answer.text}", highlight=False, markup=False, soft_wrap=True)
    for citation in answer.citations:
        bar = "█" * round(20 * citation.share)
        out.print(f"  {bar:<20} {citation.share:4.0%}  {citation.title}", highlight=False, markup=False, soft_wrap=True)
    out.print(
        f"  (from {answer.evidence_tokens} tokens of memory, {answer.tokens_read} tokens encoded for it; first token "
        f"after {answer.seconds_to_first_token:.1f} s)",
        highlight=False,
    )


def read_and_ask(document: Path, memory_file: Path, out: Console) -> None:
    """Encode a document into a memory file and ask about its start."""
    from llamory.ingest.encode import read_documents_into
    from llamory.models.base import load_config
    from llamory.qa.open_memory import OpenMemory

    report = read_documents_into(memory_file, document, model="reader", bf16=True)
    memory = OpenMemory(memory_file, bf16=True)
    context = load_config("default").max_position_embeddings
    out.print(
        f"\n{report.tokens:,} tokens, {report.tokens / context:.1f} times the model's context of {context:,}, encoded "
        f"in {report.seconds:.0f} s in windows of {memory.model.config.max_position_embeddings}; stored in "
        f"{report.bytes / 1e6:.0f} MB.",
        highlight=False,
        soft_wrap=True,
    )
    answer = memory.ask(LONG_QUESTION, max_new_tokens=16)
    out.print(f"[bold]{LONG_QUESTION}[/bold]", highlight=False)
    out.print(f"  {answer.answer}", highlight=False, markup=False, soft_wrap=True)
    out.print(f"  ({answer.seconds:.1f} s, without encoding it again)", highlight=False)


def find_passkey(out: Console) -> None:
    """Find the key of the published passkey prompt; its windows are encoded independently and attached."""
    import torch

    from llamory.evaluation.haystack import IndependentDocumentPrompts
    from llamory.evaluation.passkey import run_passkey
    from llamory.longllama.loading import load_long_model
    from llamory.models.base import load_tokenizer

    start = time.perf_counter()
    model, tokenizer = load_long_model("reader", dtype=torch.bfloat16), load_tokenizer("reader")
    prompts = IndependentDocumentPrompts(model, tokenizer)
    found = run_passkey(model, tokenizer, [PROMPT], [0.5], trials=1, prompts=prompts).cells[0].trials[0]
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform != "darwin" else 2**30)
    out.print(f"\n[bold]The pass key is {found.key}. Remember it.[/bold] … What is the pass key?", highlight=False)
    out.print(f"  {found.answer.strip()}", highlight=False, markup=False, soft_wrap=True)
    out.print(
        f"  ({found.tokens:,} tokens; {seconds:.0f} s with loading, encoding and answering; the whole demo took "
        f"{peak:.1f} GiB of memory at most)",
        highlight=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""`llamory ask`: asks a library, or what was read into a memory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from llamory.cli import ask_options as options
from llamory.cli.memory_options import Bf16, Device, Search, TopK
from llamory.cli.output import Json, Quiet, print_json, working


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    library: options.LibraryPath = None,
    memory: options.MemoryFiles = None,
    documents: options.Documents = None,
    top: options.Top = None,
    source: options.Source = None,
    mode: options.Mode = None,
    citations: options.Citations = None,
    model: options.Model = None,
    reader: options.ReaderName = None,
    mem_layers: options.MemLayers = None,
    context_length: options.ContextLength = None,
    mem_dtype: options.MemDtype = None,
    memory_budget: options.Budget = None,
    mem_search: Search = None,
    mem_top_k: TopK = None,
    max_new_tokens: options.MaxNewTokens = 256,
    max_question_tokens: options.MaxQuestionTokens = None,
    focus: options.Focus = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    last_context_length: options.LastContext = None,
    bf16: Bf16 = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a library: the documents that fit are found, mounted and cited. Or ask one or more memory files.

    The answer comes word by word; under it are the passages that drew the most attention, with the share of each.
    """
    given, out = dict(locals()), sys.stdout
    with working(quiet=quiet):
        asked = options.Asked.of(given, None if as_json else lambda text: options.write_text(out, text))
        if asked.memory:
            opened = asked.open_memory()
            answer: Any = opened.ask(question, **asked.manner)
            name = opened.name
        else:
            library_asked = asked.open_library()
            answer = library_asked.ask(
                question, progress=True, documents=asked.documents, **asked.finding, **asked.manner
            )
            name = library_asked.desk().reader.name
    if as_json:
        print_json(asked.where | {"model": name} | asdict(answer))
        return
    out.write("\n")
    if citations_of := getattr(answer, "citations", []):
        out.write("\n")
        options.write_citations(out, citations_of)

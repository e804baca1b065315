"""`llamory ask`: asks a library, or what was read into a memory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from llamory.cli import ask_options as options
from llamory.cli.memory_options import Bf16, Device, MemSearch, MemTopK
from llamory.cli.output import Json, Quiet, print_json, stdout_redirected


def ask(
    question: Annotated[str, typer.Argument(help="The question.")],
    library: options.LibraryPath = None,
    memory: options.MemoryFiles = None,
    documents: options.Documents = None,
    top_documents: options.TopDocuments = None,
    source: options.Source = None,
    mode: options.Mode = None,
    citations: options.Citations = None,
    model: options.Model = None,
    reader: options.ReaderName = None,
    mem_layers: options.MemLayers = None,
    context_length: options.ContextLength = None,
    mem_dtype: options.MemDtype = None,
    memory_budget: options.MemoryBudget = None,
    mem_search: MemSearch = None,
    mem_top_k: MemTopK = None,
    max_new_tokens: options.MaxNewTokens = 256,
    max_question_tokens: options.MaxQuestionTokens = None,
    evidence_ratio: options.EvidenceRatio = None,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    last_context_length: options.LastContextLength = None,
    bf16: Bf16 = False,
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a library: the documents that fit are found, mounted and cited. Or ask one or more memory files.

    The answer comes word by word; under it are the passages that drew the most attention, with the share of each.
    """
    arguments, out = dict(locals()), sys.stdout
    with stdout_redirected(quiet=quiet):
        ask_options = options.AskOptions.of(arguments, None if as_json else lambda text: options.write_text(out, text))
        if ask_options.memory:
            opened_memory = ask_options.open_memory()
            answer: Any = opened_memory.ask(question, **ask_options.generation_options)
            name = opened_memory.name
        else:
            opened_library = ask_options.open_library()
            answer = opened_library.ask(
                question,
                progress=True,
                documents=ask_options.documents,
                **ask_options.retrieval_options,
                **ask_options.generation_options,
            )
            name = opened_library.qa_session().reader.name
    if as_json:
        print_json(ask_options.target | {"model": name} | asdict(answer))
        return
    out.write("\n")
    if citations_of := getattr(answer, "citations", []):
        out.write("\n")
        options.write_citations(out, citations_of)

"""`llamory chat`: a conversation with a library or a memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from llamory.cli import ask_options as options
from llamory.cli.memory_options import Bf16, Device, MemSearch, MemTopK
from llamory.cli.output import Json, Quiet, print_json, stdout_redirected
from llamory.errors import LlamoryError

_PROMPT = "> "
_QUIT_COMMANDS = ("/quit", "/exit")
_HELP = "Ask away; /quit or Ctrl-D ends."


def chat(
    library: options.LibraryPath = None,
    memory: options.MemoryFiles = None,
    documents: options.Documents = None,
    top_documents: options.TopDocuments = None,
    source: options.Source = None,
    mode: options.Mode = None,
    citations: options.Citations = None,
    save: Annotated[
        Path | None,
        typer.Option(help="At the end, write the documents and what was said to this memory file.", show_default=False),
    ] = None,
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
    """Talk with a library or with memory files: questions are lines of standard input, and what was said is remembered.

    With a library each question finds the documents it needs, which stay in memory. An empty line is passed over;
    /quit or the end of the input (Ctrl-D) ends.
    """
    arguments, out, interactive = dict(locals()), sys.stdout, sys.stdin.isatty()
    with stdout_redirected(quiet=quiet):
        ask_options = options.AskOptions.of(arguments, None if as_json else lambda text: options.write_text(out, text))
        chat_session: Any
        if ask_options.memory:
            chat_session = ask_options.open_memory().chat()
        else:
            chat_session = ask_options.open_library().chat(
                progress=True, documents=ask_options.documents, **ask_options.retrieval_options
            )
        if interactive:
            sys.stderr.write(f"{_HELP}\n")
        for question in _questions(interactive=interactive):
            if not interactive and not as_json:
                options.write_text(out, f"{_PROMPT}{question}\n")
            try:
                answer = chat_session.ask(question, **ask_options.generation_options)
            except LlamoryError as error:
                if not interactive:
                    raise
                sys.stderr.write(f"{error}\n")  # somebody sits there and can ask something else
                continue
            if not as_json:
                _end_turn(out, getattr(answer, "citations", []))
        if save is not None:
            chat_session.save(save)
    if as_json:
        print_json(ask_options.target | {"turns": [asdict(turn) for turn in chat_session.turns]})


def _end_turn(out: TextIO, citations: list[Any]) -> None:
    out.write("\n")
    if citations:
        out.write("\n")
        options.write_citations(out, citations)
    out.write("\n")
    out.flush()


def _questions(*, interactive: bool) -> Iterator[str]:
    """The lines of standard input until it ends; blank ones are left out.

    Args:
        interactive: whether somebody types them, who wants to be prompted.
    """
    while True:
        try:
            line = input(_PROMPT if interactive else "").strip()
        except EOFError:
            return
        if line in _QUIT_COMMANDS:
            return
        if line:
            yield line

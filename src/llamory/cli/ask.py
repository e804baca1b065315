"""`llamory ask` and `llamory chat`: questions to a library or to memory files."""

from __future__ import annotations

import dataclasses
import io
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from llamory.cli import options
from llamory.cli.options import ADVANCED, GENERATION, SEARCH, Option, explicit, integer
from llamory.cli.output import print_json, stdout_redirected, write_printable
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.qa.attribution import Citation

_PROMPT = "> "
_QUIT_COMMANDS = ("/quit", "/exit")
_HELP = "Ask away; /quit or Ctrl-D ends."
_BAR_WIDTH = 12
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclasses.dataclass(kw_only=True)
class SourceOptions:
    """What is asked, a library or memory files, and the model."""

    library: Annotated[str | None, Option("Library: a folder or an object-store address.")] = None
    memory: Annotated[list[Path] | None, Option("Memory file of `llamory read`.")] = None
    model: Annotated[str | None, Option("Model of the memory or of the library, if it has moved.")] = None
    device: options.Device = None


@dataclasses.dataclass(kw_only=True)
class RetrievalOptions:
    """Which documents of a library a question finds, and how many of its passages are cited."""

    documents: Annotated[list[str] | None, Option("Ask this document only.", SEARCH, flag="--document")] = None
    top_documents: Annotated[int | None, Option("Documents to retrieve per question, 5 if not given.", SEARCH)] = None
    source: options.Source = None
    mode: Annotated[Literal["dense", "bm25", "fused"] | None, Option(options.SEARCH_MODE_HELP, SEARCH)] = None
    citations: Annotated[int | None, Option("Largest number of passages to cite.", SEARCH, integer(0))] = None


@dataclasses.dataclass(kw_only=True)
class GenerationOptions:
    """How the answer is generated."""

    max_new_tokens: Annotated[int, Option("Largest number of tokens of an answer.", GENERATION)] = 256
    temperature: Annotated[float, Option("Sampling temperature; 0 decodes greedily.", GENERATION)] = 0.0
    seed: Annotated[int | None, Option("Random seed for sampling.", GENERATION, integer(0, options.MAX_SEED))] = None


@dataclasses.dataclass(kw_only=True)
class AdvancedOptions(options.MemorySearchOptions, options.ReaderOptions):
    """The expert options of `ask` and `chat`."""

    last_context_length: options.LastContextLength = None
    evidence_ratio: Annotated[
        float | None,
        Option("Drop evidence of a query likelihood more than this many times below the best; 0 keeps all.", ADVANCED),
    ] = None
    max_question_tokens: Annotated[int | None, Option("Refuse a question of more tokens.", ADVANCED)] = None
    bf16: options.Bf16 = False


def ask(
    question: Annotated[str, typer.Argument(parser=options.text, help="The question.")],
    target: SourceOptions,
    retrieval: RetrievalOptions,
    generation: GenerationOptions,
    advanced: AdvancedOptions,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask a library or memory files a question, and get an answer with citations.

    A library is searched for the documents that fit the question, and their memories are loaded. Under the answer are
    the passages that drew the most attention, each with its share.
    """
    out = sys.stdout
    with stdout_redirected(quiet=quiet):
        _check_target(target, retrieval, advanced)
        kwargs = _generation_kwargs(generation, advanced, None if as_json else out)
        if target.memory:
            memory = _open_memory(target, retrieval, advanced)
            name, answer = memory.name, memory.ask(question, **kwargs)
        else:
            library = _open_library(target, advanced)
            answer = library.ask(question, progress=True, **explicit(retrieval), **kwargs)
            name = library.qa_source().reader.name
    if as_json:
        print_json(_target_fields(target) | {"model": name} | dataclasses.asdict(answer))
        return
    out.write("\n")
    _write_citations(out, getattr(answer, "citations", []))


def chat(
    target: SourceOptions,
    retrieval: RetrievalOptions,
    generation: GenerationOptions,
    advanced: AdvancedOptions,
    save: Annotated[
        Path | None, Option("Write documents and conversation to this memory file.", options.OUTPUT)
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Chat with a library or memory files; each line of standard input is a question.

    The questions and answers stay in memory. Each question to a library retrieves the documents it needs, which stay
    in memory as well. Empty lines are skipped; /quit or the end of the input (Ctrl-D) ends the chat.
    """
    out, interactive = sys.stdout, sys.stdin.isatty()
    with stdout_redirected(quiet=quiet):
        _check_target(target, retrieval, advanced)
        kwargs = _generation_kwargs(generation, advanced, None if as_json else out)
        if target.memory:
            session = _open_memory(target, retrieval, advanced).chat()
        else:
            session = _open_library(target, advanced).chat(progress=True, **explicit(retrieval))
        if interactive:
            sys.stderr.write(f"{_HELP}\n")
        for question in _questions(interactive=interactive):
            if not interactive and not as_json:
                write_printable(out, f"{_PROMPT}{question}\n")
            try:
                answer = session.ask(question, **kwargs)
            except LlamoryError as error:
                if not interactive:
                    raise
                sys.stderr.write(f"{error}\n")  # the user can ask something else
                continue
            if not as_json:
                out.write("\n")
                _write_citations(out, getattr(answer, "citations", []))
                write_printable(out, "\n")
        if save is not None:
            session.save(save)
    if as_json:
        print_json(_target_fields(target) | {"turns": [dataclasses.asdict(turn) for turn in session.turns]})


def _check_target(target: SourceOptions, retrieval: RetrievalOptions, advanced: AdvancedOptions) -> None:
    if bool(target.library) == bool(target.memory):
        raise LlamoryError("Give either --library DIR or --memory FILE, to say what is asked.")
    library_only = explicit(retrieval, "top_documents", "source", "mode", "citations") | _reader_settings(advanced)
    if target.memory and library_only:
        flag = next(iter(library_only)).replace("_", "-")
        raise LlamoryError(f"--{flag} goes with --library; the settings of a memory file are fixed when it is read.")


def _reader_settings(advanced: AdvancedOptions) -> dict[str, Any]:
    return explicit(advanced, *(field.name for field in dataclasses.fields(options.ReaderOptions)))


def _model_kwargs(target: SourceOptions, advanced: AdvancedOptions) -> dict[str, Any]:
    kwargs = explicit(advanced, "mem_search", "mem_top_k", "last_context_length", "bf16")
    return kwargs | {"model": target.model, "device": target.device}


def _generation_kwargs(generation: GenerationOptions, advanced: AdvancedOptions, out: TextIO | None) -> dict[str, Any]:
    kwargs = explicit(generation) | explicit(advanced, "evidence_ratio", "max_question_tokens")
    return kwargs if out is None else kwargs | {"on_text": partial(write_printable, out)}


def _open_memory(target: SourceOptions, retrieval: RetrievalOptions, advanced: AdvancedOptions) -> Any:
    from llamory.qa.open_memory import OpenMemory

    return OpenMemory(target.memory or [], documents=retrieval.documents or None, **_model_kwargs(target, advanced))


def _open_library(target: SourceOptions, advanced: AdvancedOptions) -> Any:
    from llamory.library import Library

    return Library(str(target.library), **_reader_settings(advanced), **_model_kwargs(target, advanced))


def _target_fields(target: SourceOptions) -> dict[str, Any]:
    return {"memory": list(map(str, target.memory))} if target.memory else {"library": target.library}


def _questions(*, interactive: bool) -> Iterator[str]:
    """The lines of standard input that aren't blank, with a prompt if `interactive`; invalid bytes are replaced."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    while True:
        try:
            line = input(_PROMPT if interactive else "").strip()
        except EOFError:
            return
        if line in _QUIT_COMMANDS:
            return
        if line:
            yield line


def _write_citations(out: TextIO, citations: Iterable[Citation]) -> None:
    """Write one line per citation, after an empty one: its share as a bar and in percent, its location, its title."""
    for index, citation in enumerate(citations):
        title = "" if citation.title in citation.location else f"  {citation.title}"
        line = f"{share_bar(citation.share, out.encoding)} {citation.share:>4.0%}  {citation.location}{title}"
        write_printable(out, ("" if index else "\n") + line.replace("\n", " ").rstrip() + "\n")


def share_bar(share: float, encoding: str | None = "utf-8") -> str:
    """A bar of 12 characters for a share from 0 to 1, of # if the encoding has no block characters."""
    eighths = round(share * _BAR_WIDTH * 8)
    shown = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    try:
        shown.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        shown = "#" * round(share * _BAR_WIDTH)
    return f"{shown:<{_BAR_WIDTH}}"

"""What `llamory ask` and `llamory chat` share: their options, what they ask, and how answers are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO

import typer

from llamory.cli.memory_options import parse_layers
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from llamory.library import Citation, Library
    from llamory.qa.open_memory import OpenMemory

LibraryPath = Annotated[
    str | None,
    typer.Option("--library", help="Folder (or object-store address) of a library.", show_default=False),
]
MemoryFiles = Annotated[
    list[Path] | None,
    typer.Option("--memory", help="Memory file of `llamory read`; may be given several times.", show_default=False),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="The model that made the memory, or the library's embedder, if it was moved.",
        show_default=False,
    ),
]
Documents = Annotated[
    list[str] | None,
    typer.Option("--document", help="Only this document; may be given several times.", show_default=False),
]
TopDocuments = Annotated[
    int | None, typer.Option("--top-documents", min=1, help="Documents that a question finds; 5.", show_default=False)
]
Source = Annotated[
    list[str] | None,
    typer.Option(
        "--source",
        help="Find only in files that this pattern fits, such as 'docs/*.md'; may be given again.",
        show_default=False,
    ),
]
Mode = Annotated[
    Literal["dense", "bm25", "fused"] | None,
    typer.Option("--mode", help="Find by meaning, by words, or by both.", show_default=False),
]
Citations = Annotated[
    int | None, typer.Option("--citations", min=0, help="Most passages to cite; 5.", show_default=False)
]
ReaderName = Annotated[
    str | None,
    typer.Option(
        "--reader",
        help="Who reads a library's documents (folder, .gguf file, hub id or 'default'); by default who did so first.",
        show_default=False,
    ),
]
MemDtype = Annotated[
    Literal["float32", "bfloat16", "float16", "int8"] | None,
    typer.Option("--mem-dtype", help="How a library keeps memory; int8 takes the least room.", show_default=False),
]
MemLayers = Annotated[
    str | None, typer.Option("--mem-layers", help="The reader's memory layers, such as 5-29.", show_default=False)
]
ContextLength = Annotated[
    int | None,
    typer.Option("--context-length", min=1, help="Tokens that the reader reads at once.", show_default=False),
]
MemoryBudget = Annotated[
    str | None,
    typer.Option("--memory-budget", help="What a library's memory may take on the disk; 10GB.", show_default=False),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
MaxQuestionTokens = Annotated[
    int | None,
    typer.Option("--max-question-tokens", min=1, help="Refuse a question of more tokens.", show_default=False),
]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="Sample the answer; 0 takes the likeliest.")]
EvidenceRatio = Annotated[
    float | None,
    typer.Option(
        "--evidence-ratio",
        min=0.0,
        help="Leave out documents, and stretches of long ones, that make the question so many times less likely than "
        "the best does; 100 if nothing is said, 0 answers from all.",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed for sampling.", show_default=False)]
LastContextLength = Annotated[
    int | None,
    typer.Option("--last-context-length", min=1, help="Tokens of a long question that stay local.", show_default=False),
]

_BAR = 12
_EIGHTHS = " ▏▎▍▌▋▊▉█"


@dataclass(frozen=True)
class AskOptions:
    """What is asked, and how; made of the options of a command.

    Attributes:
        library, memory: one of the two.
        model, documents: as given.
        model_options: settings of the model, of either.
        reader_settings: settings of a library's reader.
        retrieval_options: which documents of a library, and how many citations.
        generation_options: how to answer.
    """

    library: str | None
    memory: list[Path] | None
    model: str | None
    documents: list[str] | None
    model_options: dict[str, Any]
    reader_settings: dict[str, Any]
    retrieval_options: dict[str, Any]
    generation_options: dict[str, Any]

    @classmethod
    def of(cls, given: Mapping[str, Any], on_text: Callable[[str], None] | None) -> AskOptions:
        """From all arguments of a command, by name.

        Raises:
            LlamoryError: not exactly one of library and memory was given, or an option that memory files don't have.
        """

        def selected(*names: str) -> dict[str, Any]:
            return {name: given[name] for name in names if given[name] not in (None, [])}

        asked = cls(
            given["library"],
            given["memory"],
            given["model"],
            given["documents"] or None,
            selected("mem_search", "mem_top_k", "last_context_length", "bf16", "device"),
            reader_options(given),
            selected("top_documents", "source", "mode", "citations"),
            selected("max_new_tokens", "max_question_tokens", "temperature", "seed", "evidence_ratio")
            | {"on_text": on_text},
        )
        if bool(asked.library) == bool(asked.memory):
            raise LlamoryError("Give either --library DIR or --memory FILE, to say what is asked.")
        if asked.memory and (unsupported := list(asked.retrieval_options | asked.reader_settings)):
            name = unsupported[0].replace("_", "-")
            raise LlamoryError(f"--{name} goes with --library; a memory file is as it was read.")
        return asked

    @property
    def target(self) -> dict[str, Any]:
        """What is asked, for JSON."""
        return {"memory": list(map(str, self.memory))} if self.memory else {"library": self.library}

    def open_memory(self) -> OpenMemory:
        """The memory files."""
        from llamory.qa.open_memory import OpenMemory

        return OpenMemory(list(self.memory or ()), model=self.model, documents=self.documents, **self.model_options)

    def open_library(self) -> Library:
        """The library."""
        from llamory.library import Library

        return Library(str(self.library), model=self.model, **self.reader_settings, **self.model_options)


def reader_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """What was given of a library's reader, from all arguments of a command.

    Raises:
        LlamoryError: layers are no layers.
    """
    names = ("reader", "mem_layers", "context_length", "mem_dtype", "memory_budget")
    settings = {name: given[name] for name in names if given[name] is not None}
    if "mem_layers" in settings:
        settings["mem_layers"] = parse_layers(settings["mem_layers"])
    return settings


def write_text(out: TextIO, text: str) -> None:
    """Write text as it comes; what a model says must not steer the terminal."""
    encoding = out.encoding or "utf-8"
    out.write(_printable(text).encode(encoding, "replace").decode(encoding))
    out.flush()


def write_citations(out: TextIO, citations: Iterable[Citation]) -> None:
    """Write citations, a line each: a share_bar and the share in percent, the location and the title."""
    for citation in citations:
        title = "" if citation.title in citation.location else f"  {citation.title}"
        line = f"{share_bar(citation.share, out.encoding)} {citation.share:>4.0%}  {citation.location}{title}"
        write_text(out, line.replace("\n", " ").rstrip() + "\n")


def share_bar(share: float, encoding: str | None = "utf-8") -> str:
    """A share from 0 to 1 as a share_bar of 12 characters; of # target the output doesn't know blocks."""
    eighths = round(share * _BAR * 8)
    shown = "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
    try:
        shown.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        shown = "#" * round(share * _BAR)
    return f"{shown:<{_BAR}}"


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter in "\n\t" else " " for letter in text)

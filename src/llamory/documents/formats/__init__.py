"""Document formats. A new format is one module here and one line in `FORMATS`; tests then need a sample of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llamory.documents.formats.html import read_html
from llamory.documents.formats.markdown import read_markdown, read_notebook, read_rst
from llamory.documents.formats.pdf import read_pdf
from llamory.documents.formats.text import ParsedFile, decode, read_python, read_text
from llamory.errors import LlamoryError


@dataclass(frozen=True)
class Format:
    """How files of a suffix are read."""

    read_text: Callable[[str, str], ParsedFile] = read_text  # of text and name; raises ValueError if it is invalid
    read_bytes: Callable[[Path, bytes], ParsedFile] | None = None  # reads a binary format instead
    code: bool = False  # whether it is program text, which is cut between lines instead of sentences


_TEXT = (".txt", ".text", ".tex", ".org", ".adoc")
_CODE = (
    *(".c", ".cc", ".cpp", ".cu", ".cxx", ".h", ".hh", ".hpp", ".cs", ".dart", ".go", ".java", ".kt", ".m", ".rs"),
    *(".scala", ".swift", ".zig", ".clj", ".erl", ".ex", ".exs", ".hs", ".ml"),
    *(".jl", ".js", ".jsx", ".lua", ".mjs", ".php", ".pl", ".pyi", ".r", ".rb", ".ts", ".tsx", ".vue"),
    *(".bash", ".ps1", ".sh", ".zsh", ".cfg", ".css", ".graphql", ".ini", ".proto", ".sql", ".toml", ".yaml", ".yml"),
)
FORMATS: Mapping[str, Format] = {
    **dict.fromkeys(_TEXT, Format()),
    **dict.fromkeys(_CODE, Format(code=True)),
    **dict.fromkeys((".md", ".markdown"), Format(read_markdown)),
    ".rst": Format(read_rst),
    **dict.fromkeys((".html", ".htm"), Format(read_html)),
    ".py": Format(read_python, code=True),
    ".ipynb": Format(read_notebook),
    ".pdf": Format(read_bytes=read_pdf),
}
JSON_LINES = ".jsonl"  # holds one document per line, see `llamory.documents.readers`
SUFFIXES = frozenset({*FORMATS, JSON_LINES})


def parse(path: Path, data: bytes) -> ParsedFile:
    """Title, text and sections of a file's content; LlamoryError if it isn't valid in the suffix's format."""
    file_format = FORMATS.get(path.suffix.lower(), Format())
    if not data.strip():
        return ParsedFile("", "", [])
    if file_format.read_bytes is not None:
        return file_format.read_bytes(path, data)
    name = path.resolve().parent.name if path.name == "__init__.py" else path.stem
    try:
        return file_format.read_text(decode(path, data), name)
    except LlamoryError:
        raise
    except ValueError as error:
        raise LlamoryError(f"{path}: {error}.") from error


def supported_suffixes() -> str:
    """All suffixes that can be read, for error messages."""
    return " ".join(sorted(SUFFIXES))

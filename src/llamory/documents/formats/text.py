"""Plain text: decoding, and paragraphs. Python: functions and methods.

A reader of a text format takes a file's text and the name for a document without title, and returns a `ParsedFile`.
"""

from __future__ import annotations

import ast
import codecs
import io
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from llamory.documents.document import Section
from llamory.errors import LlamoryError

# Byte order marks by encoding; UTF-32's begins like UTF-16's, so it is first.
_BOMS = {"utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}


class ParsedFile(NamedTuple):
    """A file's title, its whole text, and its sections in order."""

    title: str
    text: str
    sections: list[Section]


def read_text(text: str, name: str) -> ParsedFile:
    """Paragraphs, all with the document's name as title."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.strip() and (i == 0 or not lines[i - 1].strip())]
    return ParsedFile(name, text, sections_at(lines, ((start, name) for start in starts)))


def sections_at(lines: list[str], starts: Iterable[tuple[int, str]]) -> list[Section]:
    """Sections from (first line, title), lines counted from 0, each up to the next; blank ones are left out."""
    sections = []
    for (start, title), (stop, _) in pairwise([*starts, (len(lines), "")]):
        while start < stop and not lines[start].strip():
            start += 1
        while stop > start and not lines[stop - 1].strip():
            stop -= 1
        if start < stop:
            sections.append(Section("\n".join(lines[start:stop]), title, start + 1))
    return sections


def read_python(text: str, name: str) -> ParsedFile:
    """Functions and methods of a Python module, and the code around them; text that isn't Python has paragraphs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in somebody's strings
            module = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return read_text(text, name)
    lines = text.split("\n")
    starts = [(0, name)]
    if ast.get_docstring(module, clean=False) is not None and len(module.body) > 1:
        starts.append((module.body[0].end_lineno or 0, name))
    for first, last, title, outer_title in _definitions(module.body, name):
        while first > starts[-1][0] and lines[first - 1].lstrip().startswith("#"):
            first -= 1  # a comment just above belongs to the function
        starts += [(first, title), (last, outer_title)]
    return ParsedFile(name, text, sections_at(lines, starts))


def _definitions(body: Iterable[ast.stmt], title: str) -> Iterator[tuple[int, int, str, str]]:
    """Functions and class headers: first line, line after the last (from 0), title, title of what follows."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _first_line(node), node.end_lineno or 0, f"{title}.{node.name}", title
        elif isinstance(node, ast.ClassDef):
            inner = f"{title}.{node.name}"
            yield _first_line(node), _first_line(node), inner, inner
            yield from _definitions(node.body, inner)
            yield node.end_lineno or 0, node.end_lineno or 0, title, title
        else:
            for branch in ("body", "handlers", "orelse", "finalbody", "cases"):
                yield from _definitions(getattr(node, branch, ()), title)


def _first_line(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def decode(path: Path, data: bytes) -> str:
    """Text with plain newlines; in UTF-8, or the encoding of a byte order mark or (in Python files) a declaration.

    Raises LlamoryError if the bytes are no text, or text in another encoding.
    """
    encoding = next((name for name, boms in _BOMS.items() if data.startswith(boms)), "utf-8-sig")
    if encoding == "utf-8-sig" and path.suffix.lower() == ".py":
        with suppress(SyntaxError):  # for an unknown encoding UTF-8 is the best guess
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    binary = LlamoryError(f"{path} is a binary file, not text; give it the suffix of its kind.")
    if b"\0" in data and not encoding.startswith(("utf-16", "utf-32")):
        raise binary
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        expected = encoding.upper().removesuffix("-SIG")
        raise LlamoryError(f"{path}:{line}: the file is not {expected} text; save it as UTF-8.") from error
    if "\0" in text:
        raise binary
    return text.replace("\r\n", "\n").replace("\r", "\n")

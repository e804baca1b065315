"""Documents, their sections, and chunks of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A natural part of a document: a section, a paragraph, a function."""

    text: str  # with its heading, without blank lines around it
    title: str  # its heading, `module.Class.method` for Python, else the document's title
    line: int  # its first line, counted from 1 (within the page, if there are pages)
    verbatim: bool = (
        True  # whether lines of `text` are lines of the file, so that later ones can be counted from `line`
    )
    page: int | None = None  # its page (PDF) or cell (notebook), counted from 1


@dataclass(frozen=True)
class Document:
    """A whole document."""

    text: str  # of HTML only the visible text
    source: str  # the path as it was given; `path:line` for JSON lines
    title: str  # its title, or the file's name without suffix
    sections: tuple[Section, ...]  # in order; together they hold every word of `text` once
    code: bool = False  # whether it is program text, which is split between lines instead of sentences


@dataclass(frozen=True)
class Chunk:
    """A part of a document that fits a model; `title` is its section's, `line` and `page` (or cell) are its first."""

    text: str
    source: str
    title: str
    line: int
    page: int | None = None

    @property
    def location(self) -> str:
        """Where the chunk starts: `path:line`, or `path, page 3`."""
        return location(self.source, self.line, self.page)


def location(source: str, line: int, page: int | None = None) -> str:
    """A readable location: `path:line`, `path, page 3` or `path, cell 3`; for JSON lines the source itself."""
    if page is not None:
        return f"{source}, {'cell' if source.lower().endswith('.ipynb') else 'page'} {page}"
    return source if source.endswith(f":{line}") else f"{source}:{line}"

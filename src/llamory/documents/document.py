"""What a document, a part of it and a passage are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Section:
    """A natural part of a document: a section, a paragraph, a function.

    Attributes:
        text: the part's text with its heading, without blank lines around it.
        title: its heading, `module.Class.method` for Python, the document's title where there is no heading.
        line: number of the line where it starts, counted from 1.
        verbatim: whether lines of `text` are lines of the file, so that later lines can be counted from `line`.
        page: number of its page (PDF) or cell (notebook), counted from 1; None where there are no such. Lines are then
            counted in the page.
    """

    text: str
    title: str
    line: int
    verbatim: bool = True
    page: int | None = None


@dataclass(frozen=True)
class Document:
    """A whole document.

    Attributes:
        text: the whole text; of HTML only what a reader sees.
        source: the path as it was given, for JSON lines `path:line`.
        title: its title, or the file's name without suffix.
        sections: its parts in order; together they hold every word of `text`, once.
        code: whether it is program text, which has lines, not sentences.
    """

    text: str
    source: str
    title: str
    sections: tuple[Section, ...]
    code: bool = False


@dataclass(frozen=True)
class Chunk:
    """A piece of a document, short enough for a model.

    Attributes:
        text: the passage.
        source: the document's source.
        title: title of the section it is from.
        line: number of the line where it starts, counted from 1.
        page: number of the page or cell where it starts; None where there are no such.
    """

    text: str
    source: str
    title: str
    line: int
    page: int | None = None

    @property
    def location(self) -> str:
        """Where the passage starts: `path:line`, or `path, page 3`."""
        return location(self.source, self.line, self.page)


def location(source: str, line: int, page: int | None = None) -> str:
    """A location as people read it: `path:line`, `path, page 3` or `path, cell 3`; for JSON lines the source itself."""
    if page is not None:
        return f"{source}, {'cell' if source.lower().endswith('.ipynb') else 'page'} {page}"
    return source if source.endswith(f":{line}") else f"{source}:{line}"

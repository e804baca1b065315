"""Markdown and reStructuredText: sections by heading. Jupyter notebooks: the text and the code of their cells."""

from __future__ import annotations

import json
import re
from itertools import pairwise

from markdown_it import MarkdownIt

from llamory.documents.document import Section
from llamory.documents.formats.text import ParsedFile, read_text, sections_at

_MARKDOWN = MarkdownIt("commonmark").enable("table")
# The block structure is enough to find headings, and several times faster than a full parse.
_MARKDOWN_BLOCKS = MarkdownIt("commonmark").enable("table")
_MARKDOWN_BLOCKS.core.ruler.enableOnly(["normalize", "block"])
_FRONT_MATTER = re.compile(r"---\n(?=[\w-]+:)(?:.*\n)*?(?:---|\.\.\.)[ \t]*\n")
_UNDERLINE = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*")


def read_markdown(text: str, name: str) -> ParsedFile:
    """Sections of a Markdown text."""
    return _sections(text, markdown_headings(text), name)


def markdown_headings(text: str) -> list[tuple[int, str]]:
    """Line (counted from 0) and text, without markup, of each heading of a Markdown text."""
    front_matter = _FRONT_MATTER.match(text)
    body = text if front_matter is None else "\n" * front_matter.group().count("\n") + text[front_matter.end() :]
    tokens = _MARKDOWN_BLOCKS.parse(body)
    return [
        (token.map[0], _plain_heading(inline.content))
        for token, inline in pairwise(tokens)
        if token.type == "heading_open" and token.level == 0 and token.map
    ]


def read_rst(text: str, name: str) -> ParsedFile:
    """Sections of a reStructuredText text."""
    lines = text.split("\n")
    headings = []
    for i in range(1, len(lines)):
        title, underline = lines[i - 1], lines[i].rstrip()
        if not _UNDERLINE.fullmatch(underline) or not title.strip() or _UNDERLINE.fullmatch(title):
            continue
        overlined = i >= 2 and lines[i - 2].rstrip() == underline
        above = lines[i - 3 if overlined else i - 2].strip() if i >= (3 if overlined else 2) else ""
        if not above and len(title.strip()) <= len(underline) and (overlined or not title[0].isspace()):
            headings.append((i - 2 if overlined else i - 1, title.strip()))
    return _sections(text, headings, name)


def read_notebook(text: str, name: str) -> ParsedFile:
    """Sections of the Markdown and code cells, under the last heading, without outputs; ValueError if invalid."""
    try:
        notebook = json.loads(text)
        cells = notebook["cells"]
        sources = [("".join(cell["source"]), cell["cell_type"]) for cell in cells]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"the file is not a notebook of version 4 ({type(error).__name__}: {error})") from error
    title, sections = "", list[Section]()
    current = name
    for number, (source, kind) in enumerate(sources, 1):
        source = source.replace("\r\n", "\n").encode("utf-8", "ignore").decode()
        if kind == "markdown":
            headings = [(line, heading or current) for line, heading in markdown_headings(source)]
            title = title or (headings[0][1] if headings else "")
            cell_sections = sections_at(source.split("\n"), [(0, current), *headings])
        else:
            cell_sections = read_text(source, current).sections
        for section in cell_sections:
            current = section.title
            sections.append(Section(section.text, current, section.line, page=number))
    return ParsedFile(title or name, "\n\n".join(section.text for section in sections), sections)


def _sections(text: str, headings: list[tuple[int, str]], name: str) -> ParsedFile:
    title = next((heading for _, heading in headings if heading), name)
    starts = [(0, title), *((line, heading or title) for line, heading in headings)]
    return ParsedFile(title, text, sections_at(text.split("\n"), starts))


def _plain_heading(content: str) -> str:
    children = _MARKDOWN.parseInline(content)[0].children or []
    return "".join(" " if child.type == "softbreak" else child.content for child in children).strip()

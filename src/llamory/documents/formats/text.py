"""Read the parts of one text: by headings, by paragraphs, by functions.

Every reader takes the text of a file and the name for a document without title, and gives title, text and document_sections.
"""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from itertools import pairwise

from markdown_it import MarkdownIt

from llamory.documents.document import Section

ParsedText = tuple[str, str, list[Section]]

_MARKDOWN = MarkdownIt("commonmark").enable("table")
# Section structure is enough to find headings, and it is several times faster than a full parse.
_MARKDOWN_BLOCKS = MarkdownIt("commonmark").enable("table")
_MARKDOWN_BLOCKS.core.ruler.enableOnly(["normalize", "block"])
_FRONT_MATTER = re.compile(r"---\n(?=[\w-]+:)(?:.*\n)*?(?:---|\.\.\.)[ \t]*\n")
_UNDERLINE = re.compile(r"([!-/:-@\[-`{-~])\1{2,}\s*")


def read_text(text: str, name: str) -> ParsedText:
    """Paragraphs, all under the document's name."""
    lines = text.split("\n")
    starts = [i for i, line in enumerate(lines) if line.strip() and (i == 0 or not lines[i - 1].strip())]
    return name, text, sections_at(lines, ((start, name) for start in starts))


def read_markdown(text: str, name: str) -> ParsedText:
    """Sections of a Markdown text."""
    return _sections(text, markdown_headings(text), name)


def markdown_headings(text: str) -> list[tuple[int, str]]:
    """Line (from 0) and plain words of each heading of a Markdown text."""
    front_matter = _FRONT_MATTER.match(text)
    body = text if front_matter is None else "\n" * front_matter.group().count("\n") + text[front_matter.end() :]
    tokens = _MARKDOWN_BLOCKS.parse(body)
    return [
        (token.map[0], _plain_heading(inline.content))
        for token, inline in pairwise(tokens)
        if token.type == "heading_open" and token.level == 0 and token.map
    ]


def read_rst(text: str, name: str) -> ParsedText:
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


def read_html(text: str, name: str) -> ParsedText:
    """Sections of an HTML page: what a reader sees of it."""
    page = _HtmlTextExtractor()
    page.feed(text)
    page.close()
    sections = [
        (_normalize_whitespace("".join(parts)), " ".join("".join(title).split()), line)
        for parts, title, line in page.sections
    ]
    title = " ".join("".join(page.title).split()) or next((t for _, t, _ in sections if t), name)
    document_sections = [
        Section(body, heading or title, line, verbatim=False) for body, heading, line in sections if body
    ]
    return title, "\n\n".join(section.text for section in document_sections), document_sections


def read_python(text: str, name: str) -> ParsedText:
    """Functions and methods of a Python module, and the code outer_title them; a text that isn't Python has paragraphs."""
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
    return name, text, sections_at(lines, starts)


# ---- shared by the formats -----------------------------------------------------------------------------------------


def sections_at(lines: list[str], starts: Iterable[tuple[int, str]]) -> list[Section]:
    """Blocks that begin at the given lines (counted from 0), each up to the next; blank ones are left out."""
    document_sections = []
    for (start, title), (end, _) in pairwise([*starts, (len(lines), "")]):
        while start < end and not lines[start].strip():
            start += 1
        while end > start and not lines[end - 1].strip():
            end -= 1
        if start < end:
            document_sections.append(Section("\n".join(lines[start:end]), title, start + 1))
    return document_sections


def _sections(text: str, headings: list[tuple[int, str]], name: str) -> ParsedText:
    title = next((heading for _, heading in headings if heading), name)
    return title, text, sections_at(text.split("\n"), [(0, title), *((line, head or title) for line, head in headings)])


def _plain_heading(content: str) -> str:
    """A Markdown heading without its markup."""
    children = _MARKDOWN.parseInline(content)[0].children or []
    return "".join(" " if child.type == "softbreak" else child.content for child in children).strip()


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


# ---- HTML ----------------------------------------------------------------------------------------------------------

_HEADING_TAGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_HIDDEN_TAGS = {"script", "style", "template", "noscript"}
_BLOCK_TAGS = {
    *_HEADING_TAGS,
    *("address", "article", "aside", "blockquote", "body", "details", "dialog", "div", "dl", "fieldset", "figure"),
    *("footer", "form", "header", "hr", "main", "nav", "ol", "p", "pre", "section", "table", "ul"),
}
_LINE_BREAK_TAGS = {"br", "li", "tr", "dt", "dd", "figcaption", "summary", "caption", "option"}


class _HtmlTextExtractor(HTMLParser):
    """Collects what is seen of a page: per section its pieces, its heading's pieces, and the line it starts at."""

    def __init__(self) -> None:
        super().__init__()
        self.title: list[str] = []
        self.sections: list[tuple[list[str], list[str], int]] = [([], [], 1)]
        self._hidden_tags: list[str] = []
        self._in_title = self._in_heading = False
        self._preformatted = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self._in_title = tag == "title" and not self._has_body_text()
        if tag in _BLOCK_TAGS:
            self._in_heading = tag in _HEADING_TAGS
        if tag in _HIDDEN_TAGS:
            self._hidden_tags.append(tag)
        elif tag in _HEADING_TAGS and not self._hidden_tags:
            self.sections.append(([], [], self.getpos()[0]))
        elif tag in ("td", "th"):
            self._add(" ")
        if tag == "pre":
            self._preformatted += 1
        self._add_break(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._hidden_tags and tag == self._hidden_tags[-1]:
            self._hidden_tags.pop()
        elif tag == "title":
            self._in_title = False
        elif tag in _HEADING_TAGS:
            self._in_heading = False
        elif tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        self._add_break(tag)

    def handle_data(self, data: str) -> None:
        if self._hidden_tags:
            return
        if self._in_title:
            self.title.append(data)
            return
        parts, heading, line = self.sections[-1]
        if len(self.sections) == 1 and data.strip() and not self._has_body_text():
            line = self.getpos()[0] + data[: len(data) - len(data.lstrip())].count("\n")
            self.sections[-1] = (parts, heading, line)
        if self._in_heading:
            heading.append(data)
        if not self._preformatted:
            data = re.sub(r"\s+", " ", data)
            if not parts or parts[-1][-1:].isspace():
                data = data.lstrip()
        parts.append(data)

    def _add(self, space: str) -> None:
        if not self._hidden_tags:
            self.sections[-1][0].append(space)

    def _add_break(self, tag: str) -> None:
        if tag in _BLOCK_TAGS:
            self._add("\n\n")
        elif tag in _LINE_BREAK_TAGS:
            self._add("\n")

    def _has_body_text(self) -> bool:
        return len(self.sections) > 1 or any(part.strip() for part in self.sections[0][0])


def _normalize_whitespace(text: str) -> str:
    text = re.sub(r" +\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()

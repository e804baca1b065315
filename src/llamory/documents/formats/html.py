"""HTML pages: the visible text, in sections by heading."""

from __future__ import annotations

import re
from html.parser import HTMLParser

from llamory.documents.document import Section
from llamory.documents.formats.text import ParsedFile

_HEADING_TAGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
_HIDDEN_TAGS = {"script", "style", "template", "noscript"}
_BLOCK_TAGS = {
    *_HEADING_TAGS,
    *("address", "article", "aside", "blockquote", "body", "details", "dialog", "div", "dl", "fieldset", "figure"),
    *("footer", "form", "header", "hr", "main", "nav", "ol", "p", "pre", "section", "table", "ul"),
}
_LINE_BREAK_TAGS = {"br", "li", "tr", "dt", "dd", "figcaption", "summary", "caption", "option"}
_SPACES = {**dict.fromkeys(_BLOCK_TAGS, "\n\n"), **dict.fromkeys(_LINE_BREAK_TAGS, "\n")}  # at both ends of a tag


def read_html(text: str, name: str) -> ParsedFile:
    """The visible text of an HTML page, in sections by heading."""
    page = _HtmlTextExtractor()
    page.feed(text)
    page.close()
    sections = [(_paragraphs("".join(parts)), _one_line(title), line) for parts, title, line in page.sections]
    title = _one_line(page.title) or next((t for _, t, _ in sections if t), name)
    parts = [Section(body, heading or title, line, verbatim=False) for body, heading, line in sections if body]
    return ParsedFile(title, "\n\n".join(part.text for part in parts), parts)


class _HtmlTextExtractor(HTMLParser):
    """Collects, per section, the parts of its visible text and of its heading, and its first line."""

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
        self._preformatted += tag == "pre"
        self._add(" " if tag in ("td", "th") else _SPACES.get(tag))

    def handle_endtag(self, tag: str) -> None:
        if self._hidden_tags and tag == self._hidden_tags[-1]:
            self._hidden_tags.pop()
        elif tag == "title":
            self._in_title = False
        elif tag in _HEADING_TAGS:
            self._in_heading = False
        elif tag == "pre":
            self._preformatted = max(0, self._preformatted - 1)
        self._add(_SPACES.get(tag))

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

    def _add(self, space: str | None) -> None:
        if space and not self._hidden_tags:
            self.sections[-1][0].append(space)

    def _has_body_text(self) -> bool:
        return len(self.sections) > 1 or any(part.strip() for part in self.sections[0][0])


def _paragraphs(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +\n", "\n", text)).strip()


def _one_line(parts: list[str]) -> str:
    return " ".join("".join(parts).split())

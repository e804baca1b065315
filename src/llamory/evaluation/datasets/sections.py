"""The dataset of sections: the query is a heading of a document, the text the section under it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from llamory.documents import find_files, read_documents
from llamory.documents.document import Document
from llamory.evaluation.datasets import Pair, words

MIN_HEADING_WORDS, MIN_SECTION_WORDS = 2, 20
README = """# Sections

Headings and sections of documents, made by `llamory dataset sections`. The query is a heading, the relevant text is
the section under it.

Documents, each under its own licence:

{sources}
"""
# "3.", "A.1.4", "IV)" and similar; a first word such as "A" or "2001" isn't a section number.
_NUMBER = re.compile(r"(§\s*[0-9]+[.:]?|[0-9]+[.):]|([0-9]+|[A-Z])(\.[0-9A-Za-z]+)+[.):]?|[IVXLC]+[.)])\s+")
_HEADING_MARKUP = " \t¶#*=-~^"


def section_pairs(paths: Iterable[Path]) -> Iterator[Pair]:
    """Heading and section of all documents in files and folders.

    The query is the heading without its number, two words or more; the text is the section up to the next heading, 20
    words or more. Source code, and headings that occur more than once in a document, are left out.
    """
    for document in read_documents(find_files(list(paths)), skip_broken=True):
        if not document.code:
            yield from _pairs(document)


def _pairs(document: Document) -> Iterator[Pair]:
    found: list[tuple[str, str]] = []  # headings and the text under them
    for section in document.sections:
        section_text = _without_heading(section.text, section.title)
        if section_text is not None:
            found.append((section.title, section_text))
        elif found and found[-1][0] == section.title:
            found[-1] = (section.title, f"{found[-1][1]}\n\n{section.text}")
    queries = [plain_heading(title) for title, _ in found]
    for query, (title, text) in zip(queries, found, strict=True):
        long_enough = len(words(query)) >= MIN_HEADING_WORDS and len(words(text)) >= MIN_SECTION_WORDS
        if long_enough and queries.count(query) == 1:
            yield Pair(query, text, text, f"{document.source}: {title}")


def plain_heading(title: str) -> str:
    """A heading without its number and the markup around it."""
    return _NUMBER.sub("", title.strip(_HEADING_MARKUP), count=1).strip()


def _without_heading(text: str, title: str) -> str | None:
    """The text under a heading; None if the text doesn't begin with it, as before a document's first heading."""
    lines = text.split("\n")
    plain_title = " ".join(title.strip(_HEADING_MARKUP).split())
    for number, line in enumerate(lines[:3]):
        if plain_title and " ".join(line.strip(_HEADING_MARKUP).split()) == plain_title:
            rest = lines[number + 1 :]
            while rest and not rest[0].strip(_HEADING_MARKUP):
                rest = rest[1:]
            return "\n".join(rest).strip()
    return None

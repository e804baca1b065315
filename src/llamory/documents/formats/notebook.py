"""Jupyter notebooks: the text and the code of their cells."""

from __future__ import annotations

import json

from llamory.documents.document import Section
from llamory.documents.formats.markdown import markdown_headings
from llamory.documents.formats.text import ParsedFile, read_text, sections_at


def read_notebook(text: str, name: str) -> ParsedFile:
    """Sections of the Markdown and code cells, under the last heading; outputs are left out.

    Raises:
        ValueError: the text isn't a notebook.
    """
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

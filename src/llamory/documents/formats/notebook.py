"""Read Jupyter notebooks: the text and the code of their cells."""

from __future__ import annotations

import json

from llamory.documents.document import Section
from llamory.documents.formats import text as formats


def read_notebook(text: str, name: str) -> formats.ParsedText:
    """Sections of a notebook's Markdown cells, with the code below each; the outputs are left out.

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
            headings = [(line, heading or current) for line, heading in formats.markdown_headings(source)]
            title = title or (headings[0][1] if headings else "")
            cell_sections = formats.sections_at(source.split("\n"), [(0, current), *headings])
        else:
            cell_sections = formats.read_text(source, current)[2]
        for section in cell_sections:
            current = section.title
            sections.append(Section(section.text, current, section.line, page=number))
    return title or name, "\n\n".join(section.text for section in sections), sections

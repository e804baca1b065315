"""Read Jupyter notebooks: the text and the code of their cells."""

from __future__ import annotations

import json

from llamory.documents.document import Block
from llamory.documents.formats import text as formats


def read_notebook(text: str, name: str) -> formats.Parts:
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
    title, blocks = "", list[Block]()
    current = name
    for number, (source, kind) in enumerate(sources, 1):
        source = source.replace("\r\n", "\n").encode("utf-8", "ignore").decode()
        if kind == "markdown":
            headings = [(line, heading or current) for line, heading in formats.markdown_headings(source)]
            title = title or (headings[0][1] if headings else "")
            parts = formats.blocks_at(source.split("\n"), [(0, current), *headings])
        else:
            parts = formats.read_text(source, current)[2]
        for block in parts:
            current = block.title
            blocks.append(Block(block.text, current, block.line, page=number))
    return title or name, "\n\n".join(block.text for block in blocks), blocks

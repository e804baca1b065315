"""Read the text of PDF files, page by page."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.documents.document import Section
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from pypdf import PdfReader


def read_pdf(path: Path, data: bytes) -> tuple[str, str, list[Section]]:
    """Title, text and one block a page of a PDF file; the outline gives the pages their titles.

    Raises:
        LlamoryError: it can't be parsed, needs a password, or holds pictures of text only.
    """
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError, WrongPasswordError

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each small fault that it mends
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted:
            reader.decrypt("")
        texts = [_clean_text(page.extract_text()) for page in reader.pages]
        title = str((reader.metadata and reader.metadata.title) or "").strip() or path.stem
    except (FileNotDecryptedError, WrongPasswordError) as error:
        raise LlamoryError(f"{path} needs a password; save it without one.") from error
    except Exception as error:  # a broken file can make it fail anywhere
        if isinstance(error, MemoryError):
            raise
        raise LlamoryError(f"{path} can't be read as PDF ({type(error).__name__}: {error}).") from error
    if not any(texts):
        raise LlamoryError(f"{path} has no text (perhaps scanned pages); put it through text recognition first.")
    titles = _page_titles(reader, title)
    sections = [
        Section(text, heading, 1, page=number)
        for number, (text, heading) in enumerate(zip(texts, titles, strict=True), 1)
        if text
    ]
    return title, "\n\n".join(texts), sections


def _page_titles(reader: PdfReader, title: str) -> list[str]:
    """For each page the last entry of the outline that begins on it or before it."""
    starts: dict[int, str] = {}

    def visit(entries: list[Any]) -> None:
        for entry in entries:
            if isinstance(entry, list):
                visit(entry)
            elif (number := reader.get_destination_page_number(entry)) is not None:
                starts.setdefault(number, str(entry.title).strip())

    try:
        visit(reader.outline)
    except Exception:  # an outline that is broken is no reason to leave the text out
        logging.getLogger(__name__).debug("The outline of a PDF file can't be read.", exc_info=True)
    titles, current = [], title
    for number in range(len(reader.pages)):
        current = starts.get(number) or current
        titles.append(current)
    return titles


def _clean_text(text: str) -> str:
    # Fonts without a proper table of characters give halves of surrogate pairs and NUL, which no tokenizer reads.
    text = text.encode("utf-8", "ignore").decode().replace("\0", "")
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()

"""PDF files: the text of each page, under the headings of the outline."""

from __future__ import annotations

import io
import logging
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.documents.document import Section
from llamory.documents.formats.text import ParsedFile
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from pypdf import PdfReader

logger = logging.getLogger(__name__)

# What pypdf raises for malformed files, besides its own errors: it checks little before it uses a value.
_MALFORMED = (
    *(LookupError, ValueError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    *(OSError, EOFError, struct.error, zlib.error),
)


def read_pdf(path: Path, data: bytes) -> ParsedFile:
    """Title, text and a section per page; LlamoryError if it can't be parsed, needs a password or has no text."""
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError, WrongPasswordError

    logging.getLogger("pypdf").setLevel(logging.ERROR)  # it warns of each small fault that it repairs
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted:
            reader.decrypt("")
        texts = [_clean_text(page.extract_text()) for page in reader.pages]
        title = str((reader.metadata and reader.metadata.title) or "").strip() or path.stem
    except (FileNotDecryptedError, WrongPasswordError) as error:
        raise LlamoryError(f"{path} needs a password; save it without one.") from error
    except (PyPdfError, DependencyError, *_MALFORMED) as error:
        raise LlamoryError(f"{path} can't be read as PDF ({type(error).__name__}: {error}).") from error
    if not any(texts):
        raise LlamoryError(f"{path} has no text (perhaps scanned pages); put it through text recognition first.")
    titles = _page_titles(path, reader, title)
    pages = enumerate(zip(texts, titles, strict=True), 1)
    sections = [Section(text, heading, 1, page=number) for number, (text, heading) in pages if text]
    return ParsedFile(title, "\n\n".join(texts), sections)


def _page_titles(path: Path, reader: PdfReader, title: str) -> list[str]:
    """For each page, the last outline entry that starts on it or before it."""
    from pypdf.errors import PyPdfError

    starts: dict[int, str] = {}

    def visit(entries: list[Any]) -> None:
        for entry in entries:
            if isinstance(entry, list):
                visit(entry)
            elif (number := reader.get_destination_page_number(entry)) is not None:
                starts.setdefault(number, str(entry.title).strip())

    try:
        visit(reader.outline)
    except (PyPdfError, *_MALFORMED) as error:
        logger.warning("The outline of %s is damaged, so headings of its pages are missing (%r).", path, error)
    titles = [title]
    for page in range(len(reader.pages)):
        titles.append(starts.get(page) or titles[-1])
    return titles[1:]


def _clean_text(text: str) -> str:
    # Fonts without a proper character table give halves of surrogate pairs and NUL, which no tokenizer reads.
    text = text.encode("utf-8", "ignore").decode().replace("\0", "")
    return "\n".join(line.rstrip() for line in text.splitlines()).strip()

"""Read files as documents, and JSON lines as objects."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from llamory.common.io import PathLike
from llamory.documents.document import Document, Section
from llamory.documents.formats import FORMATS, JSON_LINES, parse
from llamory.documents.scan import find_files, open_regular, read_limited, too_large_message
from llamory.errors import LlamoryError

logger = logging.getLogger(__name__)

T = TypeVar("T")
OnBroken = Callable[[str, str], None]


def read_documents(
    paths: PathLike | Iterable[PathLike], *, text_field: str = "text", skip_broken: bool = False
) -> Iterator[Document]:
    """Read files and folders as documents, one by one; documents without text are skipped.

    Args:
        text_field: the field of a JSON line that holds the text.
        skip_broken: skip broken JSON lines and files that aren't UTF-8, with a warning in the log.

    Raises LlamoryError at once as `find_files`; later for a broken line or file, and at the end if there was no text.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = find_files(paths)

    def documents() -> Iterator[Document]:
        empty = True
        for path in files:
            for document in read_file(path, text_field=text_field, skip_broken=skip_broken):
                empty = False
                yield document
        if empty:
            raise LlamoryError(f"No text could be read from {', '.join(map(str, paths))}.")

    return documents()


def read_file(
    path: Path,
    *,
    text_field: str = "text",
    skip_broken: bool = False,
    broken: OnBroken | None = None,
    max_bytes: int | None = None,
    hasher: Any = None,
) -> Iterator[Document]:
    """Read one file: one document, or one per line of a JSON lines file. Errors as `read_documents`.

    Args:
        text_field, skip_broken: as for `read_documents`.
        broken: called for each broken JSON line, which is then skipped.
        max_bytes: a larger file, or a longer line of JSON lines, is broken.
        hasher: its `update` is called with all bytes of the file, in order, as they are read.
    """
    suffix = path.suffix.lower()
    if suffix == JSON_LINES:
        parse_line = _text_and_title(text_field)
        lines = read_json_lines(
            path, parse_line, skip_broken=skip_broken, broken=broken, max_bytes=max_bytes, hasher=hasher
        )
        for line, (text, title) in lines:
            if text.strip():
                yield Document(text, f"{path}:{line}", title, (Section(text, title, line, verbatim=False),))
        return
    try:
        data = read_limited(path, max_bytes)
        if hasher is not None:
            hasher.update(data)
        title, text, sections = parse(path, data)
    except LlamoryError as error:
        if not skip_broken:
            raise
        logger.warning("Skipped 1 file: %s", error)
        return
    if text.strip():
        code = suffix in FORMATS and FORMATS[suffix].code
        yield Document(text, str(path), title, tuple(sections), code=code)


def read_json_lines(
    path: Path,
    parse: Callable[[dict[str, Any]], T],
    *,
    skip_broken: bool = False,
    broken: OnBroken | None = None,
    max_bytes: int | None = None,
    hasher: Any = None,
) -> Iterator[tuple[int, T]]:
    """Read the objects of a JSON lines file, line by line, with their line numbers; blank lines are skipped.

    Args:
        parse: converts an object; it raises LlamoryError with the reason if the object is invalid.
        skip_broken, broken, max_bytes, hasher: as for `read_file`.

    Raises LlamoryError if a line isn't UTF-8, not JSON, no object, or invalid; the message has file and line.
    """
    skipped_lines, first = 0, ""
    with open_regular(path) as file:
        for number, raw in _numbered_lines(file, max_bytes, hasher):
            try:
                if max_bytes is not None and len(raw) > max_bytes:
                    raise LlamoryError(f"the line {too_large_message(len(raw), max_bytes)}")
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                result = parse(_json_object(line))
            except (LlamoryError, UnicodeDecodeError) as error:
                reason = f"the line is not UTF-8 ({error})" if isinstance(error, UnicodeDecodeError) else str(error)
                location, reason = f"{path}:{number}", reason.rstrip(".")
                if broken is not None:
                    broken(location, reason)
                elif not skip_broken:
                    message = f"{location}: {reason}; mend or remove the line, or skip broken lines."
                    raise LlamoryError(message) from error
                skipped_lines, first = skipped_lines + 1, first or f"{location}: {reason}"
                continue
            yield number, result
    if skipped_lines and broken is None:
        plural = "s" if skipped_lines > 1 else ""
        logger.warning("Skipped %d broken line%s; the first: %s", skipped_lines, plural, first)


def _numbered_lines(file: BinaryIO, max_bytes: int | None, hasher: Any) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; only the first `max_bytes` + 1 bytes of a line that is too long."""
    size = -1 if max_bytes is None else max_bytes + 1

    def read_line() -> bytes:
        line = file.readline(size)
        if hasher is not None:
            hasher.update(line)
        return line

    number = 0
    while line := read_line():
        number += 1
        yield number, line
        while max_bytes is not None and len(line) > max_bytes and not line.endswith(b"\n"):
            line = read_line()


def _json_object(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise LlamoryError(f"the line is not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise LlamoryError(f"the line should be a JSON object in braces, not {type(value).__name__}")
    return value


def string_entry(entry: Mapping[str, Any], field: str) -> str:
    """A string of a JSON object; LlamoryError if it is missing, not a string, or not valid Unicode."""
    if field not in entry:
        raise LlamoryError(f"the object has no {field!r} (it has {', '.join(map(repr, entry)) or 'nothing'})")
    text = entry[field]
    if not isinstance(text, str):
        raise LlamoryError(f"{field!r} should be a string, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LlamoryError(f"{field!r} is not valid Unicode ({error})") from error
    return text


def _text_and_title(text_field: str) -> Callable[[dict[str, Any]], tuple[str, str]]:
    def parse(entry: dict[str, Any]) -> tuple[str, str]:
        title = entry.get("title")
        return string_entry(entry, text_field), "" if title is None else string_entry({"title": str(title)}, "title")

    return parse

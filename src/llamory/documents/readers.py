"""Find text files and read them as documents."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

from llamory.documents.document import Document, Section
from llamory.documents.formats import text as formats
from llamory.documents.formats.notebook import read_notebook
from llamory.documents.formats.pdf import read_pdf
from llamory.documents.storage import decode, open_regular, read_limited, too_large_message
from llamory.errors import LlamoryError

logger = logging.getLogger(__name__)

_READERS: Mapping[str, Callable[[str, str], formats.ParsedText]] = {
    **dict.fromkeys((".md", ".markdown"), formats.read_markdown),
    ".rst": formats.read_rst,
    **dict.fromkeys((".html", ".htm"), formats.read_html),
    ".py": formats.read_python,
    ".ipynb": read_notebook,
}
_PDF = ".pdf"
_JSON_LINES = ".jsonl"
_TEXT = (".txt", ".text", ".tex", ".org", ".adoc")
_CODE = (
    *(".c", ".cc", ".cpp", ".cu", ".cxx", ".h", ".hh", ".hpp", ".cs", ".dart", ".go", ".java", ".kt", ".m", ".rs"),
    *(".scala", ".swift", ".zig", ".clj", ".erl", ".ex", ".exs", ".hs", ".ml"),
    *(".jl", ".js", ".jsx", ".lua", ".mjs", ".php", ".pl", ".pyi", ".r", ".rb", ".ts", ".tsx", ".vue"),
    *(".bash", ".ps1", ".sh", ".zsh", ".cfg", ".css", ".graphql", ".ini", ".proto", ".sql", ".toml", ".yaml", ".yml"),
)
SUFFIXES = frozenset({*_READERS, _PDF, _JSON_LINES, *_TEXT, *_CODE})

T = TypeVar("T")
Broken = Callable[[str, str], None]
PathLike = str | os.PathLike[str]


class Hasher(Protocol):
    """A hash of `hashlib`."""

    def update(self, data: bytes, /) -> None:
        """Add data."""


def find_files(paths: PathLike | Iterable[PathLike]) -> list[Path]:
    """List the files that can be read as documents, each once.

    Args:
        paths: files and folders; folders are searched through, in sorted order, without hidden files and folders.

    Raises:
        LlamoryError: a path doesn't exist or is of an unknown kind, a folder has no documents, a file given by name
            is empty, or no file has any text.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if not paths:
        raise LlamoryError("No documents were given; name at least one file or folder.")
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = _files_in(path)
            if not inside:
                raise LlamoryError(
                    f"The folder {path} has no documents; it should hold files of {supported_suffixes()}."
                )
            found.update(dict.fromkeys(inside))
        elif not path.exists():
            raise LlamoryError(f"There is no file or folder {path}; check the path.")
        elif path.suffix.lower() not in SUFFIXES:
            raise LlamoryError(f"{path} is not of a kind that can be read; it should be one of {supported_suffixes()}.")
        elif not _has_text(path):
            raise LlamoryError(f"The file {path} is empty; it should have text.")
        else:
            found[path] = None
    if not any(map(_has_text, found)):
        raise LlamoryError(f"None of the {len(found)} files in {_join_paths(paths)} has any text.")
    return list(found)


def read_documents(
    paths: PathLike | Iterable[PathLike], *, text_field: str = "text", skip_broken: bool = False
) -> Iterator[Document]:
    """Read files and folders as documents, one by one; documents without text are passed over.

    Args:
        paths: files and folders, as for `find_files`.
        text_field: the entry of a JSON line that holds the text.
        skip_broken: pass over broken JSON lines and files that aren't UTF-8, with a warning in the log.

    Raises:
        LlamoryError: as `find_files` does, at once; while reading, for a broken line or file (its name and line are
            told), and in the end if there was no text at all.
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
            raise LlamoryError(f"No text could be read from {_join_paths(paths)}.")

    return documents()


def read_file(
    path: Path,
    *,
    text_field: str = "text",
    skip_broken: bool = False,
    broken: Broken | None = None,
    max_bytes: int | None = None,
    hasher: Hasher | None = None,
) -> Iterator[Document]:
    """Read one file: one document, or one per line of a JSON lines file. Settings and errors as `read_documents`.

    Args:
        path: the file.
        text_field: the entry of a JSON line that holds the text.
        skip_broken: pass over what is broken, with a warning in the log.
        broken: is told of each broken JSON line, and the rest of the file is read.
        max_bytes: a larger file, or a longer line of JSON lines, is broken.
        hasher: its `update` is called with all bytes of the file, in order, as they are read.
    """
    suffix = path.suffix.lower()
    if suffix == _JSON_LINES:
        lines = read_json_lines(
            path,
            _text_and_title(text_field),
            skip_broken=skip_broken,
            broken=broken,
            max_bytes=max_bytes,
            hasher=hasher,
        )
        for line, (text, title) in lines:
            if text.strip():
                yield Document(text, f"{path}:{line}", title, (Section(text, title, line, verbatim=False),))
        return
    try:
        data = read_limited(path, max_bytes)
        if hasher is not None:
            hasher.update(data)
        title, text, sections = _parse_file(path, suffix, data)
    except LlamoryError as error:
        if not skip_broken:
            raise
        logger.warning("Passed over 1 file: %s", error)
        return
    if text.strip():
        yield Document(text, str(path), title, tuple(sections), code=suffix == ".py" or suffix in _CODE)


def _parse_file(path: Path, suffix: str, data: bytes) -> formats.ParsedText:
    if not data.strip():
        return "", "", []
    if suffix == _PDF:
        return read_pdf(path, data)
    try:
        return _READERS.get(suffix, formats.read_text)(decode(path, data), _default_title(path))
    except LlamoryError:
        raise
    except ValueError as error:
        raise LlamoryError(f"{path}: {error}.") from error


def read_json_lines(
    path: Path,
    parse: Callable[[dict[str, Any]], T],
    *,
    skip_broken: bool = False,
    broken: Broken | None = None,
    max_bytes: int | None = None,
    hasher: Hasher | None = None,
) -> Iterator[tuple[int, T]]:
    """Read the objects of a JSON lines file with their line numbers; blank lines are passed over.

    Args:
        path: the file, of any size: it is read line by line.
        parse: makes what is yielded of an object; it raises LlamoryError with the reason if the object is unfit.
        skip_broken: pass over broken lines, with their number in the log.
        broken: is told the location and the reason of each broken line, which is passed over.
        max_bytes: a longer line is broken.
        hasher: as for `read_file`.

    Raises:
        LlamoryError: a line isn't UTF-8, not JSON, no object, or unfit; file and line are told.
    """
    skipped, first = 0, ""
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
                location = f"{path}:{number}"
                if broken is not None:
                    broken(location, reason.rstrip("."))
                elif not skip_broken:
                    reason = f"{reason.rstrip('.')}; mend or remove the line, or skip broken lines."
                    raise LlamoryError(f"{location}: {reason}") from error
                skipped, first = skipped + 1, first or f"{location}: {reason.rstrip('.')}"
                continue
            yield number, result
    if skipped and broken is None:
        logger.warning("Passed over %d broken line%s; the first: %s", skipped, "s" if skipped > 1 else "", first)


def _numbered_lines(file: BinaryIO, max_bytes: int | None, hasher: Hasher | None) -> Iterator[tuple[int, bytes]]:
    """Lines with their numbers; of one that is too long only so much that this is seen."""
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
    """A text of a JSON object.

    Raises:
        LlamoryError: the field is missing, not a string, or holds half a surrogate pair, which no tokenizer reads.
    """
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


def _default_title(path: Path) -> str:
    return path.resolve().parent.name if path.name == "__init__.py" else path.stem


def _files_in(folder: Path) -> list[Path]:
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.suffix.lower() in SUFFIXES and path.is_file())


def _has_text(path: Path) -> bool:
    with open_regular(path) as file:
        return any(chunk.removeprefix(b"\xef\xbb\xbf").strip() for chunk in iter(lambda: file.read(1 << 16), b""))


def supported_suffixes() -> str:
    """The suffixes of all supported_suffixes that can be read, as people read them."""
    return " ".join(sorted(SUFFIXES))


def _join_paths(paths: Iterable[PathLike]) -> str:
    return ", ".join(map(str, paths))

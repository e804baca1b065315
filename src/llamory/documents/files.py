"""Find text files and read them as documents."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from llamory.documents import formats
from llamory.documents.document import Block, Document
from llamory.errors import LlamoryError

logger = logging.getLogger(__name__)

_READERS: Mapping[str, Callable[[str, str], tuple[str, str, list[Block]]]] = {
    **dict.fromkeys((".md", ".markdown"), formats.read_markdown),
    ".rst": formats.read_rst,
    **dict.fromkeys((".html", ".htm"), formats.read_html),
    ".py": formats.read_python,
}
_JSON_LINES = ".jsonl"
_TEXT = (".txt", ".text", ".tex", ".org", ".adoc")
_CODE = (
    *(".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".cs", ".go", ".java", ".kt", ".rs", ".scala", ".swift"),
    *(".jl", ".js", ".jsx", ".lua", ".php", ".pl", ".pyi", ".r", ".rb", ".sh", ".ts", ".tsx"),
    *(".css", ".sql", ".toml", ".yaml", ".yml"),
)
SUFFIXES = frozenset({*_READERS, _JSON_LINES, *_TEXT, *_CODE})

T = TypeVar("T")
PathLike = str | os.PathLike[str]


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
                raise LlamoryError(f"The folder {path} has no documents; it should hold files of {_kinds()}.")
            found.update(dict.fromkeys(inside))
        elif not path.exists():
            raise LlamoryError(f"There is no file or folder {path}; check the path.")
        elif path.suffix.lower() not in SUFFIXES:
            raise LlamoryError(f"{path} is not of a kind that can be read; it should be one of {_kinds()}.")
        elif not _has_text(path):
            raise LlamoryError(f"The file {path} is empty; it should have text.")
        else:
            found[path] = None
    if not any(map(_has_text, found)):
        raise LlamoryError(f"None of the {len(found)} files in {_listed(paths)} has any text.")
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
            raise LlamoryError(f"No text could be read from {_listed(paths)}.")

    return documents()


def read_file(path: Path, *, text_field: str = "text", skip_broken: bool = False) -> Iterator[Document]:
    """Read one file: one document, or one per line of a JSON lines file. Settings and errors as `read_documents`."""
    suffix = path.suffix.lower()
    if suffix == _JSON_LINES:
        for line, (text, title) in read_json_lines(path, _text_and_title(text_field), skip_broken=skip_broken):
            if text.strip():
                yield Document(text, f"{path}:{line}", title, (Block(text, title, line, verbatim=False),))
        return
    try:
        raw = _decode(path)
    except LlamoryError as error:
        if not skip_broken:
            raise
        logger.warning("Passed over 1 file: %s", error)
        return
    read = _READERS.get(suffix, formats.read_text)
    title, text, blocks = read(raw, _name(path))
    if text.strip():
        yield Document(text, str(path), title, tuple(blocks), code=suffix == ".py" or suffix in _CODE)


def read_json_lines(
    path: Path, parse: Callable[[dict[str, Any]], T], *, skip_broken: bool = False
) -> Iterator[tuple[int, T]]:
    """Read the objects of a JSON lines file with their line numbers; blank lines are passed over.

    Args:
        path: the file.
        parse: makes what is yielded of an object; it raises LlamoryError with the reason if the object is unfit.
        skip_broken: pass over broken lines, with their number in the log.

    Raises:
        LlamoryError: a line isn't UTF-8, not JSON, no object, or unfit; file and line are told.
    """
    skipped, first = 0, ""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
                if not line.strip():
                    continue
                result = parse(_json_object(line))
            except (LlamoryError, UnicodeDecodeError) as error:
                reason = f"the line is not UTF-8 ({error})" if isinstance(error, UnicodeDecodeError) else str(error)
                broken = f"{path}:{number}: {reason.rstrip('.')}"
                if not skip_broken:
                    raise LlamoryError(f"{broken}; mend or remove the line, or skip broken lines.") from error
                skipped, first = skipped + 1, first or broken
                continue
            yield number, result
    if skipped:
        logger.warning("Passed over %d broken line%s; the first: %s", skipped, "s" if skipped > 1 else "", first)


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


def _decode(path: Path) -> str:
    """The text of a file with plain newlines; Python files may declare another encoding than UTF-8."""
    data, encoding = path.read_bytes(), "utf-8-sig"
    if path.suffix.lower() == ".py":
        with contextlib.suppress(SyntaxError):  # an unknown encoding is named: UTF-8 is the best guess left
            encoding = tokenize.detect_encoding(io.BytesIO(data).readline)[0]
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        expected = encoding.upper().removesuffix("-SIG")
        raise LlamoryError(f"{path}:{line}: the file is not {expected} text; save it as UTF-8.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _name(path: Path) -> str:
    return path.resolve().parent.name if path.name == "__init__.py" else path.stem


def _files_in(folder: Path) -> list[Path]:
    files = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(path for path in files if path.suffix.lower() in SUFFIXES and path.is_file())


def _has_text(path: Path) -> bool:
    with path.open("rb") as file:
        return any(chunk.removeprefix(b"\xef\xbb\xbf").strip() for chunk in iter(lambda: file.read(1 << 16), b""))


def _kinds() -> str:
    return " ".join(sorted(SUFFIXES))


def _listed(paths: Iterable[PathLike]) -> str:
    return ", ".join(map(str, paths))

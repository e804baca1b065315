"""Documents made ready for reading: tokenised, checked against limits, known again by their content."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llamory.documents import Document, find_files, read_file
from llamory.errors import LlamoryError
from llamory.models.base import bos_ids, encode_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PathLike = str | os.PathLike[str]


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document as a model reads it.

    Attributes:
        label: a short name: the path from the folder that was given, or the file's name; `:line` for JSON lines.
        source: the absolute path, `path:line` for JSON lines; no two documents have the same.
        file: the absolute path.
        title: the document's title.
        digest: hash of the text and its tokens; the same document has it again.
        ids: (tokens,) int32.
    """

    label: str
    source: str
    file: str
    title: str
    digest: str
    ids: Tensor


def load_documents(
    paths: PathLike | Iterable[PathLike],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    text_field: str = "text",
    skip_broken: bool = False,
) -> list[TokenizedDocument]:
    """Tokenise all documents of files and folders. Empty ones are told in the log and passed over.

    Args:
        paths: files and folders, as for `llamory.documents.find_files`.
        tokenizer: the model's tokenizer. If it begins texts with a token of its own, each document begins with it.
        max_tokens: the most tokens that a document may have.
        text_field: the entry of a JSON line that holds the text.
        skip_broken: pass over broken lines and files.

    Raises:
        LlamoryError: a path can't be read, a document is longer than `max_tokens`, or there is no text at all.
    """
    if max_tokens is not None and max_tokens < 1:
        raise LlamoryError(f"max_tokens is {max_tokens}, but a document has at least 1 token.")
    roots, files = _files(paths)
    prefix_ids = bos_ids(tokenizer)
    tokenized_documents = []
    for file in files:
        empty = True
        for document in read_file(file, text_field=text_field, skip_broken=skip_broken):
            tokenized = _tokenize(document, file, roots, tokenizer)
            if len(tokenized.ids) == len(prefix_ids):
                continue
            if max_tokens is not None and len(tokenized.ids) > max_tokens:
                raise LlamoryError(
                    f"{document.source} has {len(tokenized.ids):,} tokens, more than the limit of {max_tokens:,}: "
                    "raise the limit, or leave the document out."
                )
            empty = False
            tokenized_documents.append(tokenized)
        if empty:
            _warn_empty(file)
    if not tokenized_documents:
        raise LlamoryError(f"No text could be read from {', '.join(map(str, roots))}; there should be some.")
    return tokenized_documents


def _files(paths: PathLike | Iterable[PathLike]) -> tuple[list[Path], list[Path]]:
    """The given paths and the files in them that may have text, all absolute."""
    input_paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    empty_paths = [path for path in input_paths if _is_blank(Path(path))]
    nonempty_paths = [path for path in input_paths if path not in empty_paths]
    if not nonempty_paths:
        find_files(input_paths)  # says what is wrong
    for path in empty_paths:
        _warn_empty(path)
    # Not resolve(), which would follow links and so change the names.
    roots = [Path(os.path.abspath(path)) for path in nonempty_paths]  # noqa: PTH100
    find_files(nonempty_paths)  # so that errors name the paths as they were given
    return roots, find_files(roots, log_skipped=False)


def _is_blank(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        chunks: Iterator[bytes] = iter(lambda: file.read(1 << 16), b"")
        return not any(chunk.removeprefix(b"\xef\xbb\xbf").strip() for chunk in chunks)


def _warn_empty(path: PathLike) -> None:
    logger.warning("Passed over %s: it is empty.", path)


def _tokenize(
    document: Document, file: Path, roots: list[Path], tokenizer: PreTrainedTokenizerBase
) -> TokenizedDocument:
    line_suffix = document.source.removeprefix(str(file))
    text = document.text
    if line_suffix and document.title and not text.startswith(document.title):
        # In a JSON line the title stands beside the text; in all other files it is part of it, or the file's name.
        text = f"{document.title}\n\n{text}"
    tokens = torch.tensor(encode_document(text, tokenizer), dtype=torch.int32)
    digest = hashlib.sha256(text.encode())
    digest.update(tokens.numpy().tobytes())
    return TokenizedDocument(
        f"{_label(file, roots)}{line_suffix}",
        f"{file}{line_suffix}",
        str(file),
        document.title,
        digest.hexdigest()[:32],
        tokens,
    )


def _label(file: Path, roots: list[Path]) -> str:
    for root in roots:
        if root in file.parents:
            return file.relative_to(root.parent).as_posix()
    return file.name

"""Documents as a model reads them: tokens, a digest of the content, and the metadata that a memory stores."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.io import PathLike
from llamory.documents import Chunk, Document, SkippedFile, find_files, read_file
from llamory.documents.scan import has_text
from llamory.errors import LlamoryError
from llamory.models.base import bos_ids, encode_document

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_SEPARATOR = "\n\n"


@dataclass(frozen=True, eq=False)
class TokenizedDocument:
    """A document's tokens and where they come from."""

    source: str  # an absolute path, `path:line` for a line of a JSON lines file
    title: str
    digest: str  # hash of the content
    ids: Tensor  # (tokens,) int32
    file: str = ""  # absolute path; empty for a document of a library
    label: str = ""  # short name: the path from the given folder, or the file's name; `:line` for JSON lines
    starts: list[int] | None = None  # first token of each chunk of a library's document, after a prefix such as BOS

    def metadata(self, model: str, context_length: int) -> dict[str, Any]:
        """What a memory stores of the document, with the model that encoded it and its window length."""
        # The keys are part of the file format: "digest" in memory files, "text" in a library's memories.
        if self.starts is None:
            content: dict[str, Any] = {"file": self.file, "digest": self.digest}
        else:
            content = {"text": self.digest, "starts": self.starts}
        common = {"source": self.source, "title": self.title, "tokens": len(self.ids)}
        return common | content | {"model": model, "context_length": context_length}


def load_documents(
    paths: PathLike | Iterable[PathLike],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_tokens: int | None = None,
    text_field: str = "text",
    skip_broken: bool = False,
    skipped: list[SkippedFile] | None = None,
) -> list[TokenizedDocument]:
    """Tokenize all documents of files and folders. Empty ones are skipped with a warning.

    Args:
        paths: files and folders, as for `llamory.documents.find_files`.
        tokenizer: the model's. Its BOS token, if it adds one, starts each document.
        max_tokens: maximum tokens of a document.
        text_field: field of a JSON line that holds the text.
        skip_broken: skip lines and files that can't be read.
        skipped: collects what `find_files` skips, instead of the log.

    Raises:
        LlamoryError: a path can't be read, a document has more than `max_tokens` tokens, or there is no text.
    """
    if max_tokens is not None and max_tokens < 1:
        raise LlamoryError(f"max_tokens must be at least 1, not {max_tokens}.")
    given = [Path(path) for path in ([paths] if isinstance(paths, str | os.PathLike) else paths)]
    empty = [path for path in given if path.is_file() and not has_text(path)]
    nonempty = [path for path in given if path not in empty]
    files = find_files(nonempty or given, skipped=skipped)  # if all are empty, this raises the error that fits
    roots, num_prefix_ids = [_absolute(path) for path in nonempty], len(bos_ids(tokenizer))
    documents: list[TokenizedDocument] = []
    for file in dict.fromkeys(map(_absolute, files)):
        tokenized = [
            _tokenize(document, file, roots, tokenizer)
            for document in read_file(file, text_field=text_field, skip_broken=skip_broken)
        ]
        nonblank = [document for document in tokenized if len(document.ids) > num_prefix_ids]
        for document in nonblank:
            if max_tokens is not None and len(document.ids) > max_tokens:
                found = f"{document.source} has {len(document.ids):,} tokens, more than the limit of {max_tokens:,}"
                raise LlamoryError(f"{found}: raise the limit, or leave the document out.")
        documents += nonblank
        empty += [] if nonblank else [file]
    for path in empty:
        logger.warning("Skipped %s: it is empty.", path)
    if not documents:
        raise LlamoryError(f"There is no text in {', '.join(map(str, roots))}; give files that have some.")
    return documents


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100 -- resolve() would follow links and so change the names


def _tokenize(
    document: Document, file: Path, roots: list[Path], tokenizer: PreTrainedTokenizerBase
) -> TokenizedDocument:
    import torch

    line_suffix, text = document.source.removeprefix(str(file)), document.text
    if line_suffix and document.title and not text.startswith(document.title):
        # A JSON line has the title beside the text; in other files it is part of the text, or the file's name.
        text = f"{document.title}{_SEPARATOR}{text}"
    ids = torch.tensor(encode_document(text, tokenizer), dtype=torch.int32)
    digest = hashlib.sha256(text.encode() + ids.numpy().tobytes()).hexdigest()[:32]
    folder = next((root.parent for root in roots if root in file.parents), file.parent)
    label = f"{file.relative_to(folder).as_posix()}{line_suffix}"
    return TokenizedDocument(f"{file}{line_suffix}", document.title, digest, ids, str(file), label)


@dataclass(frozen=True)
class StoredDocument:
    """A document as a library stores it: its source, and at least one chunk."""

    source: str
    chunks: tuple[Chunk, ...]

    @property
    def title(self) -> str:
        """The title of the first chunk."""
        return self.chunks[0].title

    @property
    def chunk_texts(self) -> list[str]:
        """The text that is read for each chunk; joined they are the document. A title that isn't in it comes first."""
        texts = [chunk.text for chunk in self.chunks]
        if self.title and self.title not in texts[0].split("\n", 1)[0]:
            texts[0] = f"{self.title}{_SEPARATOR}{texts[0]}"
        return [f"{text}{_SEPARATOR}" for text in texts[:-1]] + texts[-1:]

    @cached_property
    def digest(self) -> str:
        """A hash of all that is read."""
        return hashlib.sha256(json.dumps(self.chunk_texts).encode()).hexdigest()[:32]

    def tokenize(self, tokenizer: PreTrainedTokenizerBase, prefix_ids: Sequence[int] = ()) -> TokenizedDocument:
        """The document's tokens after `prefix_ids` (such as BOS), with the first token of each chunk."""
        import torch

        if not tokenizer.is_fast:
            raise LlamoryError("Memory of a library needs a fast tokenizer; use a reader that has a tokenizer.json.")
        texts = self.chunk_texts
        # The text of a special token, such as the end of a chat's turn, is plain text in a document.
        encoded = tokenizer(
            "".join(texts),
            add_special_tokens=False,
            split_special_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        token_ends = torch.tensor([end for _, end in encoded["offset_mapping"]], dtype=torch.int64)
        lengths = torch.tensor([len(text) for text in texts], dtype=torch.int64)
        # A token that spans two chunks belongs to the later one.
        starts = torch.searchsorted(token_ends, lengths.cumsum(0) - lengths, right=True) + len(prefix_ids)
        ids = torch.tensor([*prefix_ids, *encoded["input_ids"]], dtype=torch.int32)
        return TokenizedDocument(self.source, self.title, self.digest, ids, starts=starts.tolist())

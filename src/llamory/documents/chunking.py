"""Split documents into chunks that fit a model: whole sections, else sentences or lines, else words."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from textwrap import dedent
from typing import TYPE_CHECKING

import sentencex

from llamory.documents.document import Chunk, Document, Section
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

# A section with fewer words than this besides its title (a bare heading, a lone import) is no chunk of its own.
MIN_SECTION_WORDS = 3
# Tokens by which a chunk alone may differ from the same words inside the document: spaces at its ends, and the first
# word's missing space. Longer candidates aren't tried.
_EDGE_TOKENS = 2
# Characters that are tokenized as one text and in one call: each token takes some hundred bytes of memory meanwhile.
_MAX_PIECE_CHARACTERS, _BATCH_CHARACTERS = 1 << 18, 1 << 20

TextSpan = tuple[int, int]


@dataclass(frozen=True)
class _SectionGroup:
    text: str
    title: str
    lines: Sequence[int]  # line of the file for each line of the text
    pages: Sequence[int | None]  # and its page


def chunk_document(
    document: Document, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, language: str = "en"
) -> Iterator[Chunk]:
    """Split a document into chunks; every word of it is in exactly one, in order.

    Consecutive sections of one title that fit are one chunk. Longer ones are split between sentences (code: lines),
    then words, then within a word. A section of hardly more than a heading is joined to the next one.

    Args:
        tokenizer: a fast tokenizer; its special tokens are not counted.
        max_tokens: maximum tokens of a chunk, at least 1; only a single character may have more.
        language: code of the language for splitting sentences.
    """
    if max_tokens < 1:
        raise LlamoryError(f"A chunk must have at least 1 token, not {max_tokens}.")
    if not tokenizer.is_fast:
        raise LlamoryError("Chunking needs a fast tokenizer; use one that has a tokenizer.json.")
    pieces = (piece for section in _group_sections(document.sections) for piece in _split_long_section(section))
    for batch in _batches(pieces):
        for section, encoding in zip(batch, _encode(tokenizer, [s.text for s in batch]), strict=True):
            if len(encoding) <= max_tokens:
                spans: list[TextSpan] = [(0, len(section.text))]
            else:
                if document.code:
                    starts = [match.end() for match in re.finditer("\n", section.text)]
                else:  # the library leaves some blank lines out between the ends and the next starts
                    sentences = sentencex.get_sentence_boundaries(language, section.text)
                    starts = [sentence["start_index"] for sentence in sentences]
                spans = _ChunkBuilder(section.text, encoding, tokenizer, max_tokens).pack(_spans(section.text, starts))
            newlines = at = 0
            for first, last in spans:
                text = section.text[first:last]
                first += len(text) - len(text.lstrip())  # the line of its first word
                newlines, at = newlines + section.text.count("\n", at, first), first
                if cleaned := _clean(text):
                    location = section.lines[newlines], section.pages[newlines]
                    yield Chunk(cleaned, document.source, section.title, *location)


def _group_sections(sections: Sequence[Section]) -> list[_SectionGroup]:
    """Join consecutive sections of one title, and tiny sections with the next (the last with the one before)."""
    groups = [list(group) for _, group in groupby(sections, key=lambda section: section.title)]
    merged: list[tuple[list[Section], str]] = []
    pending: list[Section] = []
    for group in groups:
        pending += group
        words = sum(len(section.text.split()) for section in group)
        if words - len(group[0].title.split()) >= MIN_SECTION_WORDS:
            merged.append((pending, group[0].title))
            pending = []
    if pending and merged:
        merged[-1][0].extend(pending)
    elif pending:
        merged.append((pending, pending[0].title))
    return [_join_sections(group, title) for group, title in merged]


def _join_sections(sections: Sequence[Section], title: str) -> _SectionGroup:
    lines: list[int] = []
    pages: list[int | None] = []
    for section in sections:
        count = section.text.count("\n") + 1
        lines += range(section.line, section.line + count) if section.verbatim else [section.line] * count
        lines.append(lines[-1])  # the blank line between sections
        pages += [section.page] * (count + 1)
    return _SectionGroup(_clean("\n\n".join(section.text for section in sections)), title, lines, pages)


def _split_long_section(section: _SectionGroup) -> Iterator[_SectionGroup]:
    """Split a huge section where a paragraph, a line or a word ends; others stay whole."""
    text, start, newlines = section.text, 0, 0
    while len(text) - start > _MAX_PIECE_CHARACTERS:
        limit = start + _MAX_PIECE_CHARACTERS
        stops = (text.rfind(separator, start, limit) + len(separator) for separator in ("\n\n", "\n", " "))
        stop = next((stop for stop in stops if stop > start + _MAX_PIECE_CHARACTERS // 2), limit)
        rows = slice(newlines, newlines + text.count("\n", start, stop) + 1)
        yield _SectionGroup(text[start:stop], section.title, section.lines[rows], section.pages[rows])
        newlines, start = rows.stop - 1, stop
    yield _SectionGroup(text[start:], section.title, section.lines[newlines:], section.pages[newlines:])


def _batches(pieces: Iterable[_SectionGroup]) -> Iterator[list[_SectionGroup]]:
    """Group sections for the tokenizer."""
    batch, characters = list[_SectionGroup](), 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _clean(text: str) -> str:
    """Remove the indentation that all lines share; the number of lines stays."""
    return dedent(text).strip()


class _ChunkBuilder:
    """Packs one section into chunks: token positions give an estimate, the tokenizer checks it."""

    def __init__(self, text: str, encoding: Encoding, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> None:
        self.text, self.tokenizer, self.max_tokens = text, tokenizer, max_tokens
        self.token_starts = [start for start, _ in encoding.offsets]

    def pack(self, units: list[TextSpan]) -> list[TextSpan]:
        """Join consecutive units to the longest spans that fit; a unit that doesn't fit is split."""
        spans: list[TextSpan] = []
        pending = units[::-1]
        while pending:
            first, last = pending[-1]
            count = self._estimate_count(first, pending)
            while count > 1 and not self._fits((first, pending[-count][1])):
                count -= 1
            subspans = [] if count > 1 or self._fits((first, last)) else self._split_span(first, last)
            if len(subspans) > 1:
                pending[-1:] = self.pack(subspans)[::-1]
            else:
                spans.append((first, pending[-count][1]))
                del pending[-count:]
        return spans

    def _estimate_count(self, first: int, pending: list[TextSpan]) -> int:
        """How many units from `first` on may fit together; `pending` is in reverse order."""
        token = bisect_left(self.token_starts, first) + self.max_tokens + _EDGE_TOKENS
        if token >= len(self.token_starts):
            return len(pending)
        # The units' ends fall with the index, so their negatives rise.
        return max(1, len(pending) - bisect_left(pending, -self.token_starts[token], key=lambda span: -span[1]))

    def _fits(self, span: TextSpan) -> bool:
        return len(_encode(self.tokenizer, [_clean(self.text[slice(*span)])])[0]) <= self.max_tokens

    def _split_span(self, first: int, last: int) -> list[TextSpan]:
        words = [(first + m.start(), first + m.end()) for m in re.finditer(r"\s*\S+\s*", self.text[first:last])]
        return words if len(words) > 1 else [(i, i + 1) for i in range(first, last)]


def _spans(text: str, starts: Sequence[int]) -> list[TextSpan]:
    """Split a text at some positions; blank parts belong to the part before."""
    spans: list[TextSpan] = []
    for start, stop in pairwise(sorted({0, *starts, len(text)})):
        if spans and not text[start:stop].strip():
            spans[-1] = (spans[-1][0], stop)
        else:
            spans.append((start, stop))
    return spans


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[Encoding]:
    options = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    return tokenizer(texts, add_special_tokens=False, **options).encodings if texts else []

"""The text that hides a needle: sentences, repeated as often as need be."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, cycle, islice, pairwise
from pathlib import Path

import sentencex

from llamory.documents import Document, read_documents
from llamory.errors import LlamoryError

# More characters than one token stands for in any usual text; a shorter text is repeated.
_CHARACTERS_PER_TOKEN = 32


@dataclass(frozen=True)
class Haystack:
    """Sentences to hide a needle between.

    Attributes:
        sentences: each with the white space that follows it.
        restart_after_needle: whether the text after the needle begins anew instead of going on where the needle broke in.
    """

    sentences: tuple[str, ...]
    restart_after_needle: bool = False

    def around(self, count: int, depth: float) -> tuple[str, str]:
        """Text before and after a needle, `count` sentences in all.

        Args:
            count: how many sentences; past the last one the first follows again.
            depth: the share of the text, in characters, that comes before the needle, to the nearest sentence.
        """
        selected = list(islice(cycle(self.sentences), count))
        ends = list(accumulate(map(len, selected), initial=0))
        target_chars = depth * ends[-1]
        before = bisect_left(ends, target_chars)
        if before > 0 and ends[before] - target_chars > target_chars - ends[before - 1]:
            before -= 1
        after = selected[: count - before] if self.restart_after_needle else selected[before:]
        return "".join(selected[:before]).strip(), "".join(after).strip()


# The text of the passkey task as it was published (Mohtashami & Jaggi 2023, Landmark Attention, arXiv:2305.16300).
PUBLISHED_HAYSTACK = Haystack(
    ("The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ", "There and back again. "),
    restart_after_needle=True,
)


def read_haystack(paths: Iterable[Path], tokens: int, *, language: str = "en") -> Haystack:
    """Make a haystack of files; of program text the lines count as sentences.

    Args:
        paths: files and folders that `llamory.documents` reads, selected one after the other.
        tokens: length of the longest prompt; text beyond what it can hold isn't read.
        language: code of the language whose rules for sentences hold.

    Raises:
        LlamoryError: a path isn't there, is of an unknown kind or broken, or there is no text.
    """
    sentences: list[str] = []
    remaining_chars = tokens * _CHARACTERS_PER_TOKEN
    for document in read_documents(paths):
        sentences += _sentences(document, language)
        remaining_chars -= len(document.text)
        if remaining_chars <= 0:
            break
    if not sentences:
        raise LlamoryError(f"The haystack {', '.join(map(str, paths))} has no text; name files with sentences in them.")
    return Haystack(tuple(sentences))


def _sentences(document: Document, language: str) -> list[str]:
    """A document's sentences; blank ones are joined to the one before."""
    text = document.text.strip() + "\n\n"
    if document.code:
        return _join_blanks(text.splitlines(keepends=True))
    starts = [sentence["start_index"] for sentence in sentencex.get_sentence_boundaries(language, text)]
    return _join_blanks(text[start:end] for start, end in pairwise(sorted({0, *starts, len(text)})))


def _join_blanks(pieces: Iterable[str]) -> list[str]:
    joined: list[str] = []
    for piece in pieces:
        if joined and not piece.strip():
            joined[-1] += piece
        else:
            joined.append(piece)
    return joined

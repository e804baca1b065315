"""Bag-of-words targets: which words of a text count, and their token ids (Li et al. 2023, section 3.2)."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import TYPE_CHECKING

import bm25s.stopwords as nltk_lists
import regex
import stopwordsiso

from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The published targets were made with NLTK's lists, so they come first. The lists of stopwords-iso serve the other
# languages; its English one holds 1,298 words, among them "world", "system" and "number".
_NLTK = {
    "da": nltk_lists.STOPWORDS_DANISH,
    "de": nltk_lists.STOPWORDS_GERMAN,
    "en": nltk_lists.STOPWORDS_EN_PLUS,
    "es": nltk_lists.STOPWORDS_SPANISH,
    "fr": nltk_lists.STOPWORDS_FRENCH,
    "it": nltk_lists.STOPWORDS_ITALIAN,
    "nl": nltk_lists.STOPWORDS_DUTCH,
    "no": nltk_lists.STOPWORDS_NORWEGIAN,
    "pt": nltk_lists.STOPWORDS_PORTUGUESE,
    "ru": nltk_lists.STOPWORDS_RUSSIAN,
    "sv": nltk_lists.STOPWORDS_SWEDISH,
    "tr": nltk_lists.STOPWORDS_TURKISH,
}
# As `[\W_]` of the standard library, except that combining marks, which Hindi or Thai words are full of, and joiners
# stay in their words.
_WORD_SEPARATOR = regex.compile(r"(?:[^\w\p{N}]|[\p{Pc}\p{So}])+")


def stop_words(languages: Iterable[str]) -> frozenset[str]:
    """Words of the given languages that say nothing about a text's subject, in lower case.

    Args:
        languages: codes such as "en" or "de".

    Raises:
        LlamoryError: a language is unknown.
    """
    known = {*_NLTK, *stopwordsiso.langs()}
    words: set[str] = set()
    for language in languages:
        if language not in known:
            listed = " ".join(sorted(known))
            raise LlamoryError(f"There are no stop words for the language {language!r}; known are {listed}.")
        for entry in _NLTK.get(language) or stopwordsiso.stopwords(language):
            words.update(entry.lower().split("'"))  # the text's words are split there too: "don", "t"
    return frozenset(words)


def split_words(text: str) -> list[str]:
    """The words of a text; punctuation and underscores part them."""
    return _WORD_SEPARATOR.sub(" ", text).split()


def content_words(text: str, excluded: Container[str]) -> list[str]:
    """The words of a text without stop words, whatever their case."""
    return [word for word in split_words(text) if word.lower() not in excluded]


def truncate_at_word(text: str, end: int) -> str:
    """The text up to `end`, without a word that the end cuts in two."""
    if end >= len(text) or _WORD_SEPARATOR.match(text, end):
        return text[:end]
    return text[: max((gap.end() for gap in _WORD_SEPARATOR.finditer(text, 0, end)), default=0)]


def word_ids(
    tokenizer: PreTrainedTokenizerBase, targets: Sequence[Sequence[str]], ignored_ids: Container[int]
) -> list[list[int]]:
    """Token ids of the words of each target, in the form that words have inside a text.

    A target's words are tokenised as one text, as published. Llama-2 tokenizers put a space before a text
    themselves; for those that don't it is put here, or else the first word would be read as the end of another.
    """
    probe = tokenizer("the the", add_special_tokens=False)["input_ids"]
    half = len(probe) // 2
    space = "" if probe[:half] == probe[half:] else " "
    texts = [space + " ".join(words) if words else "" for words in targets]
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [[i for i in row if i not in ignored_ids] for row in ids]

"""LLARA pretraining data: examples from the published JSON lines or from documents, their target words, batches."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bm25s.stopwords as nltk_lists
import datasets
import regex
import stopwordsiso
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from torch.nn.utils.rnn import pad_sequence

import llamory
from llamory.common.io import PathLike, json_digest
from llamory.documents import Chunk, Document, chunk_document, find_files, read_file, read_json_lines
from llamory.documents.readers import string_entry
from llamory.errors import LlamoryError
from llamory.llara.losses import IGNORE_INDEX
from llamory.llara.template import LlaraTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TEXT, _WORDS, _IDS = Value("string"), List(Value("string")), List(Value("int32"))
_ROW_FEATURES = Features(text=_TEXT, summarize=_WORDS, predict=_WORDS, location=_TEXT)
_EXAMPLE_FEATURES = Features(
    input_ids=_IDS, labels=_IDS, summarize_ids=_IDS, predict_ids=_IDS, source=_TEXT, example=Value("int64")
)
_STREAMING_BATCH_SIZE = 64  # rows; few enough that the first batch is there at once

# The published targets were made with NLTK's lists, so they come first. The lists of stopwords-iso serve the other
# languages; its English one holds 1,298 words, among them "world", "system" and "number".
_NLTK: dict[str, list[str]] = {
    language: getattr(nltk_lists, f"STOPWORDS_{name}")
    for language, name in zip(
        "da de en es fr it nl no pt ru sv tr".split(),
        "DANISH GERMAN EN_PLUS SPANISH FRENCH ITALIAN DUTCH NORWEGIAN PORTUGUESE RUSSIAN SWEDISH TURKISH".split(),
        strict=True,
    )
}
# As `[\W_]` of the standard library, except that combining marks (as in Hindi) and joiners separate no words.
_WORD_SEPARATOR = regex.compile(r"(?:[^\w\p{N}]|[\p{Pc}\p{So}])+")

Paths = PathLike | Iterable[PathLike]


def load_examples(
    paths: Paths,
    tokenizer: PreTrainedTokenizerBase,
    template: LlaraTemplate,
    *,
    max_length: int = 1024,
    chunk_size: int | None = None,
    languages: Sequence[str] = ("en",),
    text_field: str = "text",
    skip_broken: bool = False,
    streaming: bool = False,
    num_proc: int | None = None,
    cache_dir: PathLike | None = None,
    quiet: bool = False,
) -> Dataset | IterableDataset:
    """Make LLARA examples from files and folders (Li et al. 2023, section 3.2).

    A line of published JSON lines (`input`, `output_summarize`, `output_predict`) is one example; a target is a text, a
    list of words, or absent. Every chunk of any other document is an example: its targets are its own words and those
    of the next chunk, without words that truncation removes.

    Args:
        paths: files and folders, as for `llamory.documents.find_files`.
        tokenizer: a fast tokenizer with the template's slot tokens.
        max_length: limit in tokens of a sequence; passages are truncated, prompts never.
        chunk_size: limit in tokens of a document's chunk; by default what `max_length` leaves.
        languages: codes of the languages whose stop words are excluded; the first also splits sentences.
        text_field: key of a document's text in a JSON line.
        skip_broken: skip broken lines and texts with slot tokens, with a warning in the log.
        streaming: read while iterating; `state_dict` and `load_state_dict` resume. Nothing is cached.
        num_proc: number of processes that read and tokenize.
        cache_dir: folder of finished examples, reused while files and settings stay the same.
        quiet: show no progress bars.

    Returns:
        A dataset of `input_ids` and `labels` (-100 outside the passage), `summarize_ids` and `predict_ids` (token ids
        of the target words), `source` (`path:line`) and `example` (0, 1, ...; while streaming, per worker).

    Raises:
        LlamoryError: a setting doesn't fit, a language is unknown, a file can't be read, has a broken line or a slot
            token, or no example is left. While streaming, errors of a file are raised when it is reached.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [str(path) for path in find_files(paths)]
    languages = (languages,) if isinstance(languages, str) else tuple(languages)
    preprocessor = _Preprocessor(tokenizer, template, max_length, chunk_size, languages, text_field, skip_broken)
    generator: dict[str, Any] = {"features": _ROW_FEATURES, "gen_kwargs": {"files": files}}
    mapping: dict[str, Any] = {"batched": True, "with_indices": True, "remove_columns": list(_ROW_FEATURES)}
    mapping["features"] = _EXAMPLE_FEATURES
    no_examples = LlamoryError(f"No example could be made of {', '.join(map(str, paths))}; they have no usable text.")
    if streaming:
        rows = IterableDataset.from_generator(preprocessor.rows, **generator)
        if next(iter(rows), None) is None:
            raise no_examples
        return rows.map(preprocessor.examples, batch_size=_STREAMING_BATCH_SIZE, **mapping)
    with ExitStack() as stack:
        if quiet and not datasets.utils.are_progress_bars_disabled():
            datasets.disable_progress_bars()
            stack.callback(datasets.enable_progress_bars)
        try:
            rows = Dataset.from_generator(
                preprocessor.rows,
                cache_dir=None if cache_dir is None else os.fspath(cache_dir),  # type: ignore[arg-type]
                num_proc=min(num_proc, len(files)) if num_proc else None,
                fingerprint=preprocessor.fingerprint(files, "rows-2"),
                **generator,
            )
        except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
            if isinstance(error.__cause__, LlamoryError):
                raise error.__cause__ from None
            # Processes hand their error back without its cause, and no rows at all are an error too: see which.
            if sum(1 for _ in preprocessor.rows(files)) == 0:
                raise no_examples from None
            raise
        return rows.map(
            preprocessor.examples,
            num_proc=min(num_proc, len(rows)) if num_proc else None,
            new_fingerprint=preprocessor.fingerprint(files, "examples"),
            desc="Tokenising",
            **mapping,
        )


def passage_texts(
    examples: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, number: int, seed: int = 0
) -> list[str]:
    """The texts of at most `number` random passages of `load_examples`; of a stream, the first ones."""
    if isinstance(examples, Dataset):
        examples = examples.shuffle(seed=seed)
    passages = [
        [i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORE_INDEX]
        for row in examples.take(number)
    ]
    return tokenizer.batch_decode(passages, clean_up_tokenization_spaces=False)


@dataclass(frozen=True)
class LlaraCollator:
    """Makes a batch of examples, padded on the left."""

    pad_token_id: int | None  # of `input_ids`; 0 if None, since the attention mask hides it

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad examples of `load_examples` to long tensors.

        Returns:
            `input_ids`, `attention_mask`, `labels`: (batch, sequence); `output_summarize_ids`, `output_predict_ids`:
            (batch, longest target, at least 1), padded with -100; `example`: (batch,).
        """

        def column(name: str) -> list[torch.Tensor]:
            return [torch.as_tensor(example[name], dtype=torch.long) for example in examples]

        def pad(rows: list[torch.Tensor], value: int, side: str = "left") -> torch.Tensor:
            padded = pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)
            return padded if padded.shape[1] else torch.full((len(rows), 1), value)

        inputs = column("input_ids")
        return {
            "input_ids": pad(inputs, self.pad_token_id or 0),
            "attention_mask": pad([torch.ones_like(row) for row in inputs], 0),
            "labels": pad(column("labels"), IGNORE_INDEX),
            "output_summarize_ids": pad(column("summarize_ids"), IGNORE_INDEX, "right"),
            "output_predict_ids": pad(column("predict_ids"), IGNORE_INDEX, "right"),
            "example": torch.stack(column("example")),
        }


@dataclass
class _Preprocessor:
    """Makes examples from files in two steps: rows of texts and words, then token ids."""

    tokenizer: PreTrainedTokenizerBase
    template: LlaraTemplate
    max_length: int
    chunk_size: int | None
    languages: tuple[str, ...]
    text_field: str
    skip_broken: bool

    def __post_init__(self) -> None:
        self.max_passage_tokens = self.max_length - self.template.overhead()
        self.stop_words = stop_words(self.languages)
        slots = self.tokenizer.convert_ids_to_tokens(list(self.template.slot_ids))
        self.slot_tokens = [token for token in slots if token]
        if not self.tokenizer.is_fast:
            raise LlamoryError("LLARA examples need a fast tokenizer; use one that has a tokenizer.json.")
        if self.max_passage_tokens < 1:
            raise LlamoryError(f"A max_length of {self.max_length} tokens leaves no room for a passage and prompts.")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise LlamoryError(f"chunk_size must be at least 1 token, not {self.chunk_size}.")

    def fingerprint(self, files: Sequence[str], step: str) -> str:
        """A digest of everything that the examples depend on."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        settings = [self.max_length, self.chunk_size, self.languages, self.text_field, self.skip_broken]
        stats = [(path, (stat := Path(path).stat()).st_size, stat.st_mtime_ns) for path in files]
        # Truncation and padding are those of the tokenizer's last call.
        tokenizer.update(truncation=None, padding=None)
        return json_digest([llamory.__version__, step, tokenizer, self.template.to_dict(), settings, stats])

    def rows(self, files: list[str]) -> Iterator[dict[str, Any]]:
        """Passages with the words of their targets."""
        for path in map(Path, files):
            yield from self._published_rows(path) if _is_published(path) else self._document_rows(path)

    def examples(self, rows: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        """Tokenise a batch of rows and put the prompts around the passages."""
        encoded = self.tokenizer(rows["text"], add_special_tokens=False, verbose=False)["input_ids"]
        passages = [ids[: self.max_passage_tokens] for ids in encoded]
        before = [IGNORE_INDEX] * len(self.template.prefix_ids)
        after = [IGNORE_INDEX] * (self.template.overhead() - len(before))
        ignored = frozenset(self.template.ignored_ids)
        return {
            "input_ids": [self.template.sequence(passage) for passage in passages],
            "labels": [[*before, *passage, *after] for passage in passages],
            "summarize_ids": word_ids(self.tokenizer, rows["summarize"], ignored),
            "predict_ids": word_ids(self.tokenizer, rows["predict"], ignored),
            "source": rows["location"],
            "example": indices,
        }

    def _published_rows(self, path: Path) -> Iterator[dict[str, Any]]:
        for line, row in read_json_lines(path, self._published_row, skip_broken=self.skip_broken):
            if row["text"].strip():
                yield {**row, "location": f"{path}:{line}"}

    def _published_row(self, entry: dict[str, Any]) -> dict[str, Any]:
        text, targets = string_entry(entry, "input"), {}
        for head in ("summarize", "predict"):
            target = entry.get(name := f"output_{head}")
            if isinstance(target, list):
                targets[head] = [string_entry({name: word}, name) for word in target]
            else:
                targets[head] = [] if target is None else content_words(string_entry(entry, name), self.stop_words)
        for part in (text, *targets["summarize"], *targets["predict"]):
            if found := self._slot_token_in(part):
                raise LlamoryError(f"the text has the slot token {found}, which only the prompts may have")
        return {"text": text, **targets}

    def _document_rows(self, path: Path) -> Iterator[dict[str, Any]]:
        language = self.languages[0] if self.languages else "en"
        for document in read_file(path, text_field=self.text_field, skip_broken=self.skip_broken):
            self._check_slot_tokens(document)
            size = self.chunk_size or self.max_passage_tokens
            chunks = list(chunk_document(document, self.tokenizer, size, language=language))
            words = [
                None if self._slot_token_in(text) else content_words(self._truncated(text), self.stop_words)
                for text in (chunk.text for chunk in chunks)
            ]
            for chunk, current, following in zip(chunks, words, [*words[1:], None], strict=True):
                if current is not None:
                    targets = {"summarize": current, "predict": following or []}
                    yield {"text": chunk.text, **targets, "location": chunk.location}

    def _truncated(self, text: str) -> str:
        """A passage as truncated to the sequence, without a partial word at its end."""
        if self.chunk_size is None or self.chunk_size <= self.max_passage_tokens:
            return text
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= self.max_passage_tokens:
            return text
        # A character that is split (bytes as tokens) is part of both offsets.
        stop = min(offsets[self.max_passage_tokens - 1][1], offsets[self.max_passage_tokens][0])
        return truncate_at_word(text, stop)

    def _check_slot_tokens(self, document: Document) -> None:
        for section in document.sections:
            if found := self._slot_token_in(section.text):
                before = section.text[: section.text.index(found)] if section.verbatim else ""
                line = section.line + before.count("\n")
                location = Chunk(found, document.source, section.title, line).location
                message = f"{location}: the text has the slot token {found}, which only the prompts may have"
                if not self.skip_broken:
                    raise LlamoryError(f"{message}; remove it, or skip broken passages.")
                logger.warning("Skipped a passage; %s", message)

    def _slot_token_in(self, text: str) -> str | None:
        return next((token for token in self.slot_tokens if token in text), None)


def _is_published(path: Path) -> bool:
    """Whether a file has the published format: its first whole object has `input`."""
    if path.suffix.lower() != ".jsonl":
        return False
    first = next(read_json_lines(path, lambda entry: entry, skip_broken=True), None)
    return first is not None and "input" in first[1]


def stop_words(languages: Iterable[str]) -> frozenset[str]:
    """The stop words of languages such as "en", in lower case; a LlamoryError if a language is unknown."""
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
    """The words of a text, split at punctuation and underscores."""
    return _WORD_SEPARATOR.sub(" ", text).split()


def content_words(text: str, excluded: Container[str]) -> list[str]:
    """The words of a text without excluded ones, whatever their case."""
    return [word for word in split_words(text) if word.lower() not in excluded]


def truncate_at_word(text: str, stop: int) -> str:
    """The text up to `stop`, without a partial word at its end."""
    if stop >= len(text) or _WORD_SEPARATOR.match(text, stop):
        return text[:stop]
    return text[: max((gap.end() for gap in _WORD_SEPARATOR.finditer(text, 0, stop)), default=0)]


def word_ids(
    tokenizer: PreTrainedTokenizerBase, targets: Sequence[Sequence[str]], ignored_ids: Container[int]
) -> list[list[int]]:
    """Token ids of the words of each target, tokenized as one text (as published), as words inside a text."""
    # Unlike Llama-2's, most tokenizers need a leading space, or else they read the first word as the end of another.
    probe = tokenizer("the the", add_special_tokens=False)["input_ids"]
    half = len(probe) // 2
    space = "" if probe[:half] == probe[half:] else " "
    texts = [space + " ".join(words) if words else "" for words in targets]
    if not texts:
        return []
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [[i for i in row if i not in ignored_ids] for row in ids]

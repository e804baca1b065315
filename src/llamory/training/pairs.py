"""What a retriever learns from: queries with their documents, positive and negative, from published JSONL or BEIR."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llamory.documents import find_files, read_json_lines
from llamory.documents.beir import CORPUS, BeirDataset, is_beir, read_beir
from llamory.documents.readers import string_entry
from llamory.errors import LlamoryError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """A query and its documents.

    Attributes:
        query: its text.
        positives: documents that answer it, at least one.
        negatives: documents that don't; none of them is a positive of the same query anywhere in the data.
        positive_scores: a teacher's score for each positive, if there are any.
        negative_scores: the same for each negative.
        location: where it stands, as `file:line`.
    """

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    positive_scores: tuple[float, ...] | None = None
    negative_scores: tuple[float, ...] | None = None
    location: str = ""

    @property
    def scored(self) -> bool:
        """Whether a teacher has scored all of its documents."""
        return self.positive_scores is not None and self.negative_scores is not None

    def with_negatives(self, negatives: Sequence[str]) -> Example:
        """The same query with further negatives; scores don't cover those, so they go."""
        together = tuple(dict.fromkeys([*self.negatives, *negatives]))
        return replace(self, negatives=together, positive_scores=None, negative_scores=None)


class Pairs:
    """Training data of a retriever: examples, and what else is known of them together.

    Attributes:
        examples: all queries.
        documents: every document text once: positives, negatives, and the rest of BEIR corpora.
        negatives: every negative once.
        answers: for each query text, all of its positives anywhere in the data.
    """

    def __init__(self, examples: Iterable[Example], corpus: Iterable[str] = ()) -> None:
        found = list(examples)
        self.answers: dict[str, set[str]] = {}
        for example in found:
            self.answers.setdefault(example.query, set()).update(example.positives)
        self.examples = [_without_false_negatives(example, self.answers[example.query]) for example in found]
        dropped = sum(len(a.negatives) - len(b.negatives) for a, b in zip(found, self.examples, strict=True))
        if dropped:
            logger.warning("Left out %d negatives that are a positive of their query, or the query itself", dropped)
        self.negatives = list(dict.fromkeys(text for example in self.examples for text in example.negatives))
        texts = (text for example in self.examples for text in (*example.positives, *example.negatives))
        self.documents = list(dict.fromkeys([*texts, *corpus]))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def unscored(self) -> list[Example]:
        """Those that a teacher's scores can't be learned for."""
        return [example for example in self.examples if not (example.scored and example.negatives)]

    @property
    def max_negatives(self) -> int:
        """How many negatives the query with the most has."""
        return max(len(example.negatives) for example in self.examples)

    def map_texts(self, rewrite: Callable[[list[str]], list[str]]) -> Pairs:
        """The same data with every text as `rewrite` gives it."""
        texts = list(dict.fromkeys([*self.answers, *self.documents]))
        new = dict(zip(texts, rewrite(texts), strict=True))
        examples = (
            replace(
                example,
                query=new[example.query],
                positives=tuple(new[text] for text in example.positives),
                negatives=tuple(new[text] for text in example.negatives),
            )
            for example in self.examples
        )
        return Pairs(examples, (new[text] for text in self.documents))


def load_pairs(paths: Sequence[str | Path], *, split: str = "train", skip_broken: bool = False) -> Pairs:
    """Read training data.

    A line of JSONL holds `query`, `pos` (a text or a list), and maybe `neg`, `pos_scores` and `neg_scores`. Of a BEIR
    folder, judged documents with a score above 0 are positives, those with 0 negatives.

    Args:
        paths: .jsonl files, folders of them, and BEIR folders.
        split: which qrels of BEIR folders are read.
        skip_broken: pass over broken lines, with a warning in the log.

    Raises:
        LlamoryError: a path can't be used, a line is broken (file and line are told), or there is no query.
    """
    examples: list[Example] = []
    corpus: list[str] = []
    known: dict[str, str] = {}  # published data name the same negative for many queries: one copy of it is enough
    for path in map(Path, paths):
        if is_beir(path):
            data = read_beir(path, split, skip_broken=skip_broken)
            texts = {document.id: document.full_text for document in data.documents()}
            corpus += filter(None, texts.values())
            examples += _beir_examples(data, texts)
            continue
        files = [file for file in find_files([path]) if file.suffix.lower() == ".jsonl"]
        if not files:
            raise LlamoryError(
                f"{path} has no training data: give .jsonl files with a `query` and its `pos` in each line, or a BEIR "
                f"folder with {CORPUS}."
            )
        for file in files:
            lines = read_json_lines(file, _example, skip_broken=skip_broken)
            examples += (_with_location(example, f"{file}:{line}", known) for line, example in lines)
    if not examples:
        raise LlamoryError(f"There is no query with a positive in {', '.join(map(str, paths))}.")
    return Pairs(examples, corpus)


def _beir_examples(data: BeirDataset, texts: Mapping[str, str]) -> Iterable[Example]:
    for query, scores in data.qrels.items():
        for name in scores:
            if name not in texts:
                location = data.locations[query, name]
                raise LlamoryError(f"{location}: there is no {name!r} in {CORPUS}; mend or remove the line.")
        # BEIR's corpora have a few documents without any text; there is nothing to learn from those.
        positives = tuple(texts[name] for name, score in scores.items() if score > 0 and texts[name])
        negatives = tuple(texts[name] for name, score in scores.items() if score <= 0 and texts[name])
        if positives and data.queries[query].strip():
            location = data.locations[query, next(iter(scores))]
            yield Example(data.queries[query], positives, negatives, location=location)


def _with_location(example: Example, location: str, known: dict[str, str]) -> Example:
    positives = tuple(known.setdefault(text, text) for text in example.positives)
    negatives = tuple(known.setdefault(text, text) for text in example.negatives)
    return replace(example, positives=positives, negatives=negatives, location=location)


def _without_false_negatives(example: Example, answers: set[str]) -> Example:
    keep = [i for i, text in enumerate(example.negatives) if text not in answers and text != example.query]
    if len(keep) == len(example.negatives):
        return example
    scores = example.negative_scores
    return replace(
        example,
        negatives=tuple(example.negatives[i] for i in keep),
        negative_scores=None if scores is None else tuple(scores[i] for i in keep),
    )


# ---- one line --------------------------------------------------------------------------------------------------------


def _example(entry: dict[str, Any]) -> Example:
    query = string_entry(entry, "query")
    if not query.strip():
        raise LlamoryError("'query' is empty")
    positives = _texts(entry, "pos")
    if not positives:
        raise LlamoryError("'pos' is empty; a query needs at least one positive")
    negatives = _texts(entry, "neg") if entry.get("neg") is not None else ()
    return Example(
        query,
        positives,
        negatives,
        _scores(entry, "pos_scores", "pos", len(positives)),
        _scores(entry, "neg_scores", "neg", len(negatives)),
    )


def _texts(entry: dict[str, Any], field: str) -> tuple[str, ...]:
    value = entry.get(field)
    if isinstance(value, list):
        texts = tuple(string_entry({f"{field}[{i}]": text}, f"{field}[{i}]") for i, text in enumerate(value))
    else:
        texts = (string_entry(entry, field),)
    if not all(text.strip() for text in texts):
        raise LlamoryError(f"{field!r} holds an empty text")
    return texts


def _scores(entry: dict[str, Any], field: str, texts: str, count: int) -> tuple[float, ...] | None:
    value = entry.get(field)
    if value is None:
        return None
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values):
        raise LlamoryError(f"{field!r} should be a list of numbers")
    if len(values) != count:
        raise LlamoryError(f"{field!r} has {len(values)} numbers for the {count} texts in {texts!r}")
    return tuple(map(float, values))

"""Training data of a retriever: queries with positives and negatives, mining, batches without false negatives."""

from __future__ import annotations

import json
import logging
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import BatchSampler, Dataset

from llamory.common.io import write_text
from llamory.documents import find_files, read_json_lines
from llamory.documents.beir import CORPUS, BeirDataset, is_beir, read_beir
from llamory.documents.readers import string_entry
from llamory.errors import LlamoryError
from llamory.training.run import user_errors
from llamory.training.settings import RetrieverSettings

logger = logging.getLogger(__name__)

MINED_FILE = "mined.jsonl"
_CANDIDATES_PER_NEGATIVE = 10
QUERY, POSITIVE, SCORES = "anchor", "positive", "scores"
_MAX_LOOKAHEAD_BATCHES = 64  # queries examined for one batch, in batches: nearly all may share their positives
_DRAWS_PER_NEGATIVE = 20  # of a query without negatives, since some are its positives
_MAX_RESHUFFLES = 10  # of an epoch's queries, to reach the number of batches of the first epoch


@dataclass(frozen=True)
class Example:
    """A query, at least one document that answers it, and documents that don't, with a teacher's scores if known."""

    query: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...] = ()
    positive_scores: tuple[float, ...] | None = None
    negative_scores: tuple[float, ...] | None = None
    location: str = ""  # file:line

    @property
    def scored(self) -> bool:
        """Whether all documents have a teacher's score."""
        return self.positive_scores is not None and self.negative_scores is not None

    def with_negatives(self, negatives: Sequence[str]) -> Example:
        """The example with more negatives and without scores, since those have none."""
        together = tuple(dict.fromkeys([*self.negatives, *negatives]))
        return Example(self.query, self.positives, together, location=self.location)


class Pairs:
    """Training data of a retriever; negatives that are positives of their query elsewhere are removed.

    Attributes:
        documents: all distinct documents: positives, negatives, and the rest of BEIR corpora.
        answers: for each query, all of its positives anywhere in the data.
    """

    def __init__(self, examples: Iterable[Example], corpus: Iterable[str] = ()) -> None:
        all_examples = list(examples)
        self.answers: dict[str, set[str]] = {}
        for example in all_examples:
            self.answers.setdefault(example.query, set()).update(example.positives)
        self.examples = [_without_false_negatives(example, self.answers[example.query]) for example in all_examples]
        dropped = sum(len(a.negatives) - len(b.negatives) for a, b in zip(all_examples, self.examples, strict=True))
        if dropped:
            logger.warning("Removed %d negatives that are a positive of their query, or the query itself", dropped)
        self.negatives = list(dict.fromkeys(text for example in self.examples for text in example.negatives))
        texts = (text for example in self.examples for text in (*example.positives, *example.negatives))
        self.documents = list(dict.fromkeys([*texts, *corpus]))

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def unscored(self) -> list[Example]:
        """Examples without scores or negatives, which distillation needs."""
        return [example for example in self.examples if not (example.scored and example.negatives)]

    def map_texts(self, rewrite: Callable[[list[str]], list[str]]) -> Pairs:
        """The same data with every text replaced by what `rewrite` gives for it."""
        texts = list(dict.fromkeys([*self.answers, *self.documents]))
        new = dict(zip(texts, rewrite(texts), strict=True))
        examples = (_map_example(example, new.__getitem__) for example in self.examples)
        return Pairs(examples, (new[text] for text in self.documents))


def load_pairs(paths: Sequence[str | Path], *, split: str = "train", skip_broken: bool = False) -> Pairs:
    """Read training data from .jsonl files, folders of them, and BEIR folders (their `split`).

    A line of JSONL holds `query`, `pos` (a text or a list), and optionally `neg`, `pos_scores` and `neg_scores`. In a
    BEIR folder, documents with a relevance above 0 are positives, those with 0 are negatives. Raises LlamoryError if a
    path can't be used, there is no query, or a line is broken; `skip_broken` skips such lines with a warning.
    """
    examples: list[Example] = []
    corpus: list[str] = []
    known: dict[str, str] = {}  # one copy of each text: published data repeat negatives for many queries
    for path in map(Path, paths):
        if is_beir(path):
            data = read_beir(path, split, skip_broken=skip_broken)
            texts = {document.id: document.full_text for document in data.documents()}
            corpus += filter(None, texts.values())
            examples += _beir_examples(data, texts)
            continue
        files = [file for file in find_files([path]) if file.suffix.lower() == ".jsonl"]
        if not files:
            raise LlamoryError(f"{path} has no training data: give .jsonl with `query` and `pos`, or BEIR folders.")
        for file in files:
            lines = read_json_lines(file, _example, skip_broken=skip_broken)
            for line, example in lines:
                example = _map_example(example, lambda text: known.setdefault(text, text))
                examples.append(replace(example, location=f"{file}:{line}"))
    if not examples:
        raise LlamoryError(f"There is no query with a positive in {', '.join(map(str, paths))}.")
    return Pairs(examples, corpus)


def _beir_examples(data: BeirDataset, texts: Mapping[str, str]) -> Iterable[Example]:
    for query, scores in data.qrels.items():
        for name in scores:
            if name not in texts:
                location = data.locations[query, name]
                raise LlamoryError(f"{location}: there is no {name!r} in {CORPUS}; mend or remove the line.")
        # A few documents in BEIR corpora have no text.
        positives = tuple(texts[name] for name, score in scores.items() if score > 0 and texts[name])
        negatives = tuple(texts[name] for name, score in scores.items() if score <= 0 and texts[name])
        if positives and data.queries[query].strip():
            location = data.locations[query, next(iter(scores))]
            yield Example(data.queries[query], positives, negatives, location=location)


def _map_example(example: Example, rewrite: Callable[[str], str]) -> Example:
    positives, negatives = tuple(map(rewrite, example.positives)), tuple(map(rewrite, example.negatives))
    return replace(example, query=rewrite(example.query), positives=positives, negatives=negatives)


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


def _example(entry: dict[str, Any]) -> Example:
    query = string_entry(entry, "query")
    if not query.strip():
        raise LlamoryError("'query' is empty")
    positives = _texts(entry, "pos")
    if not positives:
        raise LlamoryError("'pos' is empty; a query needs at least one positive")
    negatives = _texts(entry, "neg") if entry.get("neg") is not None else ()
    positive_scores = _scores(entry, "pos_scores", "pos", len(positives))
    return Example(query, positives, negatives, positive_scores, _scores(entry, "neg_scores", "neg", len(negatives)))


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


def negative_names(group_size: int) -> list[str]:
    """Names of the columns of a query's negatives."""
    return [f"negative_{i}" for i in range(1, group_size)]


class GroupDataset(Dataset[dict[str, Any]]):
    """Groups of one query, one of its positives and `group_size - 1` negatives, sampled anew in each epoch.

    Too few negatives are repeated, as in the published code; a query without negatives gets those of other queries.
    Item `epoch * len(pairs) + i` is example `i` as sampled in that epoch, the same at every call, in every process.
    """

    def __init__(self, pairs: Pairs, group_size: int, seed: int, *, scored: bool = False) -> None:
        self.pairs, self.group_size, self.seed, self.scored = pairs, group_size, seed, scored

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """The group's columns: `anchor`, `positive`, `negative_1` and so on, and `scores` if scored."""
        epoch, index = divmod(number, len(self.pairs))
        example = self.pairs.examples[index]
        rng = random.Random(f"{self.seed} {epoch} {index}")
        positive = rng.randrange(len(example.positives))
        negatives, scores = self._negatives(example, rng)
        group: dict[str, Any] = {QUERY: example.query, POSITIVE: example.positives[positive]}
        group |= zip(negative_names(self.group_size), negatives, strict=True)
        if self.scored:
            assert example.positive_scores is not None
            group[SCORES] = [example.positive_scores[positive], *scores]
        return group

    def documents(self, number: int) -> list[str]:
        """The documents of a group."""
        group = self[number]
        return [group[POSITIVE], *(group[name] for name in negative_names(self.group_size))]

    def _negatives(self, example: Example, rng: random.Random) -> tuple[list[str], list[float]]:
        count, indices = self.group_size - 1, range(len(example.negatives))
        if count and not indices:
            return self._sample_other_negatives(example, count, rng), []
        sampled: list[int] = []
        while len(sampled) < count:
            sampled += rng.sample(indices, min(count - len(sampled), len(indices)))
        scores = example.negative_scores if self.scored else None
        return [example.negatives[i] for i in sampled], [] if scores is None else [scores[i] for i in sampled]

    def _sample_other_negatives(self, example: Example, count: int, rng: random.Random) -> list[str]:
        """Negatives of other queries that aren't positives of this one, distinct if there are enough."""
        excluded, documents = self.pairs.answers[example.query] | {example.query}, self.pairs.negatives
        sampled = (documents[rng.randrange(len(documents))] for _ in range(_DRAWS_PER_NEGATIVE * count))
        found = list(dict.fromkeys(text for text in sampled if text not in excluded))
        candidates = found or [text for text in documents if text not in excluded]
        if not candidates:
            problem = "the query has no negatives and all other queries' negatives answer it; add `neg`."
            raise LlamoryError(f"{example.location}: {problem}")
        while len(found) < count:
            found.append(rng.choice(candidates))
        return found[:count]


class FalseNegativeFreeSampler(BatchSampler):
    """Batches of one process in which no document is a positive of another query, or its text.

    Each document of a batch is a negative of every other query, in all processes of a step together. Queries whose
    documents are positives of one another anywhere in the data are deferred to a later batch.
    """

    def __init__(self, groups: GroupDataset, batch_size: int, *, process: int = 0, processes: int = 1) -> None:
        self.groups, self.batch_size, self.drop_last = groups, batch_size, False
        self.process, self.processes, self.epoch = process, processes, 0

    @cached_property
    def _first_epoch(self) -> list[list[int]]:
        return list(self._epoch_batches(random.Random(f"{self.groups.seed} 0"), 0))

    def __len__(self) -> int:
        """Batches of the first epoch."""
        return len(self._first_epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch to sample; the Trainer calls it."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        """This process's batches of the epoch; as many as in the first epoch, if possible."""
        rng = random.Random(f"{self.groups.seed} {self.epoch}")
        passes = (self._epoch_batches(rng, self.epoch) for _ in range(_MAX_RESHUFFLES))
        batches = islice(chain.from_iterable(passes), len(self)) if self.epoch else self._first_epoch
        for batch in batches:
            yield batch[self.process :: self.processes]

    def _epoch_batches(self, rng: random.Random, epoch: int) -> Iterator[list[int]]:
        """Batches for all processes together, until no query is deferred."""
        count = len(self.groups)
        numbers = list(range(epoch * count, (epoch + 1) * count))
        rng.shuffle(numbers)
        queue = deque(numbers)
        min_size = self.processes if self.groups.group_size > 1 else max(2, self.processes)
        while queue:
            batch = self._next_batch(queue, self.batch_size * self.processes)
            divisible = len(batch) - len(batch) % self.processes
            # A single query without negatives has no loss.
            if divisible >= min_size:
                yield batch[:divisible]

    def _next_batch(self, queue: deque[int], max_size: int) -> list[int]:
        """The next batch; queries that conflict with it are deferred in their order."""
        batch: list[int] = []
        deferred: list[int] = []
        documents: set[str] = set()
        excluded: set[str] = set()
        while queue and len(batch) < max_size and len(deferred) < _MAX_LOOKAHEAD_BATCHES * max_size:
            number = queue.popleft()
            group = self.groups.documents(number)
            example = self.groups.pairs.examples[number % len(self.groups)]
            answers = self.groups.pairs.answers[example.query]
            if excluded.isdisjoint(group) and documents.isdisjoint(answers) and example.query not in documents:
                batch.append(number)
                documents.update(group)
                excluded.update(answers, [example.query])
            else:
                deferred.append(number)
        queue.extendleft(reversed(deferred))
        return batch


def add_mined_negatives(pairs: Pairs, embedder: Any, settings: RetrieverSettings, file: Path) -> Pairs:
    """Add the negatives that a model mines; they are written to a JSONL file, and read from it if it exists."""
    if not file.exists():
        found = _mine(pairs, embedder, settings).items()
        entries = ({"query": query, "pos": sorted(pairs.answers[query]), "neg": neg} for query, neg in found)
        write_text(file, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    mined = dict(entry for _, entry in read_json_lines(file, lambda entry: (entry["query"], entry["neg"])))
    return Pairs((each.with_negatives(mined.get(each.query, [])) for each in pairs.examples), pairs.documents)


def _mine(pairs: Pairs, embedder: Any, settings: RetrieverSettings) -> dict[str, list[str]]:
    """The negatives of each query that has any."""
    from sentence_transformers.util import mine_hard_negatives

    answers = [(query, text) for query, texts in pairs.answers.items() for text in sorted(texts)]
    depth = settings.mine_depth or settings.mine_skip + _CANDIDATES_PER_NEGATIVE * settings.mine
    if not settings.quiet:
        sys.stderr.write(f"Mining negatives for {len(pairs.answers)} queries among {len(pairs.documents)} documents\n")
    lower = torch.autocast(embedder.device.type, torch.bfloat16, enabled=settings.bf16)
    with user_errors("These mining settings can't be used"), lower:
        found: Any = mine_hard_negatives(
            datasets.Dataset.from_dict({"query": [a[0] for a in answers], "positive": [a[1] for a in answers]}),
            embedder,
            corpus=pairs.documents,
            range_min=settings.mine_skip,
            range_max=depth,
            relative_margin=None if settings.mine_margin < 0 else settings.mine_margin,
            num_negatives=settings.mine,
            output_format="triplet",
            batch_size=settings.mini_batch,
            verbose=False,
        )
    mined: dict[str, dict[str, None]] = {}
    for query, negative in zip(found["query"], found["negative"], strict=True):
        mined.setdefault(query, {})[negative] = None
    if not mined:
        raise LlamoryError("No hard negatives were found; set a lower mine_margin (-1 for none), or mine to 0.")
    return {query: list(negatives) for query, negatives in mined.items()}

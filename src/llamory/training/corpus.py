"""An endless, seeded and resumable stream of tokenized documents from sources with given proportions."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.io import PathLike, json_digest
from llamory.documents import Document, find_files, read_file
from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A document of a source: the index of its file (in the order of `find_files`) and its index within the file.
Key = tuple[int, int]
_PROPORTION_TOLERANCE = 1e-3  # how far from 1 the sum of all proportions may be


@dataclass(frozen=True)
class Source:
    """Documents and their proportion of the tokens."""

    paths: PathLike | Sequence[PathLike]  # files and folders, as for `llamory.documents.find_files`
    proportion: float = 1.0  # the proportions of all sources add up to 1


def make_sources(paths: Sequence[PathLike], proportions: Sequence[float] | None = None) -> list[Source]:
    """One source of all paths, or with proportions one source per path; raises LlamoryError if these can't be used."""
    if proportions is None:
        return [Source(list(paths))]
    if len(proportions) != len(paths):
        counts = f"{len(paths)} sources of documents but {len(proportions)} proportions"
        raise LlamoryError(f"There are {counts}; give one for each.")
    sources = [Source([path], proportion) for path, proportion in zip(paths, proportions, strict=True)]
    _check_proportions(sources)
    return sources


class DocumentStream:
    """An endless iterator of documents as `(token ids, source index, key)`.

    Each next document is of the source that is furthest behind its proportion of the tokens so far. A source restarts
    in another order when it ends. The order of files depends on seed, epoch and source; documents are drawn from a
    shuffle buffer. Each shard takes every `shards`-th document of an epoch, or all of them if none of its own is long
    enough. Raises LlamoryError if a file or argument can't be used or a source has no document of `min_length` tokens,
    and while iterating if a line or file is broken.

    Args:
        sources: where documents come from.
        tokenizer: encodes each document, without special tokens.
        seed: of all shuffling.
        min_length: skip documents with fewer tokens.
        shuffle_buffer: documents per source to draw from; 0 keeps the order of documents and files.
        shard: index of this shard, of `shards`.
        shards: number of shards.
        text_field: field of a JSON line with the text.
        skip_broken: skip broken JSON lines and files that aren't UTF-8.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        min_length: int = 0,
        shuffle_buffer: int = 256,
        shard: int = 0,
        shards: int = 1,
        text_field: str = "text",
        skip_broken: bool = False,
    ) -> None:
        _check_proportions(sources)
        if min_length < 0 or shuffle_buffer < 0:
            raise LlamoryError(f"min_length, shuffle_buffer must be at least 0, not {min_length}, {shuffle_buffer}.")
        if not 0 <= shard < shards:
            raise LlamoryError(f"shard must be one of 0 to {shards - 1}, not {shard}.")
        total = sum(source.proportion for source in sources)
        self._proportions = [source.proportion / total for source in sources]
        drawing: dict[str, Any] = {"shuffle_buffer": shuffle_buffer, "shard": shard, "shards": shards}
        reading: dict[str, Any] = {"min_length": min_length, "text_field": text_field, "skip_broken": skip_broken}
        proportions = [source.proportion for source in sources]
        self._settings = {"seed": seed, **drawing, **reading, "proportions": proportions}
        reading["min_length"] = max(1, min_length)
        files = [_SourceFiles(find_files(source.paths), tokenizer, **reading) for source in sources]
        self._readers = [_SourceReader(each, seed=f"{seed}/{number}", **drawing) for number, each in enumerate(files)]
        # Identifies the vocabulary and the names and sizes of files; folders may move.
        sizes = [[(path.name, path.stat().st_size) for path in each.paths] for each in files]
        self._digest = json_digest([sizes, sorted(tokenizer.get_vocab().items())])
        self.tokens_emitted = [0] * len(sources)
        for each in files:
            each.check()

    def __iter__(self) -> Iterator[tuple[list[int], int, Key]]:
        return self

    def __next__(self) -> tuple[list[int], int, Key]:
        total = sum(self.tokens_emitted)
        emitted = zip(self._proportions, self.tokens_emitted, strict=True)
        behind = [(proportion * total - tokens, proportion) for proportion, tokens in emitted]
        source = max(range(len(behind)), key=behind.__getitem__)
        key, tokens = self._readers[source].draw()
        self.tokens_emitted[source] += len(tokens)
        return tokens, source, key

    def read(self, documents: Iterable[tuple[int, Key]]) -> list[list[int]]:
        """Token ids of documents given by source and key; raises LlamoryError if one doesn't exist any more."""
        documents = list(documents)
        keys: dict[int, list[Key]] = defaultdict(list)
        for source, key in documents:
            keys[source].append(key)
        texts = {source: self._readers[source].files.texts(wanted) for source, wanted in keys.items()}
        return [self._readers[source].files.encode(texts[source][key]) for source, key in documents]

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON values: indices of files and documents, no text."""
        return {
            "settings": self._settings,
            "files": self._digest,
            "taken": list(self.tokens_emitted),
            "readers": [reader.state_dict() for reader in self._readers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a position; raises LlamoryError if it is of other files or settings or another tokenizer."""
        check_same_settings(state["settings"], self._settings)
        if state["files"] != self._digest:
            raise LlamoryError("The checkpoint's position in the data is of other files or another tokenizer.")
        for reader, reader_state in zip(self._readers, state["readers"], strict=True):
            reader.load_state_dict(reader_state)
        self.tokens_emitted = list(state["taken"])


def check_same_settings(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise LlamoryError if a setting of a saved position differs."""
    for name in current:
        if saved.get(name) != current[name]:
            saved_position = f"The checkpoint's position in the data is for {name} {saved.get(name)}"
            raise LlamoryError(f"{saved_position}, not {current[name]}; resume with the same settings.")


@dataclass(frozen=True)
class _SourceFiles:
    """The files of one source and how they are tokenized."""

    paths: list[Path]
    tokenizer: PreTrainedTokenizerBase
    min_length: int
    text_field: str
    skip_broken: bool

    def documents(self, file: int) -> Iterator[Document]:
        return read_file(self.paths[file], text_field=self.text_field, skip_broken=self.skip_broken)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def texts(self, keys: Iterable[Key]) -> dict[Key, str]:
        """Texts of the documents with these keys; each file is read once, up to its last requested document."""
        wanted: dict[int, set[int]] = defaultdict(set)
        for file, number in keys:
            wanted[file].add(number)
        texts = {}
        for file, numbers in wanted.items():
            for number, document in enumerate(islice(self.documents(file), max(numbers) + 1)):
                if number in numbers:
                    texts[file, number] = document.text
            if (file, max(numbers)) not in texts:
                raise LlamoryError(f"{self.paths[file]} has no document {max(numbers)} any more; use unchanged files.")
        return texts

    def check(self) -> None:
        """Raise LlamoryError if no document is long enough."""
        longest = 0
        for document in chain.from_iterable(map(self.documents, range(len(self.paths)))):
            longest = max(longest, len(self.encode(document.text)))
            if longest >= self.min_length:
                return
        names = ", ".join(map(str, self.paths[:3])) + (", …" if len(self.paths) > 3 else "")
        problem = f"at most {longest} tokens, fewer than min_length {self.min_length}"
        raise LlamoryError(f"Documents have {problem}, in {names}.")


class _SourceReader:
    """The documents of one source, epoch after epoch, through a shuffle buffer."""

    def __init__(self, files: _SourceFiles, *, seed: str, shuffle_buffer: int, shard: int, shards: int) -> None:
        self.files, self._seed, self._shard, self._shards = files, seed, shard, shards
        self._shuffles, self._capacity = shuffle_buffer > 0, max(1, shuffle_buffer)
        self._start_epoch(0, unsharded=False)

    def _start_epoch(self, epoch: int, *, unsharded: bool) -> None:
        """Start an epoch of this shard's documents or, `unsharded`, of all of them."""
        self._epoch, self._unsharded = epoch, unsharded
        self._epoch_seed = f"{self._seed}/{epoch}" + (f"/{self._shard}" if unsharded else "")
        self._order = list(range(len(self.files.paths)))
        if self._shuffles:
            random.Random(self._epoch_seed).shuffle(self._order)
        self._file_index = 0  # index in the order of the current file
        self._document = 0  # documents read of the current file
        self._num_read = 0  # documents read in the epoch, of all shards
        self._draws = 0  # documents drawn from the buffer
        self._num_used = 0  # drawn documents that are long enough
        self._buffer: list[tuple[Key, str]] = []
        self._open: Iterator[Document] | None = None

    def draw(self) -> tuple[Key, list[int]]:
        """Key and token ids of the next document that is long enough."""
        while True:
            self._fill()
            if not self._buffer:
                self._next_epoch()
                continue
            # A new generator for each draw, so that the state is only the number of draws.
            rng = random.Random(f"{self._epoch_seed}/{self._shard}/{self._draws}")
            self._draws += 1
            index = rng.randrange(len(self._buffer))
            self._buffer[index], self._buffer[-1] = self._buffer[-1], self._buffer[index]
            key, text = self._buffer.pop()
            tokens = self.files.encode(text)
            if len(tokens) >= self.files.min_length:
                self._num_used += 1
                return key, tokens

    def _next_epoch(self) -> None:
        if self._num_used:
            self._start_epoch(self._epoch + 1, unsharded=False)
            return
        if self._unsharded:
            self.files.check()  # the files have changed since the first check
        self._start_epoch(self._epoch, unsharded=True)

    def _fill(self) -> None:
        """Fill the buffer with the shard's next documents of the epoch."""
        while len(self._buffer) < self._capacity and self._file_index < len(self._order):
            file = self._order[self._file_index]
            if self._open is None:
                self._open = islice(self.files.documents(file), self._document, None)
            document = next(self._open, None)
            if document is None:
                self._file_index, self._document, self._open = self._file_index + 1, 0, None
                continue
            if self._unsharded or self._num_read % self._shards == self._shard:
                self._buffer.append(((file, self._document), document.text))
            self._document += 1
            self._num_read += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "epoch": self._epoch,
            "alone": self._unsharded,
            "at": self._file_index,
            "document": self._document,
            "seen": self._num_read,
            "drawn": self._draws,
            "used": self._num_used,
            "buffer": [list(key) for key, _ in self._buffer],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        keys = [(int(file), int(document)) for file, document in state["buffer"]]
        texts = self.files.texts(keys)
        self._start_epoch(state["epoch"], unsharded=state["alone"])
        self._file_index, self._document, self._num_read = state["at"], state["document"], state["seen"]
        self._draws, self._num_used = state["drawn"], state["used"]
        self._buffer = [(key, texts[key]) for key in keys]


def _check_proportions(sources: Sequence[Source]) -> None:
    if not sources:
        raise LlamoryError("No documents were given; name at least one file or folder.")
    proportions = [source.proportion for source in sources]
    named = ", ".join(f"{proportion:g}" for proportion in proportions)
    if not all(proportion > 0 for proportion in proportions):
        raise LlamoryError(f"Proportions of sources must be greater than 0, not {named}.")
    if not abs(sum(proportions) - 1) <= _PROPORTION_TOLERANCE:
        raise LlamoryError(f"Proportions of sources must add up to 1; {named} make {sum(proportions):g}.")

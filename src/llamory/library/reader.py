"""Who reads a library's documents and answers from them: the settings, the model, and the memories that it makes."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError
from llamory.ingest.stored_documents import DocumentTokens, StoredDocument, tokenize_document
from llamory.library.memory_cache import DEFAULT_BUDGET, MemoryCache, parse_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank

# Changes when documents become other tokens, so that memories of the old ones aren't used.
TEXT_VERSION = 1
# Memories that stay open: they are mapped, so what they take is little, but each holds a file.
MAX_OPEN_MEMORIES = 256
SEGMENT = "document"
# Beside its tokens, a memory file has a header, which grows with layers and passages.
HEADER_BYTES = 1 << 16
_CONFIG_NAME = "reader.json"


@dataclass(frozen=True)
class ReaderSettings:
    """How documents are read and memory is searched. What isn't given is as it was noted, or as the model has it.

    Attributes:
        reader: the model: a folder, `.gguf` file, hub id, "default" or a loaded LongLLaMA.
        mem_layers, context_length, mem_dtype: as for `llamory.longllama.loading.load_long_model`.
        memory_budget: bytes that all memories may take on the disk, or a text such as "10GB" (the default).
        mem_search, mem_top_k, last_context_length: as for `load_long_model`; they are never noted.
        tokenizer: of a loaded reader, if it isn't in the model's folder.
    """

    reader: str | LongLlamaForCausalLM | None = None
    mem_layers: Sequence[int] | None = None
    context_length: int | None = None
    mem_dtype: str | None = None
    memory_budget: int | str | None = None
    mem_search: str | None = None
    mem_top_k: int | None = None
    last_context_length: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def with_saved_config(self, folder: Path) -> ReaderSettings:
        """The same, with what was noted in a folder where nothing is given.

        A reader that is given, and isn't the noted one, brings its own layers, context and type.
        """
        saved = _ReaderConfig.load(folder)
        if saved is None:
            return self
        explicit = {name: getattr(self, name) for name in _CONFIG_FIELDS}
        if self.reader is not None and self._name() != saved.reader:
            return replace(self, memory_budget=explicit["memory_budget"] or saved.memory_budget)
        return replace(
            self, **{name: getattr(saved, name) if value is None else value for name, value in explicit.items()}
        )

    def save_config(self, folder: Path) -> None:
        """Keep the reader, and how it reads, for those who open the library later."""
        name = self._name()
        if self.reader is not None and not isinstance(self.reader, str) and not (name and Path(name).exists()):
            return  # a loaded model that can't be found again
        saved = _ReaderConfig(
            name,
            None if self.mem_layers is None else list(self.mem_layers),
            self.context_length,
            self.mem_dtype,
            None if self.memory_budget is None else parse_size(self.memory_budget),
        )
        if saved != _ReaderConfig.load(folder):
            saved.save(folder)

    def _name(self) -> str | None:
        """The reader's name as it is noted."""
        from llamory.ingest.memory_file import canonical_name

        if self.reader is None:
            return None
        return canonical_name(self.reader if isinstance(self.reader, str) else str(self.reader.config._name_or_path))


@dataclass(frozen=True)
class _ReaderConfig:
    """What a library's memory folder says of its reader."""

    reader: str | None = None
    mem_layers: list[int] | None = None
    context_length: int | None = None
    mem_dtype: str | None = None
    memory_budget: int | None = None

    @classmethod
    def load(cls, folder: Path) -> _ReaderConfig | None:
        try:
            values = json.loads((folder / _CONFIG_NAME).read_text(encoding="utf-8"))
            return cls(**{field.name: values.get(field.name) for field in fields(cls)})
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError, OSError) as error:
            raise LlamoryError(
                f"{folder / _CONFIG_NAME} can't be read: remove it, and name the reader again."
            ) from error

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{_CONFIG_NAME}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        temporary.replace(folder / _CONFIG_NAME)


_CONFIG_FIELDS = tuple(field.name for field in fields(_ReaderConfig))


def has_reader_config(folder: Path) -> bool:
    """Whether a library's memory folder says who reads it."""
    return (folder / _CONFIG_NAME).exists()


def saved_reader_name(folder: Path) -> str | None:
    """The reader that a library's memory folder names; None if it is the default, or none is noted."""
    saved = _ReaderConfig.load(folder)
    return None if saved is None else saved.reader


class Reader:
    """A model that reads documents, with the shelf that their memories are kept on.

    Args:
        settings: complete, see `ReaderSettings.with_saved_config`.
        folder: of the shelf.
        device, bf16: where and how the model computes.

    Raises:
        LlamoryError: the model can't be loaded, has no memory layers, or a setting isn't possible.
    """

    def __init__(self, settings: ReaderSettings, folder: Path, *, device: str | None = None, bf16: bool = False):
        from llamory.ingest.memory_file import canonical_name, load_model_for
        from llamory.longllama import LongLlamaForCausalLM
        from llamory.models.base import bos_ids, load_tokenizer
        from llamory.qa.generation import Generator

        budget = DEFAULT_BUDGET if settings.memory_budget is None else parse_size(settings.memory_budget)
        self.memory_cache = MemoryCache(folder, budget)
        if isinstance(settings.reader, LongLlamaForCausalLM):
            name = str(settings.reader.config._name_or_path)
            self.model = settings.reader
            if not self.model.config.mem_layers:
                raise LlamoryError("The reader has no memory layers; load it with mem_layers, such as mem_layers=[8].")
        else:
            name = str(settings.reader or "default")
            self.model = load_model_for(
                [],
                name,
                mem_layers=settings.mem_layers,
                context_length=settings.context_length,
                mem_dtype=settings.mem_dtype,
                mem_search=settings.mem_search,
                mem_top_k=settings.mem_top_k,
                last_context_length=settings.last_context_length,
                device=device,
                bf16=bf16,
                shared=True,
            )
        self.name = canonical_name(name) if name else name
        self.tokenizer = load_tokenizer(name) if settings.tokenizer is None else settings.tokenizer
        self.generator = Generator(self.model, self.tokenizer, self.name)
        self.context: int = self.model.config.max_position_embeddings
        self._prefix_ids = bos_ids(self.tokenizer)
        self._identity = json.dumps(
            [
                TEXT_VERSION,
                self.model.memory_fingerprint(),
                self.model.config.mem_dtype,
                _tokenizer_digest(self.tokenizer),
            ]
        )
        self._open_banks: OrderedDict[str, MemoryBank] = OrderedDict()

    # ---- memories that are there -------------------------------------------------------------------------------------

    def key(self, document: StoredDocument) -> str:
        """What a document's memory is filed under: its text and all that makes this reader's memories its own."""
        return document.key(self._identity)

    def cached_memory(self, document: StoredDocument) -> MemoryBank | None:
        """A document's memory, if it is there: one segment, `SEGMENT`."""
        key, config = self.key(document), self.model.config
        if key in self._open_banks:
            # What was opened before is warm: ways of searching have got to know it.
            self.memory_cache.mark_used(key)
            self._open_banks.move_to_end(key)
            return self._open_banks[key]
        bank = self.memory_cache.get(
            key, fingerprint=self.model.memory_fingerprint(), layers=config.mem_layers, dtype=config.mem_dtype
        )
        if bank is not None:
            self._prepare_pages(key, bank)
            self._open_banks[key] = bank
            while len(self._open_banks) > MAX_OPEN_MEMORIES:
                self._open_banks.popitem(last=False)
        return bank

    # ---- memories that have to be made -------------------------------------------------------------------------------

    def tokenize(self, document: StoredDocument) -> DocumentTokens:
        """A document as this reader reads it."""
        return tokenize_document(document, self.tokenizer, self._prefix_ids)

    def size(self, document_tokens: DocumentTokens) -> int:
        """Bytes that a document's memory takes on the disk, at most."""
        from llamory.ingest.batching import bytes_per_token
        from llamory.memory.search.page_index import page_bytes

        bank = self.model.new_memory()
        size = len(document_tokens.ids) * bytes_per_token(bank) + HEADER_BYTES
        return size + page_bytes(bank, len(document_tokens.ids)) + HEADER_BYTES if self._uses_pages else size

    def read(
        self, documents: Iterable[StoredDocument], advance: Callable[[str, int], None]
    ) -> Iterator[tuple[StoredDocument, MemoryBank]]:
        """Read documents, each by itself, and give each with its memory as soon as it is there.

        Short ones are read together, so the order isn't kept.

        Args:
            documents: what to read.
            advance: is told the document's source and how many tokens of it were read now.
        """
        from llamory.ingest.batching import batches_by_length, encode_window

        pending = [(document, self.tokenize(document)) for document in documents]
        training = self.model.training
        self.model.eval()
        try:
            for batch in batches_by_length(
                [each for each in pending if self._fits_window(each[1])], lambda each: len(each[1].ids)
            ):
                banks = [self.model.new_memory() for _ in batch]
                encode_window(self.model, [document_tokens.ids for _, document_tokens in batch], banks)
                for (document, document_tokens), bank in zip(batch, banks, strict=True):
                    advance(document.source, len(document_tokens.ids))
                    yield document, self._label_memory(document, document_tokens, bank)
            for document, document_tokens in pending:
                if not self._fits_window(document_tokens):
                    bank = self.model.new_memory()
                    for window in document_tokens.ids.split(self.context):
                        encode_window(self.model, [window], [bank])
                        advance(document.source, len(window))
                    yield document, self._label_memory(document, document_tokens, bank)
        finally:
            self.model.train(training)

    def store(self, document: StoredDocument, bank: MemoryBank, protected: Collection[str] = ()) -> MemoryBank:
        """Put a memory on the shelf. Gives the memory as it is there, or as it was where the shelf is too small.

        Args:
            document: whose memory.
            bank: the memory, which is in RAM until now.
            protected: keys of memories that don't make room for it.

        Raises:
            OSError: it can't be written.
        """
        if self.memory_cache.put(self.key(document), bank, protected=protected):
            return self.cached_memory(document) or bank
        return bank

    @property
    def _uses_pages(self) -> bool:
        return bool(self.model.config.mem_search == "pages")

    def _prepare_pages(self, key: str, bank: MemoryBank) -> None:
        """Have a memory's pages ready, and write them down if they weren't there, as sorting takes its time."""
        if not self._uses_pages:
            return
        from llamory.memory.search.page_index import load_pages, save_pages

        path = self.memory_cache.pages_path(key)
        if not load_pages(bank, path):
            with suppress(OSError):  # a shelf that is full or can only be read from
                save_pages(bank, path)
                self.memory_cache.register_file(path, protected=[key])

    def _fits_window(self, document_tokens: DocumentTokens) -> bool:
        return len(document_tokens.ids) <= self.context

    def _label_memory(self, document: StoredDocument, document_tokens: DocumentTokens, bank: MemoryBank) -> MemoryBank:
        bank.rename(bank.segments[0], SEGMENT)
        bank.set_metadata(
            SEGMENT,
            source=document.source,
            title=document.title,
            text=document.digest,
            tokens=len(document_tokens.ids),
            starts=document_tokens.starts,
            model=self.name,
            context_length=self.context,
        )
        return bank


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what makes a tokenizer's tokens its own."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(tokenizer)
    return hashlib.sha256(text.encode()).hexdigest()

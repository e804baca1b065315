"""The reader of a library: its configuration, its model, and the memories it makes of documents."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.io import write_json
from llamory.errors import LlamoryError
from llamory.ingest.documents import StoredDocument, TokenizedDocument
from llamory.library.memory_cache import DEFAULT_BUDGET, MemoryCache, memory_key, parse_size
from llamory.models.base import unshadowed_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llamory.longllama import LongLlamaForCausalLM
    from llamory.memory import MemoryBank

TEXT_VERSION = 1  # part of a memory's key: raise it when documents are tokenized in another way
MAX_OPEN_MEMORIES = 256  # they are mapped, so each costs little RAM but holds a file
SEGMENT = "document"
HEADER_BYTES = 1 << 16  # of a memory file, at most
_CONFIG_NAME = "reader.json"
_SAVED_FIELDS = ("reader", "mem_layers", "context_length", "mem_dtype", "memory_budget")
_MODEL_SETTINGS = ("mem_layers", "context_length", "mem_dtype", "mem_search", "mem_top_k", "last_context_length")


@dataclass(frozen=True)
class ReaderConfig:
    """How documents are encoded and memory is searched. None: the library's saved value, or the model's default."""

    reader: str | LongLlamaForCausalLM | None = None  # a folder, `.gguf` file, hub id, "default" or a loaded model
    mem_layers: Sequence[int] | None = None  # this and others: as for `llamory.longllama.loading.load_long_model`
    context_length: int | None = None
    mem_dtype: str | None = None
    memory_budget: int | str | None = None  # bytes that all memories may take on disk, or a text such as "10GB"
    mem_search: str | None = None  # this and what follows isn't saved
    mem_top_k: int | None = None
    last_context_length: int | None = None
    tokenizer: PreTrainedTokenizerBase | None = None  # of a loaded reader, if it isn't in the model's folder

    @classmethod
    def load(cls, folder: Path) -> ReaderConfig | None:
        """The configuration saved in a library's memory folder, if any; LlamoryError if the file is damaged."""
        path = folder / _CONFIG_NAME
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{name: values.get(name) for name in _SAVED_FIELDS})
        except FileNotFoundError:
            return None
        except (ValueError, AttributeError, OSError) as error:
            raise LlamoryError(f"{path} can't be read: remove it, and name the reader again.") from error

    def save(self, folder: Path) -> None:
        """Save the configuration for those who open the library later; OSError if the file can't be written."""
        name = self._name()
        if self.reader is not None and not isinstance(self.reader, str) and not (name and Path(name).exists()):
            return  # a loaded model that can't be found again
        layers = None if self.mem_layers is None else list(self.mem_layers)
        budget = None if self.memory_budget is None else parse_size(self.memory_budget)
        saved = ReaderConfig(name, layers, self.context_length, self.mem_dtype, budget)
        if saved != ReaderConfig.load(folder):
            write_json(folder / _CONFIG_NAME, {name: getattr(saved, name) for name in _SAVED_FIELDS})

    @staticmethod
    def is_saved(folder: Path) -> bool:
        """Whether a library's memory folder has a configuration."""
        return (folder / _CONFIG_NAME).exists()

    def with_saved(self, folder: Path) -> ReaderConfig:
        """This configuration with the saved values where it has none; only the budget if it names another reader."""
        saved = ReaderConfig.load(folder)
        if saved is None:
            return self
        other_reader = self.reader is not None and self._name() != saved.reader
        names = ["memory_budget"] if other_reader else _SAVED_FIELDS
        values = {name: getattr(saved, name) for name in names if getattr(self, name) is None}
        if values.get("reader"):
            values["reader"] = unshadowed_name(values["reader"])
        return replace(self, **values)

    def _name(self) -> str | None:
        """The reader's name as it is saved."""
        from llamory.ingest.memory_file import canonical_name

        if self.reader is None:
            return None
        return canonical_name(self.reader if isinstance(self.reader, str) else str(self.reader.config._name_or_path))


class Reader:
    """A model that encodes documents, with the cache of their memories.

    Args:
        config: complete, see `ReaderConfig.with_saved`.
        folder: of the cache.

    Raises:
        LlamoryError: the model can't be loaded, has no memory layers, or a setting isn't possible.
    """

    def __init__(self, config: ReaderConfig, folder: Path, *, device: str | None = None, bf16: bool = False):
        from llamory.ingest.memory_file import canonical_name, load_model_for
        from llamory.longllama import LongLlamaForCausalLM
        from llamory.models.base import bos_ids, load_tokenizer
        from llamory.qa.generation import Generator

        budget = DEFAULT_BUDGET if config.memory_budget is None else parse_size(config.memory_budget)
        self.memory_cache = MemoryCache(folder, budget)
        if isinstance(config.reader, LongLlamaForCausalLM):
            name = str(config.reader.config._name_or_path)
            self.model = config.reader
            if not self.model.config.mem_layers:
                raise LlamoryError("The reader has no memory layers; load it with mem_layers, such as mem_layers=[8].")
        else:
            name = str(config.reader or "default")
            settings: dict[str, Any] = {each: getattr(config, each) for each in _MODEL_SETTINGS}
            self.model = load_model_for([], name, **settings, device=device, bf16=bf16, shared=True)
        self.name = canonical_name(name) if name else name
        self.tokenizer = load_tokenizer(name) if config.tokenizer is None else config.tokenizer
        self.generator = Generator(self.model, self.tokenizer, self.name)
        self._prefix_ids = bos_ids(self.tokenizer)
        fingerprint, dtype = self.model.memory_fingerprint(), self.model.config.mem_dtype
        self._identity = json.dumps([TEXT_VERSION, fingerprint, dtype, _tokenizer_digest(self.tokenizer)])
        self._open_banks: OrderedDict[str, MemoryBank] = OrderedDict()

    def key(self, document: StoredDocument | TokenizedDocument) -> str:
        """The key of a document's memory: it depends on the content and on the reader."""
        return memory_key(document.digest, self._identity)

    def cached_memory(self, key: str) -> MemoryBank | None:
        """A cached memory, with one segment named `SEGMENT`; None if there is none."""
        config = self.model.config
        if key in self._open_banks:
            # A bank that was opened before has the search's caches.
            self.memory_cache.mark_used(key)
            self._open_banks.move_to_end(key)
            return self._open_banks[key]
        fingerprint = self.model.memory_fingerprint()
        bank = self.memory_cache.get(key, fingerprint=fingerprint, layers=config.mem_layers, dtype=config.mem_dtype)
        if bank is not None:
            self._prepare_pages(key, bank)
            self._open_banks[key] = bank
            while len(self._open_banks) > MAX_OPEN_MEMORIES:
                self._open_banks.popitem(last=False)
        return bank

    def tokenize(self, document: StoredDocument) -> TokenizedDocument:
        """A document's tokens, starting with BOS if the tokenizer adds it."""
        return document.tokenize(self.tokenizer, self._prefix_ids)

    def size(self, document: TokenizedDocument) -> int:
        """Bytes that a document's memory takes on disk, at most."""
        from llamory.memory.search.page_index import page_bytes

        bank = self.model.new_memory()
        size = len(document.ids) * bank.token_bytes + HEADER_BYTES
        return size + page_bytes(bank, len(document.ids)) + HEADER_BYTES if self._uses_pages else size

    def read(
        self, documents: Iterable[TokenizedDocument], advance: Callable[[str, int], None]
    ) -> Iterator[tuple[TokenizedDocument, MemoryBank]]:
        """Encode documents and yield each with its memory, short ones first; `advance` gets (source, tokens)."""
        from llamory.ingest.encode import encode_documents

        context_length = self.model.config.max_position_embeddings
        for batch in encode_documents(self.model, list(documents), lambda each, tokens: advance(each.source, tokens)):
            for document, bank in batch:
                bank.rename(bank.segments[0], SEGMENT)
                bank.set_metadata(SEGMENT, **document.metadata(self.name, context_length))
                yield document, bank

    def store(self, document: TokenizedDocument, bank: MemoryBank, protected: Collection[str] = ()) -> MemoryBank:
        """Put a memory into the cache, evicting no `protected` ones, and return it mapped, or as it is if too large."""
        key = self.key(document)
        if self.memory_cache.put(key, bank, protected=protected):
            return self.cached_memory(key) or bank
        return bank

    @property
    def _uses_pages(self) -> bool:
        return bool(self.model.config.mem_search == "pages")

    def _prepare_pages(self, key: str, bank: MemoryBank) -> None:
        """Load a memory's pages; compute and save them if there are none, as clustering takes long."""
        if not self._uses_pages:
            return
        from llamory.memory.search.page_index import load_pages, save_pages

        path = self.memory_cache.pages_path(key)
        if not load_pages(bank, path):
            with suppress(OSError):  # a full or read-only disk
                save_pages(bank, path)
                self.memory_cache.register_file(path, protected=[key])


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that determines a tokenizer's tokens."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(tokenizer)
    return hashlib.sha256(text.encode()).hexdigest()

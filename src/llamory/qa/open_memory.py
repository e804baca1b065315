"""Questions to memory files."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common import ram
from llamory.common.io import PathLike
from llamory.errors import LlamoryError
from llamory.ingest.memory_file import MemoryFileInfo, canonical_name, check_model_matches, load_model_for
from llamory.longllama import LongLlamaForCausalLM
from llamory.memory import MemoryBank
from llamory.qa.chat import LoadedMemory, QASession, not_one_document
from llamory.qa.generation import OOM_ADVICE, Answer, Generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OpenMemory:
    """Memory files with the model that made them, as a source of documents for `QASession`.

        print(OpenMemory("notes.memory").ask("Who built the bridge?").answer)

    Args:
        memory: one or more memory files. If documents have the same name, the file's name is put in front.
        model: a folder, `.gguf` file, hub id, "default" or a loaded model; by default the recorded one.
        tokenizer: of a loaded model, if it isn't in the model's folder.
        documents: names of the documents to use; the end of a name, or a title, is enough if it is unique.
        settings: as for `llamory.longllama.loading.load_long_model`: `mem_search`, `mem_top_k`,
            `last_context_length`; and `bf16`, `device`.

    Raises:
        LlamoryError: a file is damaged or another model's, there is no such document, or a setting isn't possible.
    """

    def __init__(
        self,
        memory: PathLike | Sequence[PathLike],
        *,
        model: PathLike | LongLlamaForCausalLM | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        documents: Sequence[str] | None = None,
        **settings: Any,
    ):
        from llamory.models.base import load_tokenizer

        with ram.translate_oom(OOM_ADVICE):
            memory_files = [MemoryFileInfo(path) for path in _unique_paths(memory)]
            if not any(file.segments for file in memory_files):
                raise LlamoryError(f"There is nothing in {', '.join(str(file.path) for file in memory_files)}.")
            if isinstance(model, LongLlamaForCausalLM):
                name = str(model.config._name_or_path)
                check_model_matches(memory_files, model, name)
                self.model = model
            else:
                name = str(model or memory_files[0].model or "default")
                self.model = load_model_for(memory_files, None if model is None else name, **settings)
            self.tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
            self.name = canonical_name(name)
            self.generator = Generator(self.model, self.tokenizer, self.name)
            self.memory = self._load_files(memory_files, documents)

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents."""
        return self.memory.segments

    def ask(self, question: str, **settings: Any) -> Answer:
        """Ask a question as `QASession.ask`; the memory doesn't change."""
        return self.chat().ask(question, **settings)

    def chat(self) -> QASession:
        """A conversation about all documents; the memory doesn't change."""
        session = QASession(self, lambda _: self.documents)
        session.attach(self.documents)
        return session

    def load(self, names: Sequence[str]) -> LoadedMemory:
        """The memory of documents."""
        memory = self.memory.slice([])
        memory.attach(self.memory, names)
        return LoadedMemory(memory)

    def _load_files(self, memory_files: Sequence[MemoryFileInfo], documents: Sequence[str] | None) -> MemoryBank:
        """One memory of all files, or of the documents with these names."""
        combined, dtype = self.model.new_memory(), memory_files[0].dtype
        for file in memory_files:
            bank = MemoryBank.load(file.path, fingerprint=combined.fingerprint, layers=combined.layers, dtype=dtype)
            bank.rename_all(_new_names(bank.segments, combined.segments, Path(file.path).name))
            combined.attach(bank)
        if documents is None:
            return combined
        selected = combined.slice([])
        selected.attach(combined, _match_names(combined, documents))
        return selected


def _new_names(names: Sequence[str], used_names: Sequence[str], file: str) -> dict[str, str]:
    """Names with the file's name in front, for the documents whose names are used."""
    used, own, renamed = set(used_names), set(names), dict[str, str]()
    for name in filter(used.__contains__, names):
        new, number = f"{file}:{name}", 1
        while new in used or new in own:
            number += 1
            new = f"{file} ({number}):{name}"
        renamed[name] = new
        own.add(new)
    return renamed


def _match_names(bank: MemoryBank, documents: Sequence[str]) -> list[str]:
    """The segments with these names, names that end so, or titles; each once."""
    by_end, by_title = defaultdict[str, list[str]](list), defaultdict[str, list[str]](list)
    for name in bank.segments:
        by_title[bank.metadata(name).get("title", "")].append(name)
        for separator in re.finditer("[/:]", name):
            by_end[name[separator.end() :]].append(name)
    segments, matched = set(bank.segments), dict[str, None]()
    for document in documents:
        found = [document] if document in segments else by_end.get(document) or by_title.get(document) or []
        if len(found) != 1:
            raise not_one_document(document, found, bank.segments, "in memory")
        matched[found[0]] = None
    return list(matched)


def _unique_paths(memory: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [memory] if isinstance(memory, str | Path) or not isinstance(memory, Sequence) else list(memory)
    if not paths:
        raise LlamoryError("No memory was given; name at least one file that documents were read into.")
    return list({Path(path).resolve(): path for path in paths}.values())

"""Questions to what was read: memories are mounted, the same model answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common import ram
from llamory.errors import LlamoryError
from llamory.ingest.memory_file import MemoryFileInfo, PathLike, canonical_name, check_model_matches, load_model_for
from llamory.longllama import LongLlamaForCausalLM
from llamory.memory import MemoryBank
from llamory.qa.chat import Chat
from llamory.qa.evidence import DEFAULT_EVIDENCE_RATIO, make_evidence_search
from llamory.qa.generation import MAX_NEW_TOKENS, OOM_ADVICE, Answer, GenerationSettings, Generator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES_SHOWN = 5


def ask(question: str, memory: PathLike | Sequence[PathLike], **settings: Any) -> Answer:
    """Ask one question; to ask several, open the memory once with `OpenMemory`.

    Args:
        question: the question.
        memory: one or more memory files.
        settings: as for `OpenMemory` and `OpenMemory.ask`.

    Raises:
        LlamoryError: as those two.
    """
    constructor_names = (
        "model",
        "tokenizer",
        "documents",
        "mem_search",
        "mem_top_k",
        "last_context_length",
        "bf16",
        "device",
    )
    constructor_kwargs = {key: settings.pop(key) for key in constructor_names if key in settings}
    return OpenMemory(memory, **constructor_kwargs).ask(question, **settings)


class OpenMemory:
    """Memories with the model that made them, to be asked any number of questions.

        memory = OpenMemory("notes.memory")
        for question in questions:
            print(memory.ask(question).answer)

    Args:
        memory: one or more memory files; documents of the same name get the file's name in front.
        model: the model that made them: a folder, `.gguf` file, hub id, "default" or a loaded model. By default where
            it was then.
        tokenizer: the tokenizer of a loaded model, if it isn't in the model's folder.
        documents: only documents of these names; the end of a name, or a title, is enough where it can't be mistaken.
        settings: as for `llamory.longllama.loading.load_long_model`: `mem_search`, `mem_top_k`,
            `last_context_length`; and `bf16`, `device`.

    Raises:
        LlamoryError: a memory is damaged or another model's, there is no such document, or a setting isn't possible.
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
            if not any(memory_file.segments for memory_file in memory_files):
                raise LlamoryError(
                    f"There is nothing in {', '.join(str(memory_file.path) for memory_file in memory_files)}: read documents."
                )
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
            self.memory = self._attach(memory_files, documents)

    @property
    def documents(self) -> tuple[str, ...]:
        """Names of the documents in memory."""
        return self.memory.segments

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        temperature: float = 0.0,
        seed: int | None = None,
        max_question_tokens: int | None = None,
        on_text: Callable[[str], None] | None = None,
        evidence_ratio: float = DEFAULT_EVIDENCE_RATIO,
    ) -> Answer:
        """Ask a question; the memory stays as it is.

        Args:
            question: what to ask; the tokenizer's chat template goes around it, if there is one.
            max_new_tokens: the most tokens of the answer.
            temperature: 0 for the likeliest answer, else the answer is sampled, the more freely the higher it is.
            seed: for sampling.
            max_question_tokens: the most tokens that the question may have, with the template.
            on_text: called with each piece of the answer as it comes.
            evidence_ratio: documents, and stretches of long ones, that make the question so many times less likely than the best
                does are left out (see `llamory.qa.evidence`); 0 answers from all.

        Raises:
            LlamoryError: the question is blank or longer than `max_question_tokens`, a setting isn't possible, or
                memory is short.
        """
        generation_settings = GenerationSettings(
            max_new_tokens, temperature, seed, max_question_tokens, on_text, evidence_ratio
        )
        prompt = self.generator.first_prompt(question, max_question_tokens)
        started = time.perf_counter()
        evidence = self.generator.select_evidence(question, self.memory, self.documents, evidence_ratio)
        memory = self.memory.slice(evidence)
        with ram.translate_oom(OOM_ADVICE):
            cache = self.model.memory_cache(memory)
            cache.search = make_evidence_search(self.model, self.memory, evidence)
        setup_seconds = time.perf_counter() - started
        result = self.generator.answer(prompt, cache, generation_settings)
        tokens = self.memory.length()
        return Answer.from_generation(
            question, prompt, result, self.documents, evidence, memory_tokens=tokens, setup_seconds=setup_seconds
        )

    def chat(self) -> Chat:
        """A conversation with this memory, which itself stays as it is: what is said is added to the chat's own."""
        return Chat(self.generator, self.memory)

    def _attach(self, memory_files: Sequence[MemoryFileInfo], documents: Sequence[str] | None) -> MemoryBank:
        """One memory of all that is asked for."""
        combined = self.model.new_memory()
        for memory_file in memory_files:
            bank = MemoryBank.load(
                memory_file.path,
                fingerprint=self.model.memory_fingerprint(),
                layers=combined.layers,
                dtype=memory_files[0].dtype,
            )
            for name in bank.segments:
                _rename_if_duplicate(bank, name, combined, Path(memory_file.path).name)
            combined.attach(bank)
        return combined if documents is None else _select_documents(combined, documents)


def _rename_if_duplicate(bank: MemoryBank, name: str, combined: MemoryBank, memory_file: str) -> None:
    """Put the file's name in front of a document's name that is there already."""
    new, number = name, 1
    while new in combined.segments or (new != name and new in bank.segments):
        new = f"{memory_file}:{name}" if number == 1 else f"{memory_file} ({number}):{name}"
        number += 1
    bank.rename(name, new)


def _select_documents(bank: MemoryBank, documents: Sequence[str]) -> MemoryBank:
    """The documents of these names."""
    selected_names: dict[str, None] = {}
    for document in documents:
        found = [name for name in bank.segments if name == document]
        found = found or [name for name in bank.segments if name.endswith((f"/{document}", f":{document}"))]
        found = found or [name for name in bank.segments if bank.metadata(name).get("title") == document]
        if len(found) != 1:
            shown = ", ".join((found or list(bank.segments))[:_NAMES_SHOWN])
            num_hidden = len(found or bank.segments) - _NAMES_SHOWN
            shown += f" and {num_hidden} more" if num_hidden > 0 else ""
            problem = (
                f"There is no document {document} in memory" if not found else f"{document} may be several documents"
            )
            raise LlamoryError(f"{problem}; give one of these names: {shown}.")
        selected_names[found[0]] = None
    subset = bank.fork()
    for name in bank.segments:
        if name not in selected_names:
            subset.drop(name)
    subset.reorder(list(selected_names))
    return subset


def _unique_paths(memory: PathLike | Sequence[PathLike]) -> list[PathLike]:
    paths = [memory] if isinstance(memory, str | Path) or not isinstance(memory, Sequence) else list(memory)
    if not paths:
        raise LlamoryError("No memory was given; name at least one file that documents were read into.")
    return list({Path(path).resolve(): path for path in paths}.values())

"""Instruction and chat data: JSON lines as token ids, with labels on the answers only."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from datasets import Dataset, Features, List, Value

import llamory
from llamory.common.io import PathLike, json_digest
from llamory.documents import find_files, read_json_lines
from llamory.documents.readers import string_entry
from llamory.errors import LlamoryError
from llamory.longllama.losses import IGNORE_INDEX
from llamory.models.base import encode_document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

ASSISTANT = "assistant"
# Some templates mark the assistant's text with these tags.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def split_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[tuple[str, bool]]:
    """Render a chat with the tokenizer's template and split it into texts, each with whether it is the assistant's.

    The assistant's text is what the template marks with `{% generation %}`. Without marks, it is what each answer adds
    to the chat so far with its generation prompt: the answer and its end mark, without trailing white space. Raises
    LlamoryError if the template rejects the chat (`role` and `content` of each turn, the first not the assistant's), or
    renders a turn differently once others follow.
    """
    import jinja2
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        template = tokenizer.get_chat_template()
        if _GENERATION.search(template):
            settings = {"return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
            texts, all_spans = render_jinja_template([list(messages)], chat_template=template, **settings)
            text, spans = texts[0], all_spans[0]
        else:
            text, spans = _spans_by_prefix(tokenizer, messages)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise LlamoryError(f"the chat template rejects these messages ({' '.join(str(error).split())})") from error
    parts, at = [], 0
    for start, end in spans:
        parts += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [(part, answer) for part, answer in (*parts, (text[at:], False)) if part]


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]
) -> tuple[str, list[tuple[int, int]]]:
    def render(turns: int, **settings: Any) -> str:
        return str(tokenizer.apply_chat_template(list(messages[:turns]), tokenize=False, **settings))

    whole, spans = render(len(messages)), []
    for turn, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before, after = render(turn, add_generation_prompt=True), render(turn + 1)
            if not after.startswith(before) or not whole.startswith(after):
                raise LlamoryError(
                    "the chat template renders earlier turns differently once others follow; put {% generation %} and "
                    "{% endgeneration %} around answers in the template"
                )
            spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return whole, spans


MESSAGES, DOCUMENT, CHATS, QUESTIONS = "messages", "document", "chats", "questions"
_INTEGER, _TEXT = Value("int32"), Value("string")
FEATURES = Features({"input_ids": List(_INTEGER), "labels": List(_INTEGER), "source": _TEXT, "document": _INTEGER})
_ROWS = Features({"kind": _TEXT, "texts": List(_TEXT), "answers": List(Value("bool")), "source": _TEXT})
LabeledText = tuple[str, bool]  # a text and whether it is an answer


@dataclass(frozen=True)
class InstructFormat:
    """The fields of the JSON objects; names and defaults are those of the published code.

    - `messages`: a chat for the tokenizer's template, about a `document` if there is one.
    - `document` with `chats` or `questions`: several chats or instructions about the document.
    - `chat_conversations_field`: a chat in the published format.
    - otherwise an instruction: prompt (with `prompt_field`), question and response, each between two fixed texts.
    """

    prompt_field: str | None = None
    question_field: str = "question"
    response_field: str = "response"
    pre_prompt_text: str = ""
    post_prompt_text: str = "\n"
    pre_question_text: str = ""
    post_question_text: str = "\n"
    pre_response_text: str = ""
    post_response_text: str = ""
    chat_conversations_field: str = "conversations"
    chat_data_field: str = "value"
    chat_source_name_field: str = "from"
    chat_model_source_name: str = "gpt"
    chat_initial_prompt: str = "You are a helpful ASSISTANT.\n\n"
    chat_model_response_prefix: str = "\nASSISTANT: "
    chat_human_response_prefix: str = "\nUSER: "

    def read_all(
        self, entry: dict[str, Any], tokenizer: PreTrainedTokenizerBase
    ) -> list[tuple[str, list[LabeledText]]]:
        """The examples of an object, kind and texts of each; raises like `read`."""
        document = string_entry(entry, DOCUMENT) if DOCUMENT in entry else None
        if document is not None and CHATS in entry:
            chats = _list_entry(entry, CHATS, list)
            return [self.read({MESSAGES: chat, DOCUMENT: document}, tokenizer) for chat in chats]
        if document is not None and QUESTIONS in entry:
            questions = _list_entry(entry, QUESTIONS)
            return [(QUESTIONS, [(document, False), *self._instruction(each)]) for each in questions]
        return [self.read(entry, tokenizer)]

    def read(self, entry: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[LabeledText]]:
        """The kind of an object (instruction, chat, messages or document) and its texts; raises LlamoryError."""
        if MESSAGES in entry:
            messages = _list_entry(entry, MESSAGES)
            turns = [{name: string_entry(turn, name) for name in ("role", "content")} for turn in messages]
            if turns[0]["role"] == ASSISTANT:
                raise LlamoryError("the first message is the assistant's; it should be a system or user message")
            # Without a template, `_Preprocessor.rows` raises an error even with skip_broken.
            parts = split_chat(tokenizer, turns) if tokenizer.chat_template else []
            if parts and DOCUMENT in entry:
                return DOCUMENT, [(string_entry(entry, DOCUMENT), False), *parts]
            return MESSAGES, parts
        if self.chat_conversations_field in entry:
            return "chat", self._chat(_list_entry(entry, self.chat_conversations_field))
        if self.question_field not in entry:
            raise LlamoryError(
                f"the object has neither {MESSAGES!r} nor {self.chat_conversations_field!r} nor "
                f"{self.question_field!r} (it has {', '.join(map(repr, entry)) or 'nothing'})"
            )
        return "instruction", self._instruction(entry)

    def _instruction(self, entry: dict[str, Any]) -> list[LabeledText]:
        question = self.pre_question_text + string_entry(entry, self.question_field) + self.post_question_text
        if self.prompt_field is not None:
            prompt = string_entry(entry, self.prompt_field)
            question = self.pre_prompt_text + prompt + self.post_prompt_text + question
        response = self.pre_response_text + string_entry(entry, self.response_field) + self.post_response_text
        return [(question, False), (response, True)]

    def _chat(self, turns: list[dict[str, Any]]) -> list[LabeledText]:
        parts = [(self.chat_initial_prompt, False)]
        for turn in turns:
            answers = string_entry(turn, self.chat_source_name_field) == self.chat_model_source_name
            prefix = self.chat_model_response_prefix if answers else self.chat_human_response_prefix
            parts += [(prefix, False), (string_entry(turn, self.chat_data_field), answers)]
        return parts


@dataclass(frozen=True)
class Lengths:
    """Maximum tokens of an example; longer parts are truncated at the end, as in the published code."""

    input: int = 2048  # of an instruction's prompt and question, with bos
    output: int = 2048  # of its response, with eos (lost by a longer response)
    total: int = 2048  # of a whole example of any kind

    def __post_init__(self) -> None:
        for name, least in (("input", 1), ("output", 1), ("total", 2)):
            if getattr(self, name) < least:
                raise LlamoryError(f"{name}_length must be at least {least}, not {getattr(self, name)}.")


def load_instructions(
    paths: PathLike | Iterable[PathLike],
    tokenizer: PreTrainedTokenizerBase,
    format: InstructFormat | None = None,
    lengths: Lengths | None = None,
    *,
    skip_broken: bool = False,
    num_proc: int | None = None,
    cache_dir: PathLike | None = None,
) -> Dataset:
    """Load JSON lines as tokenized examples, cached until files or settings change.

    An instruction is bos, prompt and question, response, eos; the answer is the response with eos. A published chat is
    bos, the initial prompt, and per turn a prefix and its text, with eos after the model's; the answers are these texts
    with eos. Each text is tokenized separately, as in the published code. Messages are rendered by the chat template
    and tokenized as a whole; a token that extends beyond an answer isn't part of it. A document comes before the rest,
    tokenized as for `llamory read`. Examples without an answer within their maximum length are skipped.

    Args:
        paths: `.jsonl` files and folders.
        tokenizer: a fast tokenizer with an eos token.
        format: the fields of the objects.
        lengths: maximum tokens.
        skip_broken: skip broken lines with a warning.
        num_proc: processes for tokenization.
        cache_dir: folder of the cache.

    Returns a dataset of `input_ids`, `labels` (ids of answers, -100 elsewhere), `source` (`path:line`) and `document`
    (how many of the first tokens are a document). Raises LlamoryError if a file is missing, a line is broken, the
    tokenizer is unsuitable, or no example has an answer.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    names = ", ".join(map(str, paths))
    files = [str(path) for path in find_files(paths) if path.suffix.lower() == ".jsonl"]
    if not files:
        raise LlamoryError(f"{names} has no .jsonl file; instructions must be JSON lines.")
    preprocessor = _Preprocessor(tokenizer, format or InstructFormat(), lengths or Lengths(), skip_broken)
    rows = _cached_rows(preprocessor, files, names, cache_dir)
    examples = rows.map(
        preprocessor.examples,
        batched=True,
        remove_columns=list(_ROWS),
        features=FEATURES,
        num_proc=min(num_proc, len(rows)) if num_proc else None,
        new_fingerprint=preprocessor.fingerprint(files, "examples"),
        desc="Tokenizing",
    )
    if num_skipped := len(rows) - len(examples):
        logger.warning("Skipped %d of %d examples: no answer within their length", num_skipped, len(rows))
    if not len(examples):
        limit = f"its first {preprocessor.lengths.total} tokens"
        raise LlamoryError(f"No example of {names} has an answer within {limit}; raise total_length.")
    return examples


@dataclass(frozen=True)
class _Preprocessor:
    """Makes examples from files in two steps: texts, then token ids."""

    tokenizer: PreTrainedTokenizerBase
    format: InstructFormat
    lengths: Lengths
    skip_broken: bool

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise LlamoryError("Instruction data need a fast tokenizer; use one with a tokenizer.json.")
        if self.tokenizer.eos_token_id is None:
            raise LlamoryError("The tokenizer has no end-of-sequence token to end answers; set its eos_token.")

    def fingerprint(self, files: Sequence[str], step: str) -> str:
        """Changes with everything that the examples depend on."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer.update(truncation=None, padding=None)  # left by the tokenizer's last call
        names = [self.tokenizer.chat_template, self.tokenizer.special_tokens_map]
        settings = [asdict(self.format), asdict(self.lengths), self.skip_broken]
        stats = [(path, (stat := Path(path).stat()).st_size, stat.st_mtime_ns) for path in files]
        return json_digest([llamory.__version__, "instruct", list(FEATURES), step, tokenizer, names, settings, stats])

    def rows(self, files: list[str]) -> Iterator[dict[str, Any]]:
        """The texts of each object."""
        read = partial(self.format.read_all, tokenizer=self.tokenizer)
        for path in files:
            for line, examples in read_json_lines(Path(path), read, skip_broken=self.skip_broken):
                for kind, parts in examples:
                    if not parts:
                        raise LlamoryError(
                            f"{path}:{line} has messages, but the tokenizer of this model has no chat template; choose "
                            f"a model with one, or write the chats as {self.format.chat_conversations_field!r}."
                        )
                    texts, answers = zip(*parts, strict=True)
                    yield {"kind": kind, "texts": list(texts), "answers": list(answers), "source": f"{path}:{line}"}

    def examples(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokenize a batch of rows; those without an answer within the length are dropped."""
        found: dict[str, list[Any]] = {name: [] for name in FEATURES}
        for kind, texts, answers, source in zip(*(rows[name] for name in _ROWS), strict=True):
            first = 1 if kind in (DOCUMENT, QUESTIONS) else 0
            document = encode_document(texts[0], self.tokenizer) if first else []
            ids, is_answer = self._encode(kind, texts[first:], answers[first:])
            ids = [*document, *ids][: self.lengths.total]
            is_answer = [*[False] * len(document), *is_answer][: self.lengths.total]
            if any(is_answer[1:]):  # nothing stands before the first token to predict it from
                found["input_ids"].append(ids)
                found["labels"].append([i if a else IGNORE_INDEX for i, a in zip(ids, is_answer, strict=True)])
                found["source"].append(source)
                found["document"].append(len(document))
        return found

    def _encode(self, kind: str, texts: list[str], answers: list[bool]) -> tuple[list[int], list[bool]]:
        """Token ids of texts (without a document), and which of them are of answers."""
        if kind in (MESSAGES, DOCUMENT):
            chat, settings = "".join(texts), {"return_offsets_mapping": True, "verbose": False}
            encoded: Any = self.tokenizer(chat, add_special_tokens=False, **settings)
            inside = [answer for text, answer in zip(texts, answers, strict=True) for _ in text]
            # Some tokenizers have tokens without characters, which are no part of an answer.
            is_answer = [start < end and all(inside[start:end]) for start, end in encoded["offset_mapping"]]
            return encoded["input_ids"], is_answer
        parts: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        eos, bos = self.tokenizer.eos_token_id, self.tokenizer.bos_token_id
        parts = [[*ids, eos] if answer else ids for ids, answer in zip(parts, answers, strict=True)]
        if kind != QUESTIONS and bos is not None:
            parts[0] = [bos, *parts[0]]
        if kind == "instruction":
            parts[0] = parts[0][: self.lengths.input]
        if kind != "chat":
            parts[1] = parts[1][: self.lengths.output]
        labels = [[answer] * len(ids) for ids, answer in zip(parts, answers, strict=True)]
        return list(chain(*parts)), list(chain(*labels))


def _cached_rows(preprocessor: _Preprocessor, files: list[str], names: str, cache_dir: PathLike | None) -> Dataset:
    try:
        return Dataset.from_generator(
            preprocessor.rows,
            features=_ROWS,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),  # type: ignore[arg-type]
            gen_kwargs={"files": files},
            fingerprint=preprocessor.fingerprint(files, "rows"),
        )
    except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
        if isinstance(error.__cause__, LlamoryError):
            raise error.__cause__ from None
        if next(preprocessor.rows(files), None) is None:
            raise LlamoryError(f"No example could be read from {names}.") from None
        raise


def _list_entry(entry: dict[str, Any], field: str, of: type = dict) -> list[Any]:
    turns = entry[field]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, of) for turn in turns):
        what = "objects, one a turn" if of is dict else "lists of messages, one a chat"
        raise LlamoryError(f"{field!r} should be a list of {what}")
    return turns

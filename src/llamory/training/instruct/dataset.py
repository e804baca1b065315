"""Instruction and chat data: JSON lines as token ids, with labels on the answers only."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
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


ASSISTANT = "assistant"
# Some templates mark the assistant's text with these tags.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

CharSpan = tuple[int, int]


def split_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[tuple[str, bool]]:
    """Render a chat with the tokenizer's template and split it into the assistant's text and the rest.

    The assistant's text is what the template marks with `{% generation %}`. Without marks, it is what each answer adds
    to the chat so far with its generation prompt: the answer and its end mark, without trailing white space.

    Args:
        tokenizer: with a chat template.
        messages: `role` and `content` of each turn; the first isn't the assistant's.

    Returns:
        The texts in order, and whether each is the assistant's.

    Raises:
        LlamoryError: the template rejects the chat, or renders a turn differently once others follow.
    """
    import jinja2

    try:
        if _GENERATION.search(tokenizer.get_chat_template()):
            text, spans = _spans_from_template(tokenizer, messages)
        else:
            text, spans = _spans_by_prefix(tokenizer, messages)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise LlamoryError(f"the chat template rejects these messages ({' '.join(str(error).split())})") from error
    return _split_at_spans(text, spans)


def _spans_from_template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]
) -> tuple[str, list[CharSpan]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        conversations=[list(messages)],
        chat_template=tokenizer.get_chat_template(),
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    return texts[0], spans[0]


def _spans_by_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]
) -> tuple[str, list[CharSpan]]:
    whole = _render(tokenizer, messages)
    spans = []
    for turn, message in enumerate(messages):
        if message["role"] == ASSISTANT:
            before = _render(tokenizer, messages[:turn], add_generation_prompt=True)
            after = _render(tokenizer, messages[: turn + 1])
            if not after.startswith(before) or not whole.startswith(after):
                raise LlamoryError(
                    "the chat template renders earlier turns differently once others follow, so answers can't be "
                    "found; put {% generation %} and {% endgeneration %} around them in the template"
                )
            spans.append((len(before), len(before) + len(after[len(before) :].rstrip())))
    return whole, spans


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], **settings: Any) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **settings))


def _split_at_spans(text: str, spans: Iterable[CharSpan]) -> list[tuple[str, bool]]:
    parts, at = [], 0
    for start, end in spans:
        parts += [(text[at:start], False), (text[start:end], True)]
        at = end
    return [(part, answer) for part, answer in (*parts, (text[at:], False)) if part]


logger = logging.getLogger(__name__)

MESSAGES, DOCUMENT, CHATS, QUESTIONS = "messages", "document", "chats", "questions"
FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "labels": List(Value("int32")),
        "source": Value("string"),
        "document": Value("int32"),
    }
)
_ROWS = Features(
    {"kind": Value("string"), "texts": List(Value("string")), "answers": List(Value("bool")), "source": Value("string")}
)

# A text and whether it is an answer.
LabeledText = tuple[str, bool]


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
        document = (string_entry(entry, DOCUMENT), False) if DOCUMENT in entry else None
        if document is not None and CHATS in entry:
            return [
                self.read({MESSAGES: chat, DOCUMENT: document[0]}, tokenizer)
                for chat in _list_entry(entry, CHATS, list)
            ]
        if document is not None and QUESTIONS in entry:
            return [(QUESTIONS, [document, *self._instruction(each)]) for each in _list_entry(entry, QUESTIONS)]
        return [self.read(entry, tokenizer)]

    def read(self, entry: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[LabeledText]]:
        """The kind of an object (instruction, chat, messages or document) and its texts.

        Raises:
            LlamoryError: a field is missing or of another type, or the chat template rejects the messages.
        """
        if MESSAGES in entry:
            turns = [_message(turn) for turn in _list_entry(entry, MESSAGES)]
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
    """Maximum tokens of an example; longer parts are truncated at the end, as in the published code.

    Attributes:
        input: of an instruction's prompt and question, with bos.
        output: of its response, with eos (lost by a longer response).
        total: of a whole example of any kind.
    """

    input: int = 2048
    output: int = 2048
    total: int = 2048

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
    with eos. As in the published code, each text is tokenized separately; unlike there, eos within a chat is attended
    to. Messages are rendered by the chat template and tokenized as a whole; a token that extends beyond an answer isn't
    part of it. A document comes before the rest, tokenized as for `llamory read`. Examples without an answer within
    their maximum length are skipped.

    Args:
        paths: `.jsonl` files and folders.
        tokenizer: a fast tokenizer with an eos token.
        format: the fields of the objects.
        lengths: maximum tokens.
        skip_broken: skip broken lines with a warning.
        num_proc: processes for tokenization.
        cache_dir: folder of the cache.

    Returns:
        A dataset of `input_ids`, `labels` (ids of answers, -100 elsewhere), `source` (`path:line`) and `document` (how
        many of the first tokens are a document).

    Raises:
        LlamoryError: a file is missing, a line is broken, the tokenizer is unsuitable, or no example has an answer.
    """
    paths = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    files = [str(path) for path in find_files(paths) if path.suffix.lower() == ".jsonl"]
    if not files:
        raise LlamoryError(f"{_join_paths(paths)} has no .jsonl file; instructions must be JSON lines.")
    preprocessor = _Preprocessor(tokenizer, format or InstructFormat(), lengths or Lengths(), skip_broken)
    rows = _cached_rows(preprocessor, files, paths, cache_dir)
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
        raise LlamoryError(
            f"No example of {_join_paths(paths)} has an answer within its first {preprocessor.lengths.total} tokens; "
            "choose a greater total_length."
        )
    return examples


# ---- from lines to token ids -----------------------------------------------------------------------------------------


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

        def read(entry: dict[str, Any]) -> list[tuple[str, list[LabeledText]]]:
            return self.format.read_all(entry, self.tokenizer)

        lines = (each for path in files for each in _iter_examples(path, read, self.skip_broken))
        for path, line, kind, parts in lines:
            if not parts:
                raise LlamoryError(
                    f"{path}:{line} has messages, but the tokenizer of this model has no chat template; choose a "
                    f"model with one, or write the chats as {self.format.chat_conversations_field!r}."
                )
            texts, answers = zip(*parts, strict=True)
            yield {"kind": kind, "texts": list(texts), "answers": list(answers), "source": f"{path}:{line}"}

    def examples(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Tokenize a batch of rows; those without an answer within the length are dropped."""
        found: dict[str, list[Any]] = {name: [] for name in FEATURES}
        encoders: dict[str, Callable[[list[str], list[bool]], tuple[list[int], list[bool]]]] = {
            "instruction": self._instruction,
            "chat": self._chat,
            MESSAGES: self._messages,
            DOCUMENT: self._document,
            QUESTIONS: self._questions,
        }
        for kind, texts, answers, source in zip(*(rows[name] for name in _ROWS), strict=True):
            ids, is_answer = encoders[kind](texts, answers)
            ids, is_answer = ids[: self.lengths.total], is_answer[: self.lengths.total]
            if any(is_answer[1:]):  # nothing stands before the first token to predict it from
                found["input_ids"].append(ids)
                found["labels"].append([i if a else IGNORE_INDEX for i, a in zip(ids, is_answer, strict=True)])
                found["source"].append(source)
                found["document"].append(self._document_tokens(kind, texts))
        return found

    def _document_tokens(self, kind: str, texts: list[str]) -> int:
        return len(encode_document(texts[0], self.tokenizer)) if kind in (DOCUMENT, QUESTIONS) else 0

    def _instruction(self, texts: list[str], answers: list[bool]) -> tuple[list[int], list[bool]]:  # noqa: ARG002
        question, response = self._encode(texts)
        question = [*self._bos, *question][: self.lengths.input]
        response = [*response, *self._eos][: self.lengths.output]
        return question + response, [False] * len(question) + [True] * len(response)

    def _chat(self, texts: list[str], answers: list[bool]) -> tuple[list[int], list[bool]]:
        parts = [(self._bos, False)]
        for ids, answer in zip(self._encode(texts), answers, strict=True):
            parts.append(([*ids, *self._eos] if answer else ids, answer))
        return list(chain(*(ids for ids, _ in parts))), list(chain(*([answer] * len(ids) for ids, answer in parts)))

    def _messages(self, texts: list[str], answers: list[bool]) -> tuple[list[int], list[bool]]:
        encoded = self.tokenizer("".join(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        inside = [answer for text, answer in zip(texts, answers, strict=True) for _ in text]
        # Some tokenizers have tokens without characters, which are no part of an answer.
        is_answer = [start < end and all(inside[start:end]) for start, end in encoded["offset_mapping"]]
        return encoded["input_ids"], is_answer

    def _document(self, texts: list[str], answers: list[bool]) -> tuple[list[int], list[bool]]:
        read = encode_document(texts[0], self.tokenizer)
        ids, is_answer = self._messages(texts[1:], answers[1:])
        return read + ids, [False] * len(read) + is_answer

    def _questions(self, texts: list[str], answers: list[bool]) -> tuple[list[int], list[bool]]:  # noqa: ARG002
        read = encode_document(texts[0], self.tokenizer)
        question, response = self._encode(texts[1:])
        response = [*response, *self._eos][: self.lengths.output]
        return read + question + response, [False] * (len(read) + len(question)) + [True] * len(response)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    @property
    def _bos(self) -> list[int]:
        return [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]

    @property
    def _eos(self) -> list[int]:
        return [self.tokenizer.eos_token_id]


def _cached_rows(
    preprocessor: _Preprocessor, files: list[str], paths: Sequence[object], cache_dir: PathLike | None
) -> Dataset:
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
            raise LlamoryError(f"No example could be read from {_join_paths(paths)}.") from None
        raise


def _list_entry(entry: dict[str, Any], field: str, of: type = dict) -> list[Any]:
    turns = entry[field]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, of) for turn in turns):
        what = "objects, one a turn" if of is dict else "lists of messages, one a chat"
        raise LlamoryError(f"{field!r} should be a list of {what}")
    return turns


def _iter_examples(path: str, read: Any, skip_broken: bool) -> Iterator[tuple[str, int, str, list[LabeledText]]]:
    """File, line, kind and texts of each example of a file."""
    for line, examples in read_json_lines(Path(path), read, skip_broken=skip_broken):
        for kind, parts in examples:
            yield path, line, kind, parts


def _message(turn: dict[str, Any]) -> dict[str, str]:
    return {name: string_entry(turn, name) for name in ("role", "content")}


def _join_paths(paths: Iterable[object]) -> str:
    return ", ".join(map(str, paths))

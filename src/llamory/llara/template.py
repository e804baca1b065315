"""The LLARA template: token ids of the prefix of a passage, of the two prompts and of their slot tokens.

Sequence (Li et al. 2023, section 3.2): `"` passage `", summarize the above passage within eight words: <s1>...<s8>`
`", predict the following passage within eight words: <s9>...<s16>`. Its parts are tokenized separately, so a passage
never changes the ids of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

PREFIX = '"'
_SUMMARIZE_PROMPT = '", summarize the above passage within {count} words: '
_PREDICT_PROMPT = '", predict the following passage within {count} words: '
BOW_WEIGHTINGS = ("fixed", "learned")
QUERY_PROMPTS = ("prediction", "summary")

_COUNT_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split() + [""] * 3 + ["sixteen"]
# The order in which the published checkpoints added the slot tokens; it gives a Llama-2 tokenizer their ids.
_PUBLISHED_ORDER = (9, 12, 7, 14, 3, 6, 15, 5, 1, 10, 13, 2, 11, 4, 8, 16)
_PUBLISHED_VOCAB_SIZE = 32016


@dataclass(frozen=True)
class LlaraTemplate:
    """Token ids and settings of one LLARA model, kept in `config.llara`."""

    prefix_ids: tuple[int, ...]  # before a passage: the tokenizer's beginning-of-sequence id, if any, and `"`
    summarize_prompt_ids: tuple[int, ...]  # the summary prompt without slots
    summarize_slot_ids: tuple[int, ...]  # the hidden states of its slot tokens are a passage's embedding
    predict_prompt_ids: tuple[int, ...]  # the prediction prompt without slots
    predict_slot_ids: tuple[int, ...]
    ignored_ids: tuple[int, ...]  # special tokens, which are never bag-of-words targets
    bow_weight: float = 0.1  # factor of each bag-of-words loss; the published code divides by 10
    prediction_sees_summary: bool = False  # whether the prediction attends to the summary block (not in the paper)
    bow_weighting: str = "fixed"  # or "learned": one uncertainty weight per head, trained with the model
    # The prompt whose slots embed a query: "prediction" (the answer follows a question) or "summary" (the query
    # resembles the passage).
    query_prompt: str = "prediction"

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name.endswith("_ids"):
                object.__setattr__(self, field.name, tuple(int(i) for i in getattr(self, field.name)))
        if len(self.summarize_slot_ids) != len(self.predict_slot_ids) or not self.slots:
            raise LlamoryError("A LLARA template needs as many summary as prediction slots, at least one of each.")
        if len(set(self.slot_ids)) != 2 * self.slots:
            raise LlamoryError("The slot tokens of a LLARA template must all have different ids.")
        for name, choices in (("bow_weighting", BOW_WEIGHTINGS), ("query_prompt", QUERY_PROMPTS)):
            if (value := getattr(self, name)) not in choices:
                raise LlamoryError(f"{name} must be one of {', '.join(choices)}, not {value!r}.")

    @classmethod
    def from_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, slots: int = 8, **settings: Any) -> LlaraTemplate:
        """Build the template for a tokenizer, and add the slot tokens that it lacks to the tokenizer.

        Args:
            slots: slot tokens per prompt.
            settings: `bow_weight`, `prediction_sees_summary`, `bow_weighting`, `query_prompt`.

        Raises:
            LlamoryError: the tokenizer can't represent the prompts or the slot tokens.
        """
        if slots < 1:
            raise LlamoryError(f"A LLARA template needs at least one slot token per prompt, not {slots}.")
        _add_slot_tokens(tokenizer, slots)
        slot_ids = []
        for token in slot_tokens(slots):
            ids = _ids(tokenizer, token)
            if len(ids) != 1:
                raise LlamoryError(f"The tokenizer splits the slot token {token} into {len(ids)} tokens, not one.")
            slot_ids += ids
        summarize_text, predict_text = prompt_texts(slots)
        summarize = _prompt_ids(tokenizer, summarize_text, slot_tokens(slots)[:slots], slot_ids[:slots])
        predict = _prompt_ids(tokenizer, predict_text, slot_tokens(slots)[slots:], slot_ids[slots:])
        if summarize == predict:
            raise LlamoryError("The tokenizer gives both prompts the same ids; use one that knows English or bytes.")
        prefix, ignored = _prefix_ids(tokenizer), sorted(set(tokenizer.all_special_ids))
        return cls(prefix, summarize, slot_ids[:slots], predict, slot_ids[slots:], ignored, **settings)  # type: ignore[arg-type]

    @classmethod
    def from_config(cls, config: LlamaConfig) -> LlaraTemplate | None:
        """`config.llara`, or the published template if the vocabulary has 32016 rows; None for a plain LLaMA."""
        if stored := getattr(config, "llara", None):
            if unknown := set(stored) - {field.name for field in fields(cls)}:
                raise LlamoryError(f"config.llara has unknown entries: {', '.join(sorted(unknown))}.")
            try:
                return cls(**stored)
            except TypeError as error:
                raise LlamoryError(f"config.llara is not a complete LLARA template: {error}.") from error
        return PUBLISHED_TEMPLATE if config.vocab_size == _PUBLISHED_VOCAB_SIZE else None

    def to_dict(self) -> dict[str, Any]:
        """The template as lists and numbers, as stored in `config.llara`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @property
    def slots(self) -> int:
        """Slot tokens per prompt."""
        return len(self.summarize_slot_ids)

    @property
    def slot_ids(self) -> tuple[int, ...]:
        """The slot tokens of the summary, then those of the prediction prompt."""
        return self.summarize_slot_ids + self.predict_slot_ids

    def prompts(self, task: str | None) -> dict[str, bool]:
        """The prompt arguments of `encode` that embed a text as a "query", or as a document (any other task)."""
        predict = task == "query" and self.query_prompt == "prediction"
        return {"summarize": not predict, "predict": predict}

    @property
    def summarize_block_ids(self) -> tuple[int, ...]:
        """The summary prompt with its slots."""
        return self.summarize_prompt_ids + self.summarize_slot_ids

    @property
    def predict_block_ids(self) -> tuple[int, ...]:
        """The prediction prompt with its slots."""
        return self.predict_prompt_ids + self.predict_slot_ids

    def sequence(self, passage_ids: Sequence[int], *, summarize: bool = True, predict: bool = True) -> list[int]:
        """Put prefix and prompts around a passage's ids; a LlamoryError if these have a slot token."""
        if not set(passage_ids).isdisjoint(self.slot_ids):
            raise LlamoryError("A passage contains a slot token (such as <s1>), which only the prompts may; remove it.")
        after = self.summarize_block_ids * summarize + self.predict_block_ids * predict
        return [*self.prefix_ids, *passage_ids, *after]

    def overhead(self, *, summarize: bool = True, predict: bool = True) -> int:
        """Tokens that `sequence` adds to a passage."""
        return len(self.sequence([], summarize=summarize, predict=predict))

    def encode(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text: str,
        *,
        summarize: bool = True,
        predict: bool = True,
        max_length: int | None = None,
    ) -> list[int]:
        """Tokenize a passage and put the prompts around it; only the passage is truncated to fit `max_length`.

        Raises:
            LlamoryError: the text contains a slot token, or `max_length` leaves no room for a passage.
        """
        max_passage_tokens = None
        if max_length is not None:
            max_passage_tokens = max_length - self.overhead(summarize=summarize, predict=predict)
            if max_passage_tokens < 1:
                raise LlamoryError(f"A length of {max_length} tokens leaves no room for a passage between the prompts.")
        return self.sequence(_ids(tokenizer, text)[:max_passage_tokens], summarize=summarize, predict=predict)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a LlamoryError if a slot token or a prompt has other ids in a tokenizer."""
        tokens = slot_tokens(self.slots)
        for token, found, expected in zip(tokens, tokenizer.convert_tokens_to_ids(tokens), self.slot_ids, strict=True):
            if found != expected:
                raise LlamoryError(f"The template doesn't fit its tokenizer: {token} has id {found}, not {expected}.")
        rebuilt = LlaraTemplate.from_tokenizer(tokenizer, self.slots)
        for name in ("prefix_ids", "summarize_prompt_ids", "predict_prompt_ids"):
            if getattr(rebuilt, name) != getattr(self, name):
                raise LlamoryError(f"The template doesn't fit its tokenizer: {name} differ.")

    def prepare_model(self, model: PreTrainedModel) -> None:
        """Add the embedding rows of the slot tokens to a model and the template to its config.

        New rows are the mean of the others plus noise of their standard deviation, so that slots differ within the
        distribution that the layers know. In an untied output head they are the mean.
        """
        import torch

        had_template = LlaraTemplate.from_config(model.config) is not None  # type: ignore[arg-type]
        old_size = model.get_input_embeddings().weight.shape[0]
        new_size = max(old_size, *(i + 1 for i in self.slot_ids))
        if new_size > old_size:
            model.resize_token_embeddings(new_size, mean_resizing=False)
        new_rows = sorted({*range(old_size, new_size), *(() if had_template else self.slot_ids)})
        if new_rows:
            inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings()
            known = torch.ones(new_size, dtype=torch.bool)
            known[new_rows] = False
            with torch.no_grad():
                generator = torch.Generator().manual_seed(len(new_rows))
                noise = torch.randn(len(new_rows), inputs.shape[1], generator=generator).to(inputs)
                known_rows = inputs[known.to(inputs.device)].float()
                inputs[new_rows] = (known_rows.mean(0) + noise * known_rows.std(0)).to(inputs.dtype)
                if head is not None and head.weight is not inputs:
                    known_rows = head.weight[known.to(head.weight.device)].float()
                    head.weight[new_rows] = known_rows.mean(0).to(head.weight.dtype)
        model.config.llara = self.to_dict()
        if hasattr(model, "use_template"):
            model.use_template(self)


PUBLISHED_TEMPLATE = LlaraTemplate(
    prefix_ids=(1, 376),
    summarize_prompt_ids=(9162, 19138, 675, 278, 2038, 13382, 2629, 9475, 3838, 29901, 29871),
    summarize_slot_ids=(32008, 32011, 32004, 32013, 32007, 32005, 32002, 32014),
    predict_prompt_ids=(9162, 8500, 278, 1494, 13382, 2629, 9475, 3838, 29901, 29871),
    predict_slot_ids=(32000, 32009, 32012, 32001, 32010, 32003, 32006, 32015),
    ignored_ids=(0, 1, 2),
)


def slot_tokens(slots: int) -> list[str]:
    """The slot tokens: `slots` of the summary, then as many of the prediction."""
    return [f"<s{i}>" for i in range(1, 2 * slots + 1)]


def prompt_texts(slots: int) -> tuple[str, str]:
    """The summary and the prediction prompt without their slots."""
    count = (_COUNT_WORDS[slots] if slots < len(_COUNT_WORDS) else "") or str(slots)
    return _SUMMARIZE_PROMPT.format(count=count), _PREDICT_PROMPT.format(count=count)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _add_slot_tokens(tokenizer: PreTrainedTokenizerBase, slots: int) -> None:
    from transformers import AddedToken

    names = slot_tokens(slots)
    vocabulary, added = tokenizer.get_vocab(), tokenizer.get_added_vocab()
    if ordinary := [name for name in names if name in vocabulary and name not in added]:
        raise LlamoryError(f"{ordinary[0]} is an ordinary word of this tokenizer, but LLARA needs it as a slot token.")
    order = [f"<s{i}>" for i in _PUBLISHED_ORDER] if slots == len(_PUBLISHED_ORDER) // 2 else names
    missing = [AddedToken(name, normalized=False, special=True) for name in order if name not in vocabulary]
    tokenizer.add_tokens(missing, special_tokens=True)  # type: ignore[arg-type]


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, tokens: list[str], slot_ids: list[int]) -> list[int]:
    """Ids of a prompt, tokenized together with its slots: the space before the first slot belongs to the prompt."""
    ids = _ids(tokenizer, prompt + "".join(tokens))
    prompt_ids = ids[: -len(slot_ids)]
    if ids[-len(slot_ids) :] != slot_ids or not prompt_ids:
        raise LlamoryError(f"The tokenizer merges the slot tokens after {prompt!r} with other text; use another one.")
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in prompt_ids:
        raise LlamoryError(f"The tokenizer reads parts of the prompt {prompt!r} as unknown; use another one.")
    return prompt_ids


def _prefix_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The quote with what the tokenizer puts before a text (its beginning-of-sequence token, if any)."""
    quote = _ids(tokenizer, PREFIX)
    ids = tokenizer(PREFIX)["input_ids"]
    start = next((i for i in range(len(ids)) if ids[i : i + len(quote)] == quote), 0)
    return ids[: start + len(quote)]

"""Tokenizer of an exported LLARA model: a chat template writes the prompts, all segments are tokenized separately."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError
from llamory.llara.template import PREFIX, LlaraTemplate, prompt_texts, slot_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Separates prefix, passage and prompt in the text that the chat template writes: a Unicode noncharacter.
SEGMENT_SEPARATOR = "\ufdd0"


def build_export_tokenizer(
    tokenizer: PreTrainedTokenizerBase, template: LlaraTemplate, max_length: int
) -> PreTrainedTokenizerFast:
    """A tokenizer that tokenizes prefix, passage and prompt separately, as `LlaraTemplate.encode` does."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    if not tokenizer.is_fast:
        raise LlamoryError("Only fast tokenizers can be exported; save the tokenizer as a tokenizer.json first.")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["truncation"] = state["padding"] = None
    state["normalizer"] = _split_normalizer(state["normalizer"], state["pre_tokenizer"])
    state["pre_tokenizer"] = _split_pre_tokenizer(state["pre_tokenizer"])
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token")}
    special = {name: token for name, token in special.items() if token is not None}
    # Any special token can be the padding, since the attention mask hides it.
    padding = tokenizer.pad_token or next(iter(special.values()), slot_tokens(1)[0])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        **special,
        pad_token=padding,
        padding_side="right",
        truncation_side="right",
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        chat_template=_chat_template(tokenizer, template),
    )


def _split_normalizer(normalizer: dict[str, Any] | None, pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """Give each segment the leading `▁` that a Llama-2 tokenizer (Prepend or Metaspace "first") gives a text."""
    result: list[dict[str, Any]] = []
    for step in _components(normalizer, "normalizers"):
        if step["type"] == "Prepend":
            # The start of a run becomes the start of a segment; an empty segment gets no ▁.
            result.append({"type": "Prepend", "prepend": SEGMENT_SEPARATOR})
            result.append(_insert_after_separator("", step["prepend"]))
        else:
            result.append(step)
    for step in _components(pre_tokenizer, "pretokenizers"):
        if _is_first(step):
            result.append(_insert_after_separator(f" {step['replacement']}", step["replacement"]))
    return {"type": "Sequence", "normalizers": result} if result else None


def _insert_after_separator(unless: str, inserted: str) -> dict[str, Any]:
    """A normalizer that inserts a text after separators, unless one of some characters follows."""
    pattern = f"{SEGMENT_SEPARATOR}+(?=[^{SEGMENT_SEPARATOR}{unless}])"
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": SEGMENT_SEPARATOR + inserted}


def _split_pre_tokenizer(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any]:
    """Split at separators and remove them, then apply the tokenizer's own components."""
    split = {"type": "Split", "pattern": {"String": SEGMENT_SEPARATOR}, "behavior": "Removed", "invert": False}
    components = _components(pre_tokenizer, "pretokenizers")
    components = [{**step, "prepend_scheme": "never"} if _is_first(step) else step for step in components]
    return {"type": "Sequence", "pretokenizers": [split, *components]}


def _components(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if component is None:
        return []
    return component[key] if component["type"] == "Sequence" else [component]


def _is_first(step: dict[str, Any]) -> bool:
    return step["type"] == "Metaspace" and step["prepend_scheme"] == "first"


def query_prompt_line(query_prompt: str) -> str:
    """The first line of the chat template, which sets the prompt of queries."""
    return f"{{%- set query_prompt = '{query_prompt}' -%}}"


def _chat_template(tokenizer: PreTrainedTokenizerBase, template: LlaraTemplate) -> str:
    """Jinja that puts prefix and prompt around the messages' text, with separators between them."""
    slots = slot_tokens(template.slots)
    summarize_text, predict_text = prompt_texts(template.slots)
    quote = tokenizer(PREFIX, add_special_tokens=False)["input_ids"]
    opening = "".join(tokenizer.added_tokens_decoder[i].content for i in template.prefix_ids[: -len(quote)])
    prefix = opening + SEGMENT_SEPARATOR + PREFIX + SEGMENT_SEPARATOR
    summarize = SEGMENT_SEPARATOR + summarize_text + "".join(slots[: template.slots])
    predict = SEGMENT_SEPARATOR + predict_text + "".join(slots[template.slots :])
    return (
        query_prompt_line(template.query_prompt) + "{%- set passage = namespace(text='') -%}"
        "{%- for message in messages -%}"
        "{%- if message.content is string -%}{%- set passage.text = passage.text + message.content -%}"
        "{%- else -%}{%- for part in message.content -%}{%- set passage.text = passage.text + part.text -%}"
        "{%- endfor -%}{%- endif -%}"
        "{%- endfor -%}"
        f"{{%- for token in {json.dumps([*slots, SEGMENT_SEPARATOR])} -%}}{{%- if token in passage.text -%}}"
        "{{- raise_exception('A text contains ' + token + ', which only the prompts may; remove it.') -}}"
        "{%- endif -%}{%- endfor -%}"
        f"{{{{- {json.dumps(prefix)} + passage.text -}}}}"
        f"{{%- if task is defined and task == 'query' and query_prompt == 'prediction' -%}}"
        f"{{{{- {json.dumps(predict)} -}}}}"
        f"{{%- else -%}}{{{{- {json.dumps(summarize)} -}}}}{{%- endif -%}}"
    )

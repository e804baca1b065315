"""A chat as its tokenizer's template writes it, cut into what the assistant says and what the rest is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from llamory.errors import LlamoryError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
# Templates that say themselves what the assistant's words are put them between these tags.
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

CharSpan = tuple[int, int]


def split_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]]) -> list[tuple[str, bool]]:
    """Write a chat with the tokenizer's template.

    The assistant's parts are those that the template marks with `{% generation %}`; of a template without marks, what
    it adds to the chat so far, with the prompt for an answer, when the answer is there: the answer itself and the mark
    of its end, without white space behind.

    Args:
        tokenizer: has a chat template.
        messages: `role` and `content` of each turn; the first isn't the assistant's.

    Returns:
        Texts in order, which together are the whole chat, and whether each is the assistant's.

    Raises:
        LlamoryError: the template refuses the chat, or writes a turn differently once others follow, so that the
            assistant's parts can't be told.
    """
    import jinja2

    try:
        if _GENERATION.search(tokenizer.get_chat_template()):
            text, spans = _spans_from_template(tokenizer, messages)
        else:
            text, spans = _spans_by_prefix(tokenizer, messages)
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise LlamoryError(f"the chat template refuses these messages ({' '.join(str(error).split())})") from error
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
                    "the chat template writes earlier turns differently once others follow, so answers can't be told "
                    "from the rest; put {% generation %} and {% endgeneration %} around them in the template"
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

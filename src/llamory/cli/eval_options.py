"""Options and outputs that the verbs of `llamory eval` share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from llamory.errors import LlamoryError

ModelArgument = Annotated[str | None, typer.Argument(metavar="MODEL", help="The same as --model.", show_default=False)]
Model = Annotated[
    str | None,
    typer.Option(help="A LLaMA: folder, .gguf file, hub id or 'default'.  [default: default]", show_default=False),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(metavar="MODEL", help="Another model for the same task; repeatable.", show_default=False),
]
MemLayers = Annotated[
    list[str] | None,
    typer.Option(help="Layers with memory, such as 6,12,18; the model's own if not given.", show_default=False),
]
ContextLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens of a window; the model's own if not given.", show_default=False)
]
MemSearch = Annotated[
    str | None, typer.Option(help="How memory is searched: exact, pages or faiss.", show_default=False)
]
MemTopK = Annotated[
    int | None, typer.Option(min=1, help="Pages or neighbours that a search reads.", show_default=False)
]
MemTopKAttention = Annotated[
    bool,
    typer.Option(
        "--mem-top-k-attention", help="Read the best tokens only, as the paper does (exact: found by a scan)."
    ),
]
LognAttentionScale = Annotated[
    float | None,
    typer.Option(
        min=0, help="How much sharper attention gets as memory grows; default: the model's own.", show_default=False
    ),
]
MemorySizeBias = Annotated[
    float | None,
    typer.Option(
        min=0, help="How much of memory's growth is taken off its weight; default: the model's own.", show_default=False
    ),
]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16: faster, a little less exact.")]


def model_name(argument: str | None, option: str | None) -> str:
    """The model that was named, before or behind --model.

    Raises:
        LlamoryError: two were named.
    """
    if option is not None and argument not in (None, option):
        raise LlamoryError(f"Two models were named, {argument} and {option}; give one.")
    return option or argument or "default"


def model_names(argument: str | None, option: str | None, compare: Sequence[str] | None) -> list[str]:
    """The model that was named and those to compare it with.

    Raises:
        LlamoryError: one was named twice.
    """
    names = [model_name(argument, option), *(compare or [])]
    for name in names:
        if names.count(name) > 1:
            raise LlamoryError(f"The model {name} was named twice; compare it with another one.")
    return names


def long_model_kwargs(
    mem_layers: Sequence[str] | None,
    context_length: int | None,
    mem_search: str | None,
    mem_top_k: int | None,
    *,
    mem_top_k_attention: bool = False,
    logn_attention_scale: float | None = None,
    memory_size_bias: float | None = None,
    bf16: bool = False,
) -> dict[str, Any]:
    """What `load_long_model` is kwargs."""
    layers = None if mem_layers is None else parse_list(mem_layers, int, "--mem-layers")
    kwargs: dict[str, Any] = {"mem_layers": layers, "context_length": context_length, "mem_search": mem_search}
    kwargs |= {} if mem_top_k is None else {"mem_top_k": mem_top_k}
    kwargs |= {"mem_top_k_attention": True} if mem_top_k_attention else {}
    kwargs |= {} if logn_attention_scale is None else {"logn_attention_scale": logn_attention_scale}
    kwargs |= {} if memory_size_bias is None else {"memory_size_bias": memory_size_bias}
    return kwargs | ({"dtype": "bfloat16"} if bf16 else {})


def parse_list(given: Sequence[str], parse: Callable[[str], Any], flag: str) -> list[Any]:
    """The parse_list of a flag that was given once with commas, or several times, or both."""
    texts = [text.strip() for texts in given for text in texts.split(",") if text.strip()]
    try:
        return [parse(text) for text in texts] or _raise_value_error(flag, ",".join(given))
    except ValueError as error:
        raise LlamoryError(f"{flag} must be numbers with commas between them, not {','.join(given)!r}.") from error


def _raise_value_error(flag: str, text: str) -> list[Any]:
    raise ValueError(f"{flag}: {text}")


def token_count(text: str) -> int:
    """A number of tokens; 16k is 16 * 1024, 1M is 1024 k."""
    factor = {"k": 1 << 10, "m": 1 << 20}.get(text[-1:].lower())
    return int(text) if factor is None else int(text[:-1]) * factor


def token_counts(given: Sequence[str], flag: str) -> list[int]:
    """Numbers of tokens, 0 or more.

    Raises:
        LlamoryError: they aren't numbers, or one is negative.
    """
    counts: list[int] = parse_list(given, token_count, flag)
    if min(counts) < 0:
        raise LlamoryError(f"{flag} must be numbers of tokens from 0 on, not {min(counts)}.")
    return counts


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, each as wide as its widest entry, aligned right."""
    lines = [headers, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(headers))]
    for line in lines:
        typer.echo("  ".join(f"{entry:>{width}}" for entry, width in zip(line, widths, strict=True)))

"""Options that several verbs of memory share."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from llamory.errors import LlamoryError

MemSearch = Annotated[
    Literal["exact", "pages", "faiss"] | None,
    typer.Option("--mem-search", help="How memory is searched; pages and faiss stay fast.", show_default=False),
]
MemTopK = Annotated[
    int | None, typer.Option("--mem-top-k", min=1, help="Pages or neighbours per query.", show_default=False)
]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16: faster, a little less exact.")]
Device = Annotated[
    str | None, typer.Option(help="Where the model runs, such as cpu or cuda; the best there is.", show_default=False)
]


def parse_layers(text: str | None) -> list[int] | None:
    """Layers from a text such as `6,12,18` or `5-29`.

    Raises:
        LlamoryError: it is no such text.
    """
    if text is None:
        return None
    layers: list[int] = []
    for part in text.replace(" ", ",").split(","):
        first, _, last = part.partition("-")
        if not (first.isdecimal() and (last.isdecimal() or "-" not in part)):
            raise LlamoryError(f"Memory layers are given as 6,12,18 or 5-29, not as {text!r}.")
        layers += range(int(first), int(last or first) + 1)
    return layers


def show_layers(layers: list[int]) -> str:
    """Layers as short as `parse_layers` takes them."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def show_size(size: int) -> str:
    """Bytes for people."""
    value = float(size)
    for unit in ("bytes", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} GB"

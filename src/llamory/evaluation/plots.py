"""Pictures of evaluations, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.extras import require
from llamory.evaluation.passkey import PasskeyResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = "viridis"
_INK, _MUTED, _NOT_RUN, _HIGHLIGHT = "#222222", "#666666", "#ededed", "#c1344f"
# Inches.
_CELL_WIDTH, _CELL_HEIGHT = 0.72, 0.46
_MIN_WIDTH, _MAX_WIDTH, _MIN_HEIGHT, _MAX_HEIGHT = 3.2, 15.0, 2.1, 9.0
_MARGIN, _PANEL_GAP, _TOP_MARGIN, _BOTTOM_MARGIN = 0.95, 0.6, 0.9, 0.85
_MAX_TITLE = 80
_MAX_LABELS = 24


@dataclass(frozen=True)
class Panel:
    """One heat map of a picture.

    Attributes:
        title: what stands above it.
        result: what was found.
        context_length: tokens that the model takes at once; a line is drawn where prompts are longer.
    """

    title: str
    result: PasskeyResult
    context_length: int | None = None


def draw_heat_map(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw accuracies as colours and numbers, lengths from left to right and depths from top to bottom.

    All panels have the same lengths and depths; what wasn't run is grey.

    Args:
        path: the PNG file, written colorbar_rect and renamed.
        title: of the picture.
        panels: what to draw, from left to right; at least one cell was run.
    """
    require("plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lengths = sorted({length for panel in panels for length in panel.result.lengths})
    depths = sorted({depth for panel in panels for depth in panel.result.depths})
    panel_width = min(max(_CELL_WIDTH * len(lengths), _MIN_WIDTH), _MAX_WIDTH / len(panels))
    panel_height = min(max(_CELL_HEIGHT * len(depths), _MIN_HEIGHT), _MAX_HEIGHT)
    bar = 0.9  # for the colour bar at the right
    width = _MARGIN + len(panels) * panel_width + (len(panels) - 1) * _PANEL_GAP + bar
    height = _TOP_MARGIN + panel_height + _BOTTOM_MARGIN
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    image: Any = None
    for number, panel in enumerate(panels):
        left = _MARGIN + number * (panel_width + _PANEL_GAP)
        axes = figure.add_axes((left / width, _BOTTOM_MARGIN / height, panel_width / width, panel_height / height))
        image = _draw(axes, panel, lengths, depths, cell=(panel_width / len(lengths), panel_height / len(depths)))
        if number == 0:
            axes.set_ylabel("Depth of the needle", color=_INK, fontsize=10)
    colorbar_rect = ((width - bar + 0.2) / width, _BOTTOM_MARGIN / height, 0.14 / width, panel_height / height)
    colours = figure.colorbar(image, cax=figure.add_axes(colorbar_rect), ticks=[0, 0.25, 0.5, 0.75, 1])
    colours.ax.set_yticklabels([f"{share:.0%}" for share in (0, 0.25, 0.5, 0.75, 1)], fontsize=8, color=_MUTED)
    colours.ax.tick_params(length=0)
    colours.outline.set_visible(False)
    figure.text(
        _MARGIN / width,
        1 - 0.3 / height,
        title if len(title) <= _MAX_TITLE else f"{title[: _MAX_TITLE - 1]}…",
        fontsize=12,
        weight="bold",
        color=_INK,
        va="center",
        parse_math=False,
    )
    partial = path.with_name(f"{path.name}.partial")
    # Wider than planned where a long title asks for it.
    figure.savefig(partial, format="png", bbox_inches="tight", pad_inches=0.15)
    partial.replace(path)


def _draw(
    axes: Axes, panel: Panel, lengths: Sequence[int], depths: Sequence[float], *, cell: tuple[float, float]
) -> Any:
    """Draw one panel; `cell` is the size of a cell in inches."""
    import numpy as np
    from matplotlib import colormaps

    accuracies = np.full((len(depths), len(lengths)), np.nan)
    for each in panel.result.cells:
        accuracies[depths.index(each.depth), lengths.index(each.length)] = each.accuracy
    axes.set_facecolor(_NOT_RUN)
    image = axes.imshow(accuracies, cmap=_COLOURS, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    # 0.6 em is a digit's width; up to four characters ("100%") stand in a cell.
    size = min(10.0, 72 * cell[0] / 2.9, 72 * cell[1] / 1.5)
    if size >= 4:
        for (row, column), share in np.ndenumerate(accuracies):
            known = not np.isnan(share)
            ink = _text_colour(colormaps[_COLOURS](share)) if known else _MUTED
            label = f"{share:.0%}" if known else "–"
            axes.text(column, row, label, ha="center", va="center", fontsize=size, color=ink)
    _label(axes, lengths, depths)
    _mark_context(axes, panel, lengths)
    axes.set_title(panel.title, fontsize=10, color=_INK, loc="left", pad=18, parse_math=False)
    return image


def _label(axes: Axes, lengths: Sequence[int], depths: Sequence[float]) -> None:
    columns = range(0, len(lengths), -(-len(lengths) // _MAX_LABELS))
    rows = range(0, len(depths), -(-len(depths) // _MAX_LABELS))
    # Long numbers colorbar_rect each other need to be rotated.
    rotated: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(lengths) > 4 else {}
    axes.set_xticks(list(columns), [f"{lengths[i]:,}" for i in columns], fontsize=9, color=_INK, **rotated)
    axes.set_yticks(list(rows), [f"{depths[i]:.0%}" for i in rows], fontsize=9, color=_INK)
    axes.set_xlabel("Length of the prompt (tokens)", color=_INK, fontsize=10)
    # White gaps between the cells.
    axes.set_xticks([i - 0.5 for i in range(1, len(lengths))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def _mark_context(axes: Axes, panel: Panel, lengths: Sequence[int]) -> None:
    """A line before the first length that is beyond the context."""
    beyond = panel.result.lengths_beyond_context(panel.context_length)
    if not beyond:
        return
    position = lengths.index(beyond[0]) - 0.5
    axes.axvline(position, color=_HIGHLIGHT, linewidth=2, linestyle=(0, (3, 1.5)), clip_on=False)
    axes.annotate(
        f"context {panel.context_length:,}",
        (position, 1),
        xycoords=("data", "axes fraction"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="left" if position < 0 else "center",
        fontsize=8,
        color=_HIGHLIGHT,
    )


def _text_colour(colour: tuple[float, float, float, float]) -> str:
    """Dark or light ink for a coloured ground, by its luminance."""
    red, green, blue, _ = colour
    return _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"

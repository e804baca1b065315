"""Plots of evaluations: heat maps and lines, drawn without a display."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamory.common.extras import require
from llamory.common.io import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _GRID, _NOT_RUN, _HIGHLIGHT = "#222222", "#666666", "#e4e4e4", "#ededed", "#c1344f"


@contextmanager
def _figure(path: Path, size: tuple[float, float], **save: Any) -> Iterator[Figure]:
    """Give a figure of a size in inches, which is then written as a PNG file."""
    require("plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=160, facecolor="white")
    yield figure
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", **save)


_COLOUR_MAP = "viridis"
_CELL_WIDTH, _CELL_HEIGHT = 0.72, 0.46  # inches, as the next two lines
_MIN_WIDTH, _MAX_WIDTH, _MIN_HEIGHT, _MAX_HEIGHT = 3.2, 15.0, 2.1, 9.0
_MARGIN, _PANEL_GAP, _BAR, _TOP_MARGIN, _BOTTOM_MARGIN = 0.95, 0.6, 0.9, 0.9, 0.85
_MAX_TITLE, _MAX_LABELS = 80, 24


@dataclass(frozen=True)
class Panel:
    """One heat map of a plot: the accuracy of each length and depth."""

    title: str
    accuracies: Mapping[tuple[int, float], float]
    context_length: int | None = None
    first_beyond_context: int | None = None  # the first length whose prompts exceed the context; a line marks it


def draw_heat_map(path: Path, title: str, panels: Sequence[Panel]) -> None:
    """Draw accuracies as colours and numbers into a PNG file, lengths to the right and depths downwards.

    The panels stand side by side, with the same lengths and depths; cells that weren't run are grey.
    """
    lengths = sorted({length for panel in panels for length, _ in panel.accuracies})
    depths = sorted({depth for panel in panels for _, depth in panel.accuracies})
    panel_width = min(max(_CELL_WIDTH * len(lengths), _MIN_WIDTH), _MAX_WIDTH / len(panels))
    panel_height = min(max(_CELL_HEIGHT * len(depths), _MIN_HEIGHT), _MAX_HEIGHT)
    width = _MARGIN + len(panels) * panel_width + (len(panels) - 1) * _PANEL_GAP + _BAR
    height = _TOP_MARGIN + panel_height + _BOTTOM_MARGIN
    image: Any = None
    with _figure(path, (width, height), bbox_inches="tight", pad_inches=0.15) as figure:

        def add_axes(x: float, axes_width: float) -> Axes:
            rect = (x / width, _BOTTOM_MARGIN / height, axes_width / width, panel_height / height)
            return figure.add_axes(rect)

        for number, panel in enumerate(panels):
            axes = add_axes(_MARGIN + number * (panel_width + _PANEL_GAP), panel_width)
            image = _draw(axes, panel, lengths, depths, cell=(panel_width / len(lengths), panel_height / len(depths)))
            if number == 0:
                axes.set_ylabel("Depth of the needle", color=_INK, fontsize=10)
        colours = figure.colorbar(
            image, cax=add_axes(width - _BAR + 0.2, 0.14), ticks=[0, 0.25, 0.5, 0.75, 1], format=_percent
        )
        colours.ax.tick_params(length=0, labelsize=8, labelcolor=_MUTED)
        colours.outline.set_visible(False)
        title = title if len(title) <= _MAX_TITLE else f"{title[: _MAX_TITLE - 1]}…"
        style: dict[str, Any] = {"fontsize": 12, "weight": "bold", "color": _INK, "parse_math": False}
        figure.text(_MARGIN / width, 1 - 0.3 / height, title, va="center", **style)


def _percent(value: float, _: float = 0) -> str:
    return f"{value:.0%}"


def _draw(axes: Axes, panel: Panel, lengths: list[int], depths: list[float], *, cell: tuple[float, float]) -> Any:
    """Draw one panel; `cell` is the size of a cell in inches."""
    import numpy as np
    from matplotlib import colormaps

    accuracies = np.full((len(depths), len(lengths)), np.nan)
    for (length, depth), value in panel.accuracies.items():
        accuracies[depths.index(depth), lengths.index(length)] = value
    axes.set_facecolor(_NOT_RUN)
    image = axes.imshow(accuracies, cmap=_COLOUR_MAP, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    # A digit is 0.6 em wide; a cell holds up to four characters ("100%").
    size = min(10.0, 72 * cell[0] / 2.9, 72 * cell[1] / 1.5)
    if size >= 4:
        for (row, column), accuracy in np.ndenumerate(accuracies):
            known = not np.isnan(accuracy)
            red, green, blue, _ = colormaps[_COLOUR_MAP](accuracy)
            contrast = _INK if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"  # by the luminance
            ink = contrast if known else _MUTED
            label = _percent(accuracy) if known else "–"
            axes.text(column, row, label, ha="center", va="center", fontsize=size, color=ink)
    ticks = range(0, len(lengths), -(-len(lengths) // _MAX_LABELS))
    rows = range(0, len(depths), -(-len(depths) // _MAX_LABELS))
    rotated: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if len(lengths) > 4 else {}
    axes.set_xticks(list(ticks), [f"{lengths[i]:,}" for i in ticks], fontsize=9, color=_INK, **rotated)
    axes.set_yticks(list(rows), [f"{depths[i]:.0%}" for i in rows], fontsize=9, color=_INK)
    axes.set_xlabel("Length of the prompt (tokens)", color=_INK, fontsize=10)
    axes.set_xticks([i - 0.5 for i in range(1, len(lengths))], minor=True)
    axes.set_yticks([i - 0.5 for i in range(1, len(depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if panel.first_beyond_context is not None:
        position = lengths.index(panel.first_beyond_context) - 0.5
        axes.axvline(position, color=_HIGHLIGHT, linewidth=2, linestyle=(0, (3, 1.5)), clip_on=False)
        style: dict[str, Any] = {"ha": "left" if position < 0 else "center", "fontsize": 8, "color": _HIGHLIGHT}
        coordinates: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        axes.annotate(f"context {panel.context_length:,}", (position, 1), (0, 3), **coordinates, **style)
    axes.set_title(panel.title, fontsize=10, color=_INK, loc="left", pad=18, parse_math=False)
    return image


# Colours that colour-blind readers can tell apart (Okabe & Ito 2008), and markers for prints in grey.
_LINE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Line:
    """One line of a plot: values over numbers of tokens, which ascend."""

    name: str
    xs: Sequence[int]
    ys: Sequence[float]
    error_bars: Sequence[float] | None = None  # half the length of each bar


def draw_curves(
    path: Path,
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    percent: bool = False,
    reference_line: tuple[str, float] | None = None,
) -> None:
    """Draw lines over numbers of tokens into a PNG file; the horizontal axis is logarithmic and begins with 0.

    With `percent` the values are fractions, drawn from 0 to 100%. `reference_line` is the label and height of a dashed
    horizontal line, such as chance.
    """
    with _figure(path, (6.4, 4.0)) as figure:
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        for line, colour, marker in zip(lines, cycle(_LINE_COLOURS), cycle(_MARKERS), strict=False):
            style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 5, "linewidth": 1.8}
            style |= {"label": _literal(line.name), "elinewidth": 1, "capsize": 3}
            axes.errorbar(line.xs, line.ys, yerr=line.error_bars, **style)
        if reference_line is not None:
            label, value = reference_line
            axes.axhline(value, color=_MUTED, linewidth=1, linestyle=(0, (4, 2)), label=_literal(label))
        xs = sorted({x for line in lines for x in line.xs})
        if smallest := next((x for x in xs if x > 0), None):
            # The distance from 0 to the smallest position is that of a doubling.
            axes.set_xscale("symlog", base=2, linthresh=smallest, linscale=0.5)
        axes.set_xticks(xs, [short_count(x) for x in xs], rotation=45 if len(xs) > 10 else 0)
        axes.set_xticks([], minor=True)
        if percent:
            axes.set_ylim(-0.02, 1.02)
            axes.yaxis.set_major_formatter(_percent)
        axes.set_xlabel(x_label, color=_INK, fontsize=10)
        axes.set_ylabel(y_label, color=_INK, fontsize=10)
        axes.set_title(_literal(title), color=_INK, fontsize=12, weight="bold", loc="left")
        axes.grid(color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
        axes.spines[:].set_visible(False)
        if len(lines) > 1 or reference_line is not None:
            axes.legend(frameon=False, fontsize=9)


def short_count(count: int) -> str:
    """A number of tokens in short form: 2k is 2048, 1M is 1024 k."""
    if count and count % (1 << 20) == 0:
        return f"{count >> 20}M"
    return f"{count // 1024}k" if count and count % 1024 == 0 else f"{count:,}"


def _literal(text: str) -> str:
    """A text without matplotlib's formulas."""
    return text.replace("$", r"\$")

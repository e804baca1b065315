"""Line plots of evaluations, drawn without a display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llamory.common.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK, _MUTED, _GRID = "#222222", "#666666", "#e4e4e4"
# Colours that also colour-blind readers tell apart (Okabe & Ito 2008), and marks for those who print in grey.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SIZE = (6.4, 4.0)  # inches


@dataclass(frozen=True)
class Line:
    """One line of a plot.

    Attributes:
        name: of the line.
        xs: numbers of tokens, in growing order.
        ys: what was measured there.
        error_bars: half the length of an error bar at each position; None for no bars.
    """

    name: str
    xs: Sequence[int]
    ys: Sequence[float]
    error_bars: Sequence[float] | None = None


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
    """Draw lines over numbers of tokens on a logarithmic axis, on which 0 stands one step left of the smallest.

    Args:
        path: the PNG file, written beside and renamed.
        title: of the picture.
        lines: at least one, with at least one position.
        x_label: what stands below.
        y_label: what stands at the left.
        percent: whether the values are shares, drawn from 0 to 100%.
        reference_line: name and height of a dashed line across, such as chance.
    """
    require("plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, line in enumerate(lines):
        _draw_line(axes, line, _COLOURS[number % len(_COLOURS)], _MARKERS[number % len(_MARKERS)])
    if reference_line is not None:
        axes.axhline(
            reference_line[1], color=_MUTED, linewidth=1, linestyle=(0, (4, 2)), label=_literal(reference_line[0])
        )
    _scale(axes, sorted({x for line in lines for x in line.xs}))
    if percent:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(x_label, color=_INK, fontsize=10)
    axes.set_ylabel(y_label, color=_INK, fontsize=10)
    axes.set_title(_literal(title), color=_INK, fontsize=12, weight="bold", loc="left")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=_INK)
    axes.spines[:].set_visible(False)
    if len(lines) > 1 or reference_line is not None:
        axes.legend(frameon=False, fontsize=9)
    partial = path.with_name(f"{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)


def short_count(count: int) -> str:
    """A number of tokens as short as it goes: 2k is 2048, 1M is 1024 k."""
    if count and count % (1 << 20) == 0:
        return f"{count >> 20}M"
    return f"{count // 1024}k" if count and count % 1024 == 0 else f"{count:,}"


def _draw_line(axes: Axes, line: Line, colour: str, marker: str) -> None:
    axes.errorbar(
        line.xs,
        line.ys,
        yerr=line.error_bars,
        label=_literal(line.name),
        color=colour,
        marker=marker,
        markersize=5,
        linewidth=1.8,
        elinewidth=1,
        capsize=3,
    )


def _scale(axes: Axes, positions: Sequence[int]) -> None:
    smallest = next((position for position in positions if position > 0), None)
    if smallest is not None:
        # On this scale 0 is as far from the smallest position as that is from its double.
        axes.set_xscale("symlog", base=2, linthresh=smallest, linscale=0.5)
    label_rotation = 45 if len(positions) > 10 else 0
    axes.set_xticks(list(positions), [short_count(position) for position in positions], rotation=label_rotation)
    axes.set_xticks([], minor=True)


def _literal(text: str) -> str:
    """A text that matplotlib doesn't take for a formula."""
    return text.replace("$", r"\$")

"""Heat maps and line plots."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamory.evaluation.passkey import PasskeyResult
from llamory.evaluation.plots import Line, Panel, draw_curves, draw_heat_map, short_count

# The ends of matplotlib's colour map viridis.
RIGHT, WRONG = (253, 231, 37), (68, 1, 84)


def panel(title: str, cells: list, context: int | None = None) -> Panel:
    return PasskeyResult(cells).panel(title, context)


def cells(cell, correct) -> list:
    return [cell(length, depth, correct(length, depth)) for length in (1024, 2048) for depth in (0.0, 1.0)]


def centre(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[float, float]:
    """Mean place (x, y) of a colour, as shares of the picture; the colour bar at the right is left out."""
    image = image[:, : int(image.shape[1] * 0.82)]
    ys, xs = np.nonzero((np.abs(image.astype(int) - colour) < 4).all(axis=2))
    assert len(xs) > 1000
    return xs.mean() / image.shape[1], ys.mean() / image.shape[0]


@pytest.fixture
def drawn(tmp_path):
    """Draws panels and gives the picture's pixels."""

    def draw(*panels: Panel, title: str = "Passkeys") -> np.ndarray:
        file = tmp_path / "map.png"
        draw_heat_map(file, title, panels)
        assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
        with Image.open(file) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    return draw


def test_short_prompts_are_left_of_long_ones(cell, drawn) -> None:
    image = drawn(panel("memory", cells(cell, lambda length, _: length == 1024)))
    assert centre(image, RIGHT)[0] < centre(image, WRONG)[0] - 0.2


def test_low_depths_are_above_high_ones(cell, drawn) -> None:
    image = drawn(panel("memory", cells(cell, lambda _, depth: depth == 0)))
    assert centre(image, RIGHT)[1] < centre(image, WRONG)[1] - 0.2


def test_two_models_stand_side_by_side(cell, drawn) -> None:
    good, bad = cells(cell, lambda *_: True), cells(cell, lambda *_: False)
    image = drawn(panel("memory", good), panel("plain", bad, 1500))
    assert centre(image, RIGHT)[0] < 0.5 < centre(image, WRONG)[0]


def test_a_cell_that_was_not_run_is_grey(cell, drawn) -> None:
    gap = [cell(1024, 0.0, True), cell(2048, 1.0, True)]
    x, y = centre(drawn(panel("memory", gap)), (237, 237, 237))
    assert 0.3 < x < 0.8 and 0.3 < y < 0.8


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("title", ["costs $5 or $x^2", "x" * 500, "模型"])
def test_any_name_can_be_a_title(cell, drawn, title: str) -> None:
    assert drawn(panel(title[:40], cells(cell, lambda *_: True)), title=title).shape[1] < 6000


@pytest.mark.slow
def test_large_grids_can_be_drawn(cell, drawn) -> None:
    many = [cell(1000 * i, j / 40, (i + j) % 3 > 0) for i in range(1, 41) for j in range(41)]
    height, width, _ = drawn(panel("memory", many), panel("plain", many, 20_000)).shape
    assert max(height, width) < 4000


def test_no_display_is_needed_and_none_is_looked_for(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from llamory.evaluation.plots import Panel, draw_heat_map
assert "matplotlib" not in sys.modules
draw_heat_map(Path({str(tmp_path / "map.png")!r}), "t", [Panel("p", {{(100, 0.5): 1.0}})])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- lines -----------------------------------------------------------------------------------------------------------
FIRST_COLOUR, SECOND_COLOUR = (0, 114, 178), (213, 94, 0)
AXES = {"x_label": "Tokens in memory", "y_label": "Perplexity"}


@pytest.fixture
def drawn_lines(tmp_path):
    """Draws lines and gives the picture's pixels."""

    def draw(*lines: Line, title: str = "Curves", **more) -> np.ndarray:
        file = tmp_path / "curves.png"
        draw_curves(file, title, lines, **AXES | more)
        assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
        with Image.open(file) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    return draw


def pixels(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where a colour is, x to the right and y upwards, in pixels."""
    ys, xs = np.nonzero((np.abs(image.astype(int) - colour) < 4).all(axis=2))
    assert len(xs) > 200
    return xs, -ys


@pytest.mark.parametrize("xs", [(1024, 2048, 4096, 8192), (0, 1024, 2048, 4096), (0, 16, 32)])
def test_the_horizontal_axis_is_logarithmic(drawn_lines, xs) -> None:
    across, up = pixels(drawn_lines(Line("model", xs, [9.0 - 2 * step for step in range(len(xs))])), FIRST_COLOUR)
    slope, height = np.polyfit(across, up, 1)
    assert slope < -0.2
    # Marks are a few pixels wide.
    assert np.abs(up - slope * across - height).max() < 16


def test_lines_have_different_colours_and_correct_heights(drawn_lines) -> None:
    image = drawn_lines(Line("low", [1024, 2048], [1.0, 1.0]), Line("high", [1024, 2048], [3.0, 3.0], [0.1, 0.5]))
    # The legend has a sample of each; half of all pixels are far from it.
    assert np.median(pixels(image, SECOND_COLOUR)[1]) > np.median(pixels(image, FIRST_COLOUR)[1]) + 100


def test_shares_go_up_to_one(drawn_lines) -> None:
    line = Line("model", [1024, 2048], [0.5, 0.5])
    _, free = pixels(drawn_lines(line), FIRST_COLOUR)
    _, percent = pixels(drawn_lines(Line("model", [1024, 2048], [1.0, 1.0]), percent=True), FIRST_COLOUR)
    assert np.median(percent) > np.median(free) + 200


def test_a_single_place_and_odd_names_are_drawn_lines(drawn_lines) -> None:
    pixels(
        drawn_lines(Line("a_$^{model}", [0], [2.0]), title="Costs $5 or $6_", reference_line=("chance $", 1.5)),
        FIRST_COLOUR,
    )


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (2048, "2k"), (65536, "64k"), (500, "500"), (1500, "1,500")])
def test_short_counts(count, text) -> None:
    assert short_count(count) == text

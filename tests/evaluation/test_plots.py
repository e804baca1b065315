"""The heat map shows lengths from left to right, depths from top to bottom, and accuracy as colour."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llamory.evaluation.passkey import PasskeyResult
from llamory.evaluation.plots import Panel, draw_heat_map

# The ends of matplotlib's colour map viridis.
RIGHT, WRONG = (253, 231, 37), (68, 1, 84)


def result(cell, right) -> PasskeyResult:
    return PasskeyResult([cell(length, depth, right(length, depth)) for length in (1024, 2048) for depth in (0.0, 1.0)])


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


def test_short_prompts_stand_left_of_long_ones(cell, drawn) -> None:
    image = drawn(Panel("memory", result(cell, lambda length, _: length == 1024)))
    assert centre(image, RIGHT)[0] < centre(image, WRONG)[0] - 0.2


def test_needles_at_the_start_stand_above_those_at_the_end(cell, drawn) -> None:
    image = drawn(Panel("memory", result(cell, lambda _, depth: depth == 0)))
    assert centre(image, RIGHT)[1] < centre(image, WRONG)[1] - 0.2


def test_two_models_stand_side_by_side(cell, drawn) -> None:
    good, bad = result(cell, lambda *_: True), result(cell, lambda *_: False)
    image = drawn(Panel("memory", good), Panel("plain", bad, 1500))
    assert centre(image, RIGHT)[0] < 0.5 < centre(image, WRONG)[0]


def test_a_place_that_was_not_run_has_neither_colour(cell, drawn) -> None:
    gap = PasskeyResult([cell(1024, 0.0, True), cell(2048, 1.0, True)])
    x, y = centre(drawn(Panel("memory", gap)), (237, 237, 237))
    assert 0.3 < x < 0.8 and 0.3 < y < 0.8


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("title", ["costs $5 or $x^2", "x" * 500, "模型"])
def test_any_name_can_be_a_title(cell, drawn, title: str) -> None:
    assert drawn(Panel(title[:40], result(cell, lambda *_: True)), title=title).shape[1] < 6000


def test_large_grids_can_be_drawn(cell, drawn) -> None:
    many = PasskeyResult([cell(1000 * i, j / 40, (i + j) % 3 > 0) for i in range(1, 41) for j in range(41)])
    height, width, _ = drawn(Panel("memory", many), Panel("plain", many, 20_000)).shape
    assert max(height, width) < 4000


def test_no_display_is_needed_and_none_is_looked_for(tmp_path: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from llamory.evaluation.passkey import Cell, PasskeyResult, Trial
from llamory.evaluation.plots import Panel, draw_heat_map
assert "matplotlib" not in sys.modules
cell = Cell(100, 0.5, (Trial("1", "1", True, 1.0, 99, 0.1),))
draw_heat_map(Path({str(tmp_path / "map.png")!r}), "t", [Panel("p", PasskeyResult([cell]))])
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)

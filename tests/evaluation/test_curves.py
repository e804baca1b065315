"""Lines over numbers of tokens: growing to the right by doublings, 0 one step left of the smallest."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from llamory.evaluation.curves import Line, draw_curves, short_count

FIRST, SECOND = (0, 114, 178), (213, 94, 0)
AXES = {"x_label": "Tokens in memory", "y_label": "Perplexity"}


@pytest.fixture
def drawn(tmp_path):
    """Draws lines and gives the picture's pixels."""

    def draw(*lines: Line, title: str = "Curves", **more) -> np.ndarray:
        file = tmp_path / "curves.png"
        draw_curves(file, title, lines, **AXES | more)
        assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
        with Image.open(file) as image:
            assert image.format == "PNG"
            return np.asarray(image.convert("RGB"))

    return draw


def places(image: np.ndarray, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where a colour is, x to the right and y upwards, in pixels."""
    ys, xs = np.nonzero((np.abs(image.astype(int) - colour) < 4).all(axis=2))
    assert len(xs) > 200
    return xs, -ys


@pytest.mark.parametrize("xs", [(1024, 2048, 4096, 8192), (0, 1024, 2048, 4096), (0, 16, 32)])
def test_what_falls_by_a_step_with_each_doubling_is_a_straight_line(drawn, xs) -> None:
    across, up = places(drawn(Line("model", xs, [9.0 - 2 * step for step in range(len(xs))])), FIRST)
    slope, height = np.polyfit(across, up, 1)
    assert slope < -0.2
    # Marks are a few pixels wide.
    assert np.abs(up - slope * across - height).max() < 16


def test_lines_have_their_colours_and_the_higher_one_stands_above(drawn) -> None:
    image = drawn(Line("low", [1024, 2048], [1.0, 1.0]), Line("high", [1024, 2048], [3.0, 3.0], [0.1, 0.5]))
    # The legend has a sample of each; half of all pixels are far from it.
    assert np.median(places(image, SECOND)[1]) > np.median(places(image, FIRST)[1]) + 100


def test_shares_go_up_to_one(drawn) -> None:
    line = Line("model", [1024, 2048], [0.5, 0.5])
    _, free = places(drawn(line), FIRST)
    _, percent = places(drawn(Line("model", [1024, 2048], [1.0, 1.0]), percent=True), FIRST)
    assert np.median(percent) > np.median(free) + 200


def test_a_single_place_and_odd_names_are_drawn(drawn) -> None:
    places(drawn(Line("a_$^{model}", [0], [2.0]), title="Costs $5 or $6_", reference_line=("chance $", 1.5)), FIRST)


@pytest.mark.parametrize(("count", "text"), [(0, "0"), (2048, "2k"), (65536, "64k"), (500, "500"), (1500, "1,500")])
def test_counts_are_as_short_as_they_go(count, text) -> None:
    assert short_count(count) == text


def test_importing_needs_no_matplotlib() -> None:
    program = "import sys, llamory.evaluation.curves; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)

"""Whether the report's colors can be read, and told apart by readers who see fewer of them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray

from workers.palette import COLORS, DIVERGING, MODELS, OTHERS, RAMP, TASK_COLORS, Color, contrast, text_on

THEMES = ("light", "dark")
TEXT, GRAPHIC = 4.5, 3.0  # WCAG 2.2, success criteria 1.4.3 and 1.4.11, level AA
JUST_TOLD_APART = 10.0  # CIE76 units; about 2.3 are noticeable side by side
# Machado, Oliveira and Fernandes, A Physiologically-based Model for Simulation of Color Vision Deficiency, 2009.
SEEN = {
    "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "no red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "no blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def test_contrast_is_that_of_the_standard() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)
    assert contrast("#123456", "#123456") == 1


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("paper", ["paper", "panel"])
@pytest.mark.parametrize("ink", ["ink", "soft", "link", "good", "bad"])
def test_text_can_be_read(theme: str, paper: str, ink: str) -> None:
    assert contrast(getattr(COLORS[ink], theme), getattr(COLORS[paper], theme)) >= TEXT


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("mark", sorted({*MODELS, *OTHERS, *TASK_COLORS}))
def test_marks_stand_out_from_the_paper(theme: str, mark: str) -> None:
    assert contrast(getattr(COLORS[mark], theme), getattr(COLORS["paper"], theme)) >= GRAPHIC


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("color", [*RAMP, *DIVERGING])
def test_numbers_in_cells_can_be_read(theme: str, color: Color) -> None:
    assert contrast(getattr(text_on(color), theme), getattr(color, theme)) >= TEXT


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("sight", SEEN)
@pytest.mark.parametrize("names", [(*MODELS, *OTHERS), TASK_COLORS])
def test_marks_are_told_apart_whatever_colors_one_sees(theme: str, sight: str, names: tuple[str, ...]) -> None:
    seen = {name: lab(np.array(SEEN[sight]) @ linear(getattr(COLORS[name], theme))) for name in names}
    distances = {pair: float(np.linalg.norm(seen[pair[0]] - seen[pair[1]])) for pair in combinations(names, 2)}
    closest = min(distances, key=lambda pair: distances[pair])
    assert distances[closest] >= JUST_TOLD_APART, f"{closest} are {distances[closest]:.1f} apart"


@pytest.mark.parametrize(("theme", "direction"), [("light", -1), ("dark", 1)])
def test_the_ramp_goes_from_the_paper_to_the_ink_step_by_step(theme: str, direction: int) -> None:
    lightness = [float(lab(linear(getattr(color, theme)))[0]) for color in RAMP]
    steps = np.diff(lightness) * direction
    assert steps.min() >= 5, lightness


def linear(color: str) -> NDArray[np.float64]:
    channels = np.array([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* of linear sRGB under D65."""
    matrix = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    ratio = matrix @ rgb.clip(0, 1) / np.array([0.95047, 1.0, 1.08883])
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

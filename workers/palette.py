"""The report's colors: the Okabe-Ito set, which color-blind readers tell apart, darkened or lightened for contrast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Color:
    """One color on light and on dark paper, as ``#rrggbb``."""

    light: str
    dark: str


COLORS: Mapping[str, Color] = {
    "paper": Color("#ffffff", "#161616"),
    "panel": Color("#f4f6f8", "#22262a"),
    "ink": Color("#1a1a1a", "#f0f0f0"),
    "soft": Color("#565656", "#b8b8b8"),
    "line": Color("#d0d4d8", "#454a50"),
    "link": Color("#005a9c", "#7cc4ff"),
    "good": Color("#00694d", "#4fd1a5"),
    "bad": Color("#a83200", "#ff9e6b"),
    "base": Color("#7d7d7d", "#909090"),
    "expert": Color("#0072b2", "#56b4e9"),
    "merged": Color("#c43400", "#ff9440"),
    "other-1": Color("#007a5a", "#20e47d"),
    "other-2": Color("#a3427c", "#f0a8d0"),
    "other-3": Color("#756633", "#f0e442"),
    "other-4": Color("#26262b", "#ffffff"),
}
# From little to much, and from opposed to alike: one hue that darkens, two hues around gray.
RAMP = (
    Color("#e3eef8", "#1d2a36"),
    Color("#c2dbef", "#1f3f5c"),
    Color("#93c3e4", "#215780"),
    Color("#63a6d6", "#5fa3d9"),
    Color("#1f6fae", "#86bce6"),
    Color("#0b4f8a", "#b3d6f2"),
    Color("#08306b", "#e4f1fb"),
)
DIVERGING = (
    Color("#0b4f8a", "#b3d6f2"),
    Color("#3478b0", "#6fb0e2"),
    Color("#a9cde8", "#27506f"),
    Color("#ececec", "#2e2e2e"),
    Color("#f5c9a4", "#6b401d"),
    Color("#b3560f", "#f0954b"),
    Color("#8a3a00", "#ffc799"),
)
MODELS = ("base", "expert", "merged")
OTHERS = ("other-1", "other-2", "other-3", "other-4")
TASK_COLORS = ("expert", "merged", "other-1", "other-2", "other-3", "other-4")


def all_colors() -> dict[str, Color]:
    """Every color of the page by the name of its CSS variable."""
    found = dict(COLORS)
    for name, ramp in (("ramp", RAMP), ("diverging", DIVERGING)):
        for step, color in enumerate(ramp):
            found |= {f"{name}-{step}": color, f"on-{name}-{step}": text_on(color)}
    return found


def variable(name: str) -> str:
    """How a chart names a color, so that it follows the page's theme."""
    return f"var(--{name})"


def text_on(color: Color) -> Color:
    """Black or white on either paper, whichever reads better there."""
    return Color(_text_on(color.light), _text_on(color.dark))


def contrast(first: str, second: str) -> float:
    """The contrast ratio of two colors, 1 to 21, by WCAG 2.2."""
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


def _text_on(background: str) -> str:
    return max(("#111111", "#ffffff"), key=lambda ink: contrast(ink, background))


def _luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

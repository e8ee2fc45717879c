"""Time against tokens, both axes logarithmic: a straight line whose slope is the exponent of the cost."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from ..errors import EDiTError
from .report import Measurement, Series, series, title_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["draw"]

_WIDTH, _HEIGHT = 1000, 620  # of a panel
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 330, 50, 60  # margins; the names stand at the right
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#17becf", "#bcbd22")
_GREY = "#7f7f7f"  # the limit's
_PLAIN = str.maketrans({"Σ": "Sigma"})  # Pillow's own font has no Greek


def draw(measurements: Sequence[Measurement]) -> Image:
    """A panel for every model, batch and dtype, one below the other, with each contender's slope behind its name.

    Raises:
        EDiTError: Pillow is not installed, or nothing was measured at two sizes.
    """
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise EDiTError("a plot needs Pillow: install edit-attention[diffusers]") from None
    panels = [group for group in series(measurements) if len({m.tokens for m in group.measurements}) > 1]
    if not panels:
        raise EDiTError("a plot of time against tokens needs at least two sizes")
    sheet = Image.new("RGB", (_WIDTH, _HEIGHT * len(panels)), "white")
    for index, group in enumerate(panels):
        panel = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
        _panel(ImageDraw.Draw(panel), group)
        sheet.paste(panel, (0, index * _HEIGHT))
    return sheet


def _panel(pen: Any, group: Series) -> None:
    from PIL import ImageFont

    font, bold = ImageFont.load_default(15), ImageFont.load_default(18)
    names = list(dict.fromkeys(name for m in group.measurements for name in m.seconds))
    lines = {name: group.medians(name) for name in names}
    tokens = sorted({n for line in lines.values() for n in line})
    times = [t for line in lines.values() for t in line.values()]
    low, high = floor(log10(min(times))), ceil(log10(max(times)))
    high += low == high
    left, right = log10(tokens[0]), log10(tokens[-1])

    def x(n: float) -> float:
        return _LEFT + (log10(n) - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(t: float) -> float:
        return _HEIGHT - _BOTTOM - (log10(t) - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    pen.text((_LEFT, 15), f"{group.title}: seconds per call".translate(_PLAIN), "black", bold)
    for power in range(low, high + 1):
        pen.line([x(tokens[0]), y(10**power), x(tokens[-1]), y(10**power)], "#bbbbbb")
        pen.text((_LEFT - 10, y(10**power)), f"{10.0**power:g} s", "black", font, "rm")
    for n in tokens:
        pen.line([x(n), y(10**low), x(n), y(10**high)], "#dddddd")
        pen.text((x(n), _HEIGHT - _BOTTOM + 8), str(n), "black", font, "ma")
    pen.text((_LEFT, _HEIGHT - 10), "image tokens", "black", font, "ls")
    for index, name in enumerate(sorted(names, key=lambda name: -lines[name][max(lines[name])])):
        colour = _GREY if name == "limit" else _COLOURS[names.index(name) % len(_COLOURS)]
        points = [(x(n), y(t)) for n, t in lines[name].items()]
        pen.line(points, colour, 3)
        for point in points:
            pen.ellipse([point[0] - 4, point[1] - 4, point[0] + 4, point[1] + 4], colour)
        slope = group.exponent(name)
        text = title_of(name) + ("" if slope is None else f"  slope {slope:.2f}")
        pen.text((_WIDTH - _RIGHT + 25, _TOP + 10 + 24 * index), text, colour, font)

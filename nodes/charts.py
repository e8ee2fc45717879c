"""The pictures of figures that nodes show, drawn with Pillow, which ComfyUI has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

__all__ = ["WIDTH", "as_image", "error_bars", "loss_curve", "time_curves"]

WIDTH, HEIGHT = 960, 540
_LEFT, _TOP, _RIGHT, _BOTTOM = 84, 64, 24, 60  # margins of the plot
_TEXT, _HEADING = 18, 20  # pixels: a node shows the picture at a third to half its size
_INK, _GREY, _LIGHT = "#222222", "#777777", "#dddddd"
COLOURS = ("#2a6fbb", "#d9822b")
_DENSE = "#b8b8b8"

Span = tuple[float, float]


def as_image(picture: Image.Image) -> Tensor:
    """A picture as ComfyUI's IMAGE, `(1, H, W, 3)` in 0-1."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).float()[None] / 255


def loss_curve(losses: Sequence[float], steps: int) -> Image.Image:
    """Errors of the steps so far, on an axis for all of them."""
    chart = _Chart("Mean relative error of the attentions", "step", (1, max(steps, 2)), _span(losses))
    chart.labels_x([(value, f"{value:g}") for value in _round_ticks(1, steps)])
    points = list(enumerate(losses, 1))
    stride = max(1, len(points) // WIDTH)
    chart.line([*points[::stride], points[-1]], COLOURS[0], dots=len(points) < 3)
    chart.note(f"{losses[-1]:.3g} at step {len(losses)} of {steps}")
    return chart.picture


def error_bars(errors: Mapping[str, float], limit: float) -> Image.Image:
    """A bar for every attention.

    Args:
        errors: by `<block>.<site>`.
        limit: blocks with an attention above it are grey.
    """
    blocks = sorted({int(key.split(".")[0]) for key in errors})
    sites = sorted({key.split(".")[1] for key in errors})
    chart = _Chart(
        "Error of each attention on the teacher's own inputs, relative to its mean square", "block",
        (-0.5, len(blocks) - 0.5), _span([*errors.values(), limit]),
    )  # fmt: skip
    every = max(1, math.ceil(len(blocks) / 30))
    chart.labels_x([(i, str(block)) for i, block in enumerate(blocks) if i % every == 0])
    for i, block in enumerate(blocks):
        own = [(site, errors[f"{block}.{site}"]) for site in sites if f"{block}.{site}" in errors]
        dense = any(error > limit for _, error in own)
        for place, (site, error) in enumerate(own):
            left = i - 0.4 + 0.8 * place / len(own)
            chart.bar((left, left + 0.8 / len(own)), error, _DENSE if dense else COLOURS[sites.index(site)])
    chart.level(limit)
    chart.legend([(COLOURS[i], f"{site} attention") for i, site in enumerate(sites)] + [(_DENSE, "better left dense")])
    return chart.picture


def time_curves(sizes: Sequence[int], times: Mapping[str, Sequence[float]], ratios: Sequence[float]) -> Image.Image:
    """Seconds per call against the side of the picture, both on logarithmic axes, and a ratio at each size.

    Args:
        sizes: pixels per side, rising.
        times: of the models, by their names, one per size.
        ratios: how many times as fast the second is as the first, one per size.
    """
    every = [seconds for values in times.values() for seconds in values]
    low, high = _span(every)
    title = "Seconds per call, and how many times as fast the second is"
    chart = _Chart(title, "pixels per side", (sizes[0] / 1.15, sizes[-1] * 1.15), (low, high * 1.25), log_x=True)
    chart.labels_x([(size, str(size)) for size in sizes])
    for colour, values in zip(COLOURS, times.values(), strict=True):
        chart.line(list(zip(sizes, values, strict=True)), colour, dots=True)
    for place, size in enumerate(sizes):
        highest = max(values[place] for values in times.values())
        chart.text_above(size, highest, f"{ratios[place]:.2f}x")  # the font has no multiplication sign
    chart.legend(list(zip(COLOURS, times, strict=False)))
    return chart.picture


class _Chart:
    """A plot whose vertical axis is logarithmic."""

    def __init__(self, title: str, label: str, x: Span, y: Span, log_x: bool = False) -> None:
        self.picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
        self._draw = ImageDraw.Draw(self.picture)
        self._x, self._y, self._log_x = x, y, log_x
        self._text((_LEFT, 8), title, size=_HEADING)
        self._text((_LEFT + (WIDTH - _LEFT - _RIGHT) / 2, HEIGHT - 14), label, anchor="ms")
        for value, shown in _decade_ticks(*y):
            height = self._at(0, value)[1]
            self._draw.line([(_LEFT, height), (WIDTH - _RIGHT, height)], fill=_LIGHT)
            self._text((_LEFT - 8, height), shown, anchor="rm")
        self._draw.rectangle([_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM], outline=_GREY)

    def labels_x(self, ticks: Sequence[tuple[float, str]]) -> None:
        free = 0.0
        for value, shown in ticks:
            place = self._across(value)
            half = self._draw.textlength(shown, font=_font()) / 2
            if place - half >= free:
                self._text((place, HEIGHT - _BOTTOM + 8), shown, anchor="ma")
                free = place + half + 8
            self._draw.line([(place, HEIGHT - _BOTTOM), (place, HEIGHT - _BOTTOM + 4)], fill=_GREY)

    def line(self, points: Sequence[tuple[float, float]], colour: str, dots: bool = False) -> None:
        places = [self._at(*point) for point in points]
        self._draw.line(places, fill=colour, width=3, joint="curve")
        for x, y in places if dots else ():
            self._draw.ellipse([x - 5, y - 5, x + 5, y + 5], fill=colour)

    def bar(self, sides: Span, value: float, colour: str) -> None:
        (left, top), right = self._at(sides[0], value), self._across(sides[1])
        self._draw.rectangle([left, top, max(left, right - 1), HEIGHT - _BOTTOM], fill=colour)

    def level(self, value: float) -> None:
        height = self._at(0, value)[1]
        for left in range(_LEFT, WIDTH - _RIGHT, 12):
            self._draw.line([(left, height), (left + 6, height)], fill=_INK, width=2)

    def text_above(self, x: float, y: float, text: str) -> None:
        left, top = self._at(x, y)
        self._text((left, top - 12), text, anchor="ms")

    def note(self, text: str) -> None:
        self._text((WIDTH - _RIGHT, 10), text, anchor="ra")

    def legend(self, entries: Sequence[tuple[str, str]]) -> None:
        left = float(_LEFT)
        for colour, text in entries:
            self._draw.rectangle([left, 43, left + 10, 53], fill=colour)
            self._text((left + 16, 48), text, anchor="lm")
            left += 36 + self._draw.textlength(text, font=_font())

    def _across(self, x: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * _share(x, self._x, self._log_x)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return self._across(x), HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * _share(y, self._y, True)

    def _text(self, place: tuple[float, float], text: str, anchor: str = "la", size: int = _TEXT) -> None:
        self._draw.text(place, text, fill=_INK, font=_font(size), anchor=anchor)


def _font(size: int = _TEXT) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _share(value: float, span: Span, logarithmic: bool) -> float:
    """Where a value lies in a span, 0-1; what is outside is at its edge."""
    scale: Callable[[float], float] = math.log if logarithmic else float
    low, high = map(scale, span)
    inside = min(max(value, span[0]), span[1])
    return (scale(inside) - low) / (high - low)


def _span(values: Sequence[float]) -> Span:
    """A little more than the positive values take up, half a decade at least."""
    positive = [value for value in values if 0 < value < math.inf] or [1.0]
    low, high = min(positive) / 1.25, max(positive) * 1.25
    spare = max(1.0, math.sqrt(math.sqrt(10) / (high / low)))
    return low / spare, high * spare


def _decade_ticks(low: float, high: float) -> list[tuple[float, str]]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 200 else (1,)
    values = [step * 10.0**decade for decade in decades for step in steps]
    return [(value, f"{value:.3g}") for value in values if low <= value <= high]


def _round_ticks(low: int, high: int) -> list[int]:
    """About six round numbers."""
    rough = max(1.0, (high - low) / 6)
    power = 10 ** math.floor(math.log10(rough))
    step = next(int(power * factor) for factor in (1, 2, 5, 10) if power * factor >= rough)
    return [value for value in range(0, high + 1, step) if value >= low]

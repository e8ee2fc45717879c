"""Reads a picture: which of its scene's attributes are right, by measuring and without anything learnt (ours).

The picture is averaged to 64 samples along its shorter side. Its ground is the commonest dull colour; what differs from
that falls into connected components; a component's shape and size are those of the template that overlaps it best.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .scenes import COLOURS, COLUMNS, FRAME, GROUNDS, PERIOD, ROWS, SHAPES, SIZES, TONE, WHITE, Picture, Scene, cover

__all__ = ["LONG_RANGE", "accuracy", "read", "right"]

LONG_RANGE = frozenset({"mirror", "mirror.ground", "frame", "dots.equal"})
"""Attributes that no place of a picture can get right by itself."""

_SIDE = 64
_APART = 45.0
"""Levels of 255 by which something differs from the ground."""
_NAMES = (*COLOURS, "white")
_PALETTE = np.array([*COLOURS.values(), WHITE], np.float32)  # (9, 3)

Array = npt.NDArray[Any]


class _Found(NamedTuple):
    """A component."""

    colour: str
    x: float
    """Of its centre, 0-1 over the picture's width."""
    y: float
    shape: str
    size: str


def read(picture: Picture, scene: Scene | str) -> dict[str, bool]:
    """Which of the scene's attributes the picture has.

    Args:
        picture: `(H, W, 3)` uint8, of any size from 128 pixels on.
        scene: what was asked for, or its caption. What the caption leaves open is not asked for; what it says by
            reference (a frame's colour) is compared with what the picture shows there.

    Returns:
        attribute -> right or wrong: `ground`, `texture`, `things` (their number), `1.shape`, `1.colour`, `1.size`,
        `1.place` and so on for each, and of the special ones those that the caption asks for: `mirror`,
        `mirror.ground`, `frame`, `dots.left`, `dots.right`, `dots.equal`.
    """
    scene = Scene.parse(scene) if isinstance(scene, str) else scene
    pixels = _shrink(picture)
    width = pixels.shape[1]
    ground, distance = _ground(pixels)
    kinds = _kinds(pixels, distance)  # (h, w), -1 is ground
    frame, inside = _frame(kinds)
    mask = (distance > _APART) & inside
    found, dots = [], []
    for ys, xs in _components(mask):
        votes = np.bincount(kinds[ys, xs] + 1, minlength=len(_NAMES) + 1)[1:]
        if len(ys) < 28:  # half of the smallest thing; a dot's rim mixes with the ground to some colour or other
            if len(ys) >= 5 and votes[-1] >= len(ys) / 4:
                dots.append(float(xs.mean() + 0.5) / width)
        elif votes[:-1].any():
            found.append(_measure(pixels, mask, ground, _NAMES[int(votes[:-1].argmax())], ys, xs))

    result = {
        "ground": ground == scene.ground,
        "texture": _texture(pixels, ~mask & inside & (distance <= _APART), ground) == scene.texture,
    }
    if scene.special == "mirror":
        result.update(_mirror(pixels, mask, scene, ground))
        found = [one for one in found if one.x < 0.5]
    result["things"] = len(found) == len(scene.things)
    matched = _match(found, scene)
    for i, (thing, one) in enumerate(zip(scene.things, matched, strict=True), 1):
        result[f"{i}.shape"] = one is not None and one.shape == thing.shape
        if thing.told:
            result[f"{i}.colour"] = one is not None and one.colour == thing.colour
        result[f"{i}.size"] = one is not None and one.size == thing.size
        result[f"{i}.place"] = one is not None and _place(one) == (thing.column, thing.row)
    if scene.special == "frame":
        third = matched[2]
        result["frame"] = frame is not None and third is not None and third.colour == frame
    elif scene.special == "dots":
        left = sum(x < 0.5 for x in dots)
        right = len(dots) - left
        result["dots.equal"] = left == right > 0
        if scene.told:
            result["dots.left"], result["dots.right"] = left == scene.dots, right == scene.dots
    return result


def right(pictures: Iterable[Picture], scenes: Iterable[Scene]) -> dict[str, float]:
    """:func:`accuracy` of pictures, each of which was asked to show one of the scenes."""
    return accuracy([read(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)])


def accuracy(results: list[dict[str, bool]]) -> dict[str, float]:
    """Shares that are right: `all`, `long_range`, and each kind of attribute (`shape` for `1.shape` and so on)."""
    marks: dict[str, list[bool]] = {}
    for result in results:
        for name, right in result.items():
            kind = name[2:] if name[0].isdigit() else name
            for group in ("all", *(("long_range",) if name in LONG_RANGE else ()), kind):
                marks.setdefault(group, []).append(right)
    return {name: sum(values) / len(values) for name, values in marks.items()}


def _shrink(picture: Picture) -> Array:
    """Averages over areas: `(h, w, 3)` float32 with the shorter side at 64 samples."""
    height, width = picture.shape[:2]
    factor = _SIDE / min(height, width)
    image = picture.astype(np.float32)
    rows, columns = (_averages(n, round(n * factor)) for n in (height, width))
    lines = (rows @ image.reshape(height, -1)).reshape(-1, width, 3)
    return np.matmul(columns, lines)


@functools.lru_cache(maxsize=32)
def _averages(source: int, target: int) -> Array:
    """`(target, source)`, how much of each source sample lies in each target sample; rows sum to one."""
    edges = np.arange(target + 1) * source / target
    low = np.maximum(edges[:-1, None], np.arange(source)[None])
    high = np.minimum(edges[1:, None], np.arange(source)[None] + 1)
    return (np.clip(high - low, 0, None) * target / source).astype(np.float32)


def _ground(pixels: Array) -> tuple[str, Array]:
    """The ground's name, and each sample's distance from its two tones and what lies between them."""
    distances = {}
    for name, colour in GROUNDS.items():
        difference = pixels - np.array(colour, np.float32)
        tone = np.clip(difference.mean(-1, keepdims=True), -TONE, TONE)
        distances[name] = np.sqrt(((difference - tone) ** 2).sum(-1))
    names = list(distances)
    stack = np.stack(list(distances.values()))  # (grounds, h, w)
    near = stack.min(0) < _APART
    votes = np.bincount(stack.argmin(0)[near], minlength=len(names))
    best = names[int(votes.argmax())]
    return best, distances[best]


def _kinds(pixels: Array, distance: Array) -> Array:
    """Each sample's nearest colour as an index of `_NAMES`, or -1 where the ground is nearer than any."""
    to = np.sqrt(((pixels[:, :, None] - _PALETTE) ** 2).sum(-1))  # (h, w, 9)
    return np.where(to.min(-1) < distance, to.argmin(-1), -1)


def _frame(kinds: Array) -> tuple[str | None, Array]:
    """A frame's colour if there is one, and which samples lie inside of it."""
    inside = np.ones(kinds.shape, bool)
    wide = round(FRAME * _SIDE)
    ring = np.ones(kinds.shape, bool)
    ring[wide - 1 : 1 - wide, wide - 1 : 1 - wide] = False
    votes = np.bincount(kinds[ring] + 1, minlength=len(_NAMES) + 1)[1:]
    if votes[:-1].max() < 0.75 * ring.sum():
        return None, inside
    inside[:] = False
    inside[wide + 1 : -wide - 1, wide + 1 : -wide - 1] = True
    return _NAMES[int(votes.argmax())], inside


def _components(mask: Array) -> list[tuple[Array, Array]]:
    """Rows and columns of each set of samples that touch along an edge."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        padded = np.pad(labels, 1)
        grown = np.maximum.reduce(
            [padded[1:-1, 1:-1], padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
        )
        grown = np.where(mask, grown, 0)
        # A label is a sample's number: taking that sample's own label doubles the reach of each round.
        grown = np.where(mask, np.maximum(grown, grown.ravel()[np.maximum(grown, 1) - 1]), 0)
        if np.array_equal(grown, labels):
            break
        labels = grown
    order = np.argsort(labels, axis=None, kind="stable")
    values = labels.ravel()[order]
    starts = np.flatnonzero(np.diff(values, prepend=0))
    return [(part // mask.shape[1], part % mask.shape[1]) for part in np.split(order, starts)[1:]]


def _measure(pixels: Array, mask: Array, ground: str, colour: str, ys: Array, xs: Array) -> _Found:
    """Compares how far the samples around a component are its colour with every shape and size."""
    height, width = mask.shape
    top, bottom = max(0, int(ys.min()) - 2), min(height, int(ys.max()) + 3)
    left, right = max(0, int(xs.min()) - 2), min(width, int(xs.max()) + 3)
    base = np.array(GROUNDS[ground], np.float32)
    # Without lightness, in which the ground's texture varies.
    axis = np.array(COLOURS[colour], np.float32) - base
    axis -= axis.mean()
    alpha = np.clip((pixels[top:bottom, left:right] - base) @ axis / (axis @ axis), 0, 1)
    own = np.zeros(mask.shape, bool)
    own[ys, xs] = True
    near = np.pad(own, 1)
    near = near[1:-1, 1:-1] | near[:-2, 1:-1] | near[2:, 1:-1] | near[1:-1, :-2] | near[1:-1, 2:]
    alpha = alpha * near[top:bottom, left:right]
    weight = max(float(alpha.sum()), 1e-6)
    grid_y, grid_x = np.arange(top, bottom) + 0.5, np.arange(left, right) + 0.5
    x, y = float(alpha.sum(0) @ grid_x) / weight, float(alpha.sum(1) @ grid_y) / weight
    seen = _blur(alpha)
    best, shape, size = float("inf"), SHAPES[0], "large"
    for name in SHAPES:
        for kind, diameter in SIZES.items():
            radius = diameter / 2 * _SIDE
            drop = 0.2 * radius if name == "triangle" else 0.0  # from the middle of its box to its centre of mass
            template = cover(name, grid_x[None] - x, grid_y[:, None] - y + drop, radius)
            missed = max(0.0, _area(name, radius) - float(template.sum()))  # what lies outside of the window
            error = float(((seen - _blur(template)) ** 2).sum()) + missed
            if error < best:
                best, shape, size = error, name, kind
    return _Found(colour, x / width, y / height, shape, size)


def _blur(image: Array) -> Array:
    """Means over 3x3 samples, so that an edge may be as coarse as a latent cell."""
    padded = np.pad(image, 2)
    padded = padded[:-2] + padded[1:-1] + padded[2:]
    return (padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]) / 9


@functools.cache
def _area(name: str, radius: float) -> float:
    places = np.arange(-_SIDE, _SIDE) + 0.5
    return float(cover(name, places[None], places[:, None], radius).sum())


def _texture(pixels: Array, free: Array, ground: str) -> str | None:
    """By how alike samples are that lie half a period apart, down and across."""
    tone = pixels.mean(-1) - float(np.mean(GROUNDS[ground]))
    if free.sum() < 50 or tone[free].std() < TONE / 4:
        return None
    tone = np.where(free, tone - tone[free].mean(), 0)
    step = round(PERIOD / 2 * _SIDE)

    def alike(down: int, across: int) -> float:
        h, w = tone.shape
        a, b = tone[: h - down, : w - across], tone[down:, across:]
        both = free[: h - down, : w - across] & free[down:, across:]
        return float((a * b)[both].sum() / max(float((a * a)[both].sum() * (b * b)[both].sum()) ** 0.5, 1e-6))

    down, across = alike(step, 0), alike(0, step)
    if abs(down) < 0.4 or abs(across) < 0.4 or (down > 0 and across > 0):
        return "grain"
    if down < 0 and across < 0:
        return "checks"
    return "rows" if across > 0 else "columns"


def _mirror(pixels: Array, mask: Array, scene: Scene, ground: str) -> dict[str, bool]:
    half = pixels.shape[1] // 2
    left, right = pixels[:, :half], pixels[:, ::-1][:, :half]
    centre = np.array(GROUNDS[ground], np.float32)
    result = {"mirror": _correlation(left - centre, right - centre) > 0.8}
    if scene.texture == "grain":
        # Apart from the things, which would outweigh it.
        free = ~(mask[:, :half] | mask[:, ::-1][:, :half])
        a, b = left.mean(-1)[free], right.mean(-1)[free]
        result["mirror.ground"] = len(a) > 50 and _correlation(a - a.mean(), b - b.mean()) > 0.5
    return result


def _correlation(a: Array, b: Array) -> float:
    return float((a * b).sum() / max(float((a * a).sum() * (b * b).sum()) ** 0.5, 1e-6))


def _place(one: _Found) -> tuple[str, str]:
    # Between the centres of the thirds that scenes use, 0.21, 0.5 and 0.79.
    column, row = (int(value > 0.355) + int(value > 0.645) for value in (one.x, one.y))
    return COLUMNS[column], ROWS[row]


def _match(found: list[_Found], scene: Scene) -> list[_Found | None]:
    """Which component is which thing: the assignment that gets most attributes right."""
    choices: list[_Found | None] = [*found[:8], *([None] * len(scene.things))]

    def score(pair: tuple[int, int]) -> float:
        thing, one = scene.things[pair[0]], choices[pair[1]]
        if one is None:
            return 0.0
        marks = (one.shape == thing.shape, one.size == thing.size, thing.told and one.colour == thing.colour)
        return sum(marks) + 1.1 * (_place(one) == (thing.column, thing.row))

    table: Mapping[tuple[int, int], float] = {
        pair: score(pair) for pair in itertools.product(range(len(scene.things)), range(len(choices)))
    }
    best = max(
        itertools.permutations(range(len(choices)), len(scene.things)),
        key=lambda chosen: sum(table[pair] for pair in enumerate(chosen)),
    )
    return [choices[i] for i in best]

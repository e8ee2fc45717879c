"""Captioned scenes drawn from a seed (ours).

Everything is in fractions of the picture, so a scene looks the same at every size; only `grain` has grains of 16 pixels
at every size, so that larger pictures have more local detail. Only exact operations (+, *, sqrt, integers) draw, so a
seed gives the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import EDiTError

__all__ = [
    "COLOURS", "COLUMNS", "DOT", "FRAME", "GRAIN", "GROUNDS", "HELD_OUT", "NUMBERS", "PERIOD", "ROWS", "SHAPES",
    "SIZES", "SPECIALS", "TEXTURES", "TONE", "WHITE", "Picture", "Scene", "Thing", "cover",
]  # fmt: skip

Picture = npt.NDArray[np.uint8]
"""`(H, W, 3)`"""

HELD_OUT = 1 << 40
"""Seed of the first scene that nothing is trained on."""
SHAPES = ("circle", "square", "triangle", "bar", "cross")
COLOURS = {
    "red": (215, 25, 30), "orange": (250, 130, 0), "yellow": (250, 230, 0), "green": (20, 190, 40),
    "cyan": (0, 215, 225), "blue": (30, 60, 245), "purple": (130, 0, 190), "pink": (255, 110, 200),
}  # fmt: skip
WHITE = (255, 255, 255)
"""Of dots alone."""
GROUNDS = {"grey": (125, 125, 125), "sand": (190, 170, 140), "brown": (95, 70, 50), "slate": (65, 80, 100)}
"""Duller than every colour, so that the two are never taken for each other."""
TONE = 24
"""A ground's texture is this much lighter and darker than its colour, in levels of 255."""
TEXTURES = ("rows", "columns", "checks", "grain")
SIZES = {"large": 0.25, "small": 0.16}
"""Diameters, as fractions of the shorter side: 8 and 5 latent cells at 256 pixels."""
COLUMNS, ROWS = ("left", "centre", "right"), ("top", "middle", "bottom")
SPECIALS = ("none", "mirror", "frame", "dots")
NUMBERS = ("one", "two", "three", "four")

GRAIN = 16
"""Pixels per side of a grain, and so one token."""
PERIOD, FRAME, DOT = 1 / 8, 1 / 16, 1 / 16
"""Of rows, columns and checks; a frame's width; a dot's diameter: fractions of the shorter side."""
_CENTRES = (0.21, 0.5, 0.79)
_CHANCES = (0.15, 0.28, 0.29, 0.28)  # of SPECIALS


@dataclass(frozen=True)
class Thing:
    """A shape somewhere."""

    shape: str
    colour: str
    size: str
    column: str
    row: str
    told: bool = True
    """Whether the caption names its colour."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows, and how its caption says so."""

    things: tuple[Thing, ...]
    ground: str
    texture: str
    special: str
    dots: int
    """On each side; 0 but for `dots`."""
    told: bool
    """Whether the caption gives the number of dots."""
    wording: int
    """Which of the phrasings."""
    detail: int
    """Seeds what no caption tells: phases, grains, where the dots are."""

    @staticmethod
    def random(seed: int | np.random.Generator) -> Scene:
        """A scene from a seed, or the next one from a generator."""
        rng = np.random.Generator(np.random.PCG64(seed)) if isinstance(seed, int) else seed

        def pick(count: int) -> int:
            return int(rng.integers(count))

        special = SPECIALS[int(np.searchsorted(np.cumsum(_CHANCES)[:-1], rng.random(), side="right"))]
        count = 3 if special == "frame" else 1 + pick(3)
        # A mirrored half holds them all, in one column; dots come beside the things, wherever these are.
        places = [(c, r) for c in (COLUMNS[:1] if special == "mirror" else COLUMNS) for r in ROWS]
        chosen = _distinct(rng, len(places), count)
        colours = _distinct(rng, len(COLOURS), count)
        names, sizes = list(COLOURS), list(SIZES)
        silent = special == "frame" and pick(2) == 0  # then only the picture can tell which colour the frame needs
        things = tuple(
            Thing(SHAPES[pick(len(SHAPES))], names[colour], sizes[pick(2)], *places[place], not (silent and i == 2))
            for i, (place, colour) in enumerate(zip(chosen, colours, strict=True))
        )
        dots = 1 + pick(len(NUMBERS)) if special == "dots" else 0
        told = pick(2) == 0
        ground, texture = list(GROUNDS)[pick(len(GROUNDS))], TEXTURES[pick(len(TEXTURES))]
        return Scene(things, ground, texture, special, dots, told, pick(1 << 30), pick(1 << 30))

    @property
    def caption(self) -> str:
        """One sentence in lower case; its clauses stand between commas."""
        code = self.wording

        def one_of(*options: str) -> str:
            nonlocal code
            code, choice = divmod(code, len(options))
            return options[choice]

        parts = []
        for thing in self.things:
            size = one_of("large", "big") if thing.size == "large" else one_of("small", "little")
            what = f"a {size} {thing.colour + ' ' if thing.told else ''}{thing.shape}"
            where = f"{one_of('at', 'in')} the {thing.row} {thing.column}"
            parts.append(one_of(f"{what} {where}", f"{where} {what}"))
        ground = f"{self.ground} {self.texture}"
        parts.append(one_of(f"on {ground}", f"over {ground}", f"on a ground of {ground}"))
        if self.special == "mirror":
            parts.append(one_of("the right half mirrors the left", "mirrored left to right"))
        elif self.special == "frame":
            parts.append(one_of("a frame like the third shape", "framed in the colour of the third shape"))
        elif self.special == "dots" and self.told:
            parts.append(f"{NUMBERS[self.dots - 1]} {one_of('dots on each side', 'dots left and right')}")
        elif self.special == "dots":
            parts.append(one_of("as many dots left as right", "equally many dots on each side"))
        return ", ".join(parts)

    @staticmethod
    def parse(caption: str) -> Scene:
        """What a caption in the world's words asks for; what it leaves open is filled in somehow.

        Raises:
            EDiTError: a clause that means nothing here, no thing or no ground, or a frame like a third that is not.
        """
        things, ground, special, dots, told = [], None, "none", 0, False
        for clause in caption.lower().split(","):
            words = clause.split()

            def one(names: Iterable[str], words: list[str] = words) -> str | None:
                return next((name for name in names if name in words), None)

            texture = one(TEXTURES)
            if texture is not None and (name := one(GROUNDS)):
                ground = name, texture
            elif (shape := one(SHAPES)) and (column := one(COLUMNS)) and (row := one(ROWS)):
                size = "large" if one(("large", "big")) else "small"
                colour = one(COLOURS)
                things.append(Thing(shape, colour or "red", size, column, row, colour is not None))
            elif one(("mirrors", "mirrored")):
                special = "mirror"
            elif one(("frame", "framed")):
                special = "frame"
            elif one(("dots",)):
                number = one(NUMBERS)
                special, told = "dots", number is not None
                dots = NUMBERS.index(number) + 1 if number else 1
            else:
                raise EDiTError(f"{clause.strip()!r}: the small world has no words for this")
        if not things or ground is None or (special == "frame" and len(things) < 3):
            raise EDiTError(f"{caption!r}: needs things, a ground, and for a frame three things")
        return Scene(tuple(things), *ground, special, dots, told, 0, 0)

    def draw(self, width: int, height: int) -> Picture:
        """The picture `(height, width, 3)`.

        Args:
            width: in pixels, even.
            height: in pixels.
        """
        rng = np.random.Generator(np.random.PCG64(self.detail))
        short = min(width, height)
        picture = self._ground(rng, width, height)
        places = []
        for thing in self.things:
            shift = (rng.random(2).astype(np.float32) - 0.5) * 0.02 * short
            x = _CENTRES[COLUMNS.index(thing.column)] * width + float(shift[0])
            y = _CENTRES[ROWS.index(thing.row)] * height + float(shift[1])
            radius = SIZES[thing.size] / 2 * short
            _paint(picture, thing.shape, COLOURS[thing.colour], x, y, radius)
            places.append((x, y, radius))
        if self.special == "frame":
            wide = round(FRAME * short)
            colour = COLOURS[self.things[2].colour]
            for edge in (picture[:wide], picture[-wide:], picture[:, :wide], picture[:, -wide:]):
                edge[...] = colour
        for x, y in self._dots(rng, width, height, places):
            _paint(picture, "circle", WHITE, x, y, DOT / 2 * short)
        if self.special == "mirror":
            picture[:, width // 2 :] = picture[:, : width // 2][:, ::-1]
        return (picture + np.float32(0.5)).astype(np.uint8)

    def _ground(self, rng: np.random.Generator, width: int, height: int) -> npt.NDArray[np.float32]:
        half = PERIOD / 2 * min(width, height)
        phases = rng.integers(0, 4, 2) / 2  # in quarters of a period: every place of a picture has to agree on them
        lines = ((np.arange(height) + 0.5) / half + phases[0]).astype(np.int64) % 2 * 2 - 1  # -1 or 1
        posts = ((np.arange(width) + 0.5) / half + phases[1]).astype(np.int64) % 2 * 2 - 1
        if self.texture == "rows":
            tone = np.broadcast_to(lines[:, None], (height, width))
        elif self.texture == "columns":
            tone = np.broadcast_to(posts[None], (height, width))
        elif self.texture == "checks":
            tone = lines[:, None] * posts[None]
        else:
            grains = rng.integers(0, 2, (-(-height // GRAIN), -(-width // GRAIN))) * 2 - 1
            tone = grains.repeat(GRAIN, 0)[:height].repeat(GRAIN, 1)[:, :width]
        base = np.array(GROUNDS[self.ground], np.float32)
        return base + np.float32(TONE) * tone[..., None].astype(np.float32)

    def _dots(
        self, rng: np.random.Generator, width: int, height: int, places: list[tuple[float, float, float]]
    ) -> list[tuple[float, float]]:
        """As many on each side, on a lattice counted from that side's edge, clear of all things.

        At 256 pixels a dot lies in one token, so that counting them is what is hard, not drawing them.
        """
        if not self.dots:
            return []
        step = min(width, height) / 8
        across, down = range(int(width / 2 / step)), range(int(height / step))
        lattice = [((i + 0.25) * step, (j + 0.25) * step) for i in across for j in down]
        found = []
        for side in (0, 1):
            free = []
            for x, y in lattice:
                x = width - x if side else x
                if all(max(abs(x - a), abs(y - b)) > r + 0.06 * min(width, height) for a, b, r in places):
                    free.append((x, y))
            found += [free[i] for i in _distinct(rng, len(free), self.dots)]
        return found


def cover(shape: str, x: npt.NDArray[Any], y: npt.NDArray[Any], radius: float) -> npt.NDArray[Any]:
    """How much of each pixel a shape around the origin covers, 0-1; coordinates and radius in pixels, y downwards."""
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        inside = radius - np.sqrt(x * x + y * y)
    elif shape == "square":
        inside = 0.9 * radius - np.maximum(ax, ay)
    elif shape == "bar":
        inside = np.minimum(radius - ax, 0.45 * radius - ay)
    elif shape == "triangle":  # apex above, base below
        inside = np.minimum(0.8 * radius - y, (0.53 * (y + radius) - ax) * 0.88)
    else:
        arm = 0.36 * radius
        inside = np.maximum(np.minimum(radius - ax, arm - ay), np.minimum(radius - ay, arm - ax))
    return np.clip(inside + 0.5, 0, 1)


def _paint(
    picture: npt.NDArray[np.float32], shape: str, colour: tuple[int, int, int], x: float, y: float, radius: float
) -> None:
    reach = int(1.2 * radius) + 2
    top, left = max(0, int(y) - reach), max(0, int(x) - reach)
    part = picture[top : int(y) + reach + 1, left : int(x) + reach + 1]
    ys = np.arange(top, top + part.shape[0], dtype=np.float32)[:, None] + np.float32(0.5 - y)
    xs = np.arange(left, left + part.shape[1], dtype=np.float32)[None] + np.float32(0.5 - x)
    alpha = cover(shape, xs, ys, radius).astype(np.float32)[..., None]
    part += alpha * (np.array(colour, np.float32) - part)


def _distinct(rng: np.random.Generator, count: int, take: int) -> list[int]:
    """`take` of `range(count)`; by keys, since numpy does not promise its own shuffles to stay as they are."""
    return [int(i) for i in np.argsort(rng.random(count), kind="stable")[:take]]

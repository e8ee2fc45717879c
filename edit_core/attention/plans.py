"""How piecewise attention cuts a grid: one plan per grid and quality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from .call import Grid
from .variant import Variant, named

if TYPE_CHECKING:
    from ..config import EDiTConfig

__all__ = ["QUALITIES", "Balanced", "Faithful", "Fast", "PiecewisePlan", "Quality", "plan_of"]


@dataclass(frozen=True)
class PiecewisePlan:
    """How a grid is cut, in tokens, and how much of it is exact; each of `unit`, `tile`, `cell` divides the next.

    Raises:
        ValueError: a number is under 1, or sides do not divide each other, or `exact` is less than a tile's units.
    """

    unit: int
    """Side of a unit: keys that are chosen together."""
    tile: int
    """Side of a tile: queries that share a choice."""
    cell: int
    """Side of a cell: keys that share a mean."""
    exact: int
    """Units that are exact for a tile, its own among them."""
    opened: int
    """Cells whose units are candidates, the tile's own among them, so that the choice stays linear."""
    sample: int = 1
    """Side of the squares of queries that a tile asks the mean of, where it chooses; 1 for every query by itself."""

    def __post_init__(self) -> None:
        if min(self.unit, self.tile, self.cell, self.exact, self.opened, self.sample) < 1:
            raise ValueError(f"every number of {self} has to be 1 or more")
        if self.tile % self.unit or self.cell % self.tile:
            raise ValueError(f"the unit has to divide the tile and the tile the cell: {self}")
        if self.sample > 1 and self.tile % self.sample:
            raise ValueError(f"the sample has to divide the tile: {self}")
        if self.exact < (self.tile // self.unit) ** 2:
            raise ValueError(f"exact has to be no less than the units of a tile: {self}")

    def keys(self, grid: Grid) -> int:
        """How many of the image's keys a query attends to, at most."""
        tokens = grid[0] * grid[1]
        cells = -(-grid[0] // self.cell) * -(-grid[1] // self.cell)
        return min(tokens, self.exact * self.unit**2 + cells)


class Quality(Variant):
    """How much of a picture each query attends to in full."""

    share: ClassVar[float]
    """Of the tokens that are exact."""
    most: ClassVar[int]
    """How many of them at most, so that the cost stays linear."""


class Fast(Quality):
    name = "fast"
    share = 1 / 8
    most = 256


class Balanced(Quality):
    name = "balanced"
    share = 1 / 4
    most = 384


class Faithful(Quality):
    name = "faithful"
    share = 1 / 2
    most = 1024


QUALITIES = named(Fast, Balanced, Faithful)
"""By the config's names."""


def plan_of(grid: Grid, config: EDiTConfig) -> PiecewisePlan:
    """The plan of a grid: tiles of 2 x 2 units and cells of 4 x 4.

    A unit's side is the largest power of two with `4·unit² <= √N`, and 2 at least, so that a query has `√N` pooled keys
    at most; and a fourth of the config's `cell` where that is given. One unit more than the share says is exact. A tile
    of units of 2 asks each of its queries; of larger ones the means of its own units, which lose nothing.
    """
    quality = QUALITIES[config.quality]
    tokens, unit = grid[0] * grid[1], max(config.cell // 4, 1)
    if not config.cell:
        unit = 2
        while 16 * unit**2 <= math.sqrt(tokens):
            unit *= 2
    exact = max(4, math.ceil(min(quality.share * tokens, quality.most) / unit**2)) + 1
    sample = unit if unit > 2 else 1
    return PiecewisePlan(unit, 2 * unit, 4 * unit, exact, max(8, math.ceil(exact / 8)), sample)

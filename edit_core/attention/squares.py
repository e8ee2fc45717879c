"""A grid of tokens cut into squares, for piecewise attention: which token lies where, and the way there and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Grid
from .plans import PiecewisePlan

__all__ = ["Layout", "cover", "cut", "layout_of", "whole"]


class Layout(NamedTuple):
    """Where everything of a grid is; made of its numbers alone."""

    inside: tuple[Tensor | None, Tensor | None]
    """Which places of tiles `(T, t²)` and of units `(U, u²)` hold a token; None for all."""
    units: Tensor
    """Each cell's units, `(M, (c/u)²)`; their number for what is over the edge."""
    cell: Tensor
    """Each unit's cell, `(U,)`."""
    tile: Tensor
    """Each unit's tile, `(U,)`."""
    own: Tensor
    """Each tile's cell, `(T,)`."""


def layout_of(grid: Grid, plan: PiecewisePlan, device: torch.device) -> Layout:
    def inside(side: int) -> Tensor | None:
        if grid[0] % side == 0 and grid[1] % side == 0:
            return None
        y, x = (torch.arange(cover(size, side) * side, device=device) < size for size in grid)
        return squares_of(y.view(-1, 1) & x, side)

    def among(fine: int, coarse: int) -> Tensor:  # of each fine square, the coarse one at its corner
        y, x = (torch.arange(cover(size, fine), device=device) * fine // coarse for size in grid)
        return (y.view(-1, 1) * cover(grid[1], coarse) + x).flatten()

    down, across = (cover(size, plan.unit) for size in grid)
    f = plan.cell // plan.unit
    ids = torch.arange(down * across, device=device).view(down, across)
    units = squares_of(F.pad(ids, (0, -across % f, 0, -down % f), value=down * across), f)
    unit, tile, cell = plan.unit, plan.tile, plan.cell
    return Layout((inside(tile), inside(unit)), units, among(unit, cell), among(unit, tile), among(tile, cell))


def cover(size: int, side: int) -> int:
    return -(-size // side)


def squares_of(image: Tensor, side: int) -> Tensor:
    """`(Y·side, X·side)` -> `(Y·X, side²)`."""
    return cut(image.flatten().view(1, -1, 1), (image.shape[0], image.shape[1]), side)[0, :, :, 0]


def cut(tokens: Tensor, grid: Grid, side: int, out: Tensor | None = None) -> Tensor:
    """Tokens `(G, N, d)` by squares, `(G, M, side², d)`; zeros where one reaches over the edge."""
    image: Tensor = tokens.unflatten(1, grid)  # (G, H, W, d)
    if grid[0] % side or grid[1] % side:
        image = F.pad(image, (0, 0, 0, -grid[1] % side, 0, -grid[0] % side))
    groups, height, width, d = image.shape
    squares = image.view(groups, height // side, side, width // side, side, d).transpose(2, 3)
    if out is None:
        return squares.reshape(groups, -1, side * side, d)
    out.view(squares.shape).copy_(squares)
    return out.view(groups, -1, side * side, d)


def whole(squares: Tensor, grid: Grid, side: int, out: Tensor | None) -> Tensor:
    """The way back: `(G, M, side², d)` -> `(G, N, d)`."""
    groups, _, _, d = squares.shape
    down, across = (cover(size, side) for size in grid)
    image = squares.view(groups, down, across, side, side, d).transpose(2, 3)
    if out is None:
        image = image.reshape(groups, down * side, across * side, d)
        return image[:, : grid[0], : grid[1]].flatten(1, 2)
    if grid[0] % side or grid[1] % side:
        image = image.reshape(groups, down * side, across * side, d)
        out.unflatten(1, grid).copy_(image[:, : grid[0], : grid[1]])
    else:
        out.view(image.shape).copy_(image)
    return out

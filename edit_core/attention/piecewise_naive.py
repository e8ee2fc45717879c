"""The specification of piecewise attention: a softmax that is exact where it matters and pooled elsewhere, without weights.

The idea is PISA's ("Piecewise Sparse Attention", arXiv 2602.01077); what is exact and how it is chosen is ours. Written
out with dense masks, for any dtype and any grid: quadratic, slow, and only for tests.

The grid is cut three times, at sides that divide each other: *units* of u x u tokens are what is chosen, *tiles* of
t x t queries are who chooses, *cells* of c x c tokens are what is pooled. Those at the grid's edge may be smaller. With
`q_i` scaled by 1/sqrt(d), a unit or cell m of `n_m` tokens with the mean key `k_m` stands for them as one logit,

    l_i(m) = q_i·k_m + log n_m,    and counts by    s_m = sqrt(mean_{j in m} |k_j - k_c|² · mean_{j in m} |v_j - v_c|²),

where `k_c` and `v_c` are the means of m's cell: nothing is lost by pooling what is all alike. Per head and tile T:

1. *Open* the `opened` cells with the largest `s_m Σ_{i in T} p_i(m)`, `p_i` the softmax over all cells (and prompt keys).
2. Of the units of the open cells take the `exact` with the largest `s_u Σ_{i in T} p_i(u)`, `p_i` the softmax over those
   units, the cells that stay closed (and the prompt keys). All queries of the tile are asked; their mean knows too little.
3. One softmax over: every token of the units taken, as it is; every cell as `q_i·k_m + log r`, with the value `v_m`,
   where `r` of its tokens were not taken (none left: no key); every prompt key as it is.

The tile's own cell is always open and its own units always taken. The keys of a query are at most
`exact · u² + N / c² + prompt`. With `exact` no less than all the units and every cell open it is the teacher's softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["PiecewisePlan", "piecewise_attention", "piecewise_plan"]

QUALITIES = {"fast": (1 / 8, 256), "balanced": (1 / 4, 384), "faithful": (1 / 2, 1024)}
"""Of each quality: the share of the tokens that are exact, and how many at most."""


@dataclass(frozen=True)
class PiecewisePlan:
    """The sides of units, tiles and cells in tokens; how many units are exact and how many cells are open per tile."""

    unit: int
    tile: int
    cell: int
    exact: int
    opened: int

    def __post_init__(self) -> None:
        if min(self.unit, self.tile, self.cell, self.exact, self.opened) < 1:
            raise ValueError(f"every number of {self} has to be 1 or more")
        if self.tile % self.unit or self.cell % self.tile:
            raise ValueError(f"the unit has to divide the tile and the tile the cell: {self}")


def piecewise_plan(grid: tuple[int, int], quality: str = "balanced") -> PiecewisePlan:
    """The plan of a grid: tiles of 2 x 2 units and cells of 4 x 4, of a unit that grows with the root of the grid's side.

    It is the largest power of two with `4u² <= sqrt(N)`, and 2 at least: so a query has `sqrt(N)` pooled keys at most.
    """
    share, most = QUALITIES[quality]
    tokens = grid[0] * grid[1]
    unit = 2
    while 16 * unit**2 <= math.sqrt(tokens):
        unit *= 2
    exact = max(8, math.ceil(min(share * tokens, most) / unit**2))
    return PiecewisePlan(unit, 2 * unit, 4 * unit, exact, max(8, math.ceil(exact / 8)))


def _parts(grid: tuple[int, int], side: int) -> Tensor:
    """Which part of `side` x `side` each token lies in, row by row, as a one-hot `(N, parts)`."""
    rows, columns = torch.arange(grid[0]) // side, torch.arange(grid[1]) // side
    return F.one_hot((rows[:, None] * -(-grid[1] // side) + columns).flatten())


def _choose(score: Tensor, own: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The `count` best of those allowed, the own ones first: `(B,h,T,M)` bool."""
    score = score.masked_fill(~allowed, -1.0).masked_fill(own, math.inf)
    best = score.topk(min(count, score.shape[-1]), -1).indices
    return torch.zeros_like(allowed).scatter_(-1, best, True) & allowed


def piecewise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    plan: PiecewisePlan,
    prompt: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The rows of the image, `(B,h,N,d)`; q, k, v `(B,h,N,d)` and the prompt's keys and values `(B,h,P,d)` after qk-norm."""
    exact = exact_tokens(q, k, v, grid, plan, prompt)  # (B,h,T,N)
    q = q * q.shape[-1] ** -0.5
    tile, cell = (_parts(grid, side).to(q.device, q.dtype) for side in (plan.tile, plan.cell))
    k_cell, v_cell = (cell.mT @ t / cell.sum(0)[:, None] for t in (k, v))
    rest = (cell.sum(0) - exact.to(q.dtype) @ cell).log()  # log 0 = -inf: nothing of the cell is left
    of = tile.argmax(-1)  # the tile of each query
    logits = [(q @ k.mT).masked_fill(~exact[:, :, of], -math.inf), q @ k_cell.mT + rest[:, :, of]]
    values = [v, v_cell]
    if prompt is not None:
        logits.append(q @ prompt[0].mT)
        values.append(prompt[1])
    return torch.cat(logits, -1).softmax(-1) @ torch.cat(values, 2)


@torch.no_grad()
def exact_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grid: tuple[int, int],
    plan: PiecewisePlan,
    prompt: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Which tokens are exact for each tile, `(B,h,T,N)` bool; chosen in float32 at least, lest two of equal score swap."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype), v.to(dtype)
    none = q.new_zeros(*q.shape[:3], 0)
    to_prompt = none if prompt is None else q @ prompt[0].to(dtype).mT
    tile, unit, cell = (_parts(grid, side).to(q.device, dtype) for side in (plan.tile, plan.unit, plan.cell))
    k_cell, v_cell = (cell.mT @ t / cell.sum(0)[:, None] for t in (k, v))
    error = [(t - cell @ mean).square().sum(-1) for t, mean in ((k, k_cell), (v, v_cell))]  # (B,h,N)

    def logits(part: Tensor) -> Tensor:
        return q @ (part.mT @ k / part.sum(0)[:, None]).mT + part.sum(0).log()

    def score(mass: Tensor, part: Tensor) -> Tensor:
        spread = [e @ part / part.sum(0) for e in error]
        return tile.mT @ mass * (spread[0] * spread[1]).sqrt()[:, :, None]

    to_cell, to_unit = logits(cell), logits(unit)
    mass = torch.cat([to_cell, to_prompt], -1).softmax(-1)[..., : to_cell.shape[-1]]
    anything = torch.ones(*q.shape[:2], tile.shape[1], cell.shape[1], dtype=torch.bool, device=q.device)
    opened = _choose(score(mass, cell), (tile.mT @ cell) > 0, anything, plan.opened)

    of = tile.argmax(-1)
    allowed = (opened.to(dtype) @ (cell.mT @ unit)) > 0  # the units of the open cells, (B,h,T,U)
    to_unit = to_unit.masked_fill(~allowed[:, :, of], -math.inf)
    closed = to_cell.masked_fill(opened[:, :, of], -math.inf)
    mass = torch.cat([to_unit, closed, to_prompt], -1).softmax(-1)[..., : to_unit.shape[-1]]
    taken = _choose(score(mass, unit), (tile.mT @ unit) > 0, allowed, plan.exact)
    return (taken.to(dtype) @ unit.mT) > 0

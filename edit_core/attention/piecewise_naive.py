"""The specification of piecewise attention: a softmax exact where it matters and pooled elsewhere, without weights.

The idea is PISA's ("Piecewise Sparse Attention", arXiv 2602.01077); what is exact and how it is chosen is ours. Written
out with dense masks, for any dtype and any grid: quadratic, slow, and only for tests.

The grid is cut three times, at sides that divide each other: *units* of u x u tokens are what is chosen, *tiles* of
t x t queries are who chooses, *cells* of c x c tokens are what is pooled. Those at the grid's edge may be smaller. With
`q_i` scaled by 1/sqrt(d), a unit or cell m of `n_m` tokens with the mean key `k_m` stands for them as one logit,
`q_i·k_m + log n_m`. What tile T would get wrong by that, in proportion to what m weighs, is taken to be

    e_T(m) = sqrt((exp 2x - exp x) · mean_{j in m} |v_j - v_c|²),
    x = min(Σ_a mean_{i in T} q_ia² · var_{j in m} k_ja, 3).

The root of the first factor is the deviation of exp(logit) where logits are normal with the variance x;
`v_c` is the mean value of m's cell: nothing is lost by pooling values that are all alike. Per head and tile T:

1. *Open* the `opened` cells with the largest `e_T(m) Σ_{i in T} p_i(m)`, `p_i` the softmax over
   all cells (and prompt keys).
2. Of the units of the open cells take the `exact` with the largest `e_T(u) Σ_{i in T} p_i(u)`, `p_i` the softmax
   over those units, the cells that stay closed (and the prompt keys). All queries of the tile are asked, their mean
   knows too little; or, of larger tiles, the means of squares of `sample` x `sample` of them, each for as many.
3. One softmax over: every token of the units taken, as it is; every cell as `q_i·k_m + log r`, with the value `v_m`,
   where `r` of its tokens were not taken (none left: no key); every prompt key as it is.

The tile's own cell is always open and its own units always taken. The keys of a query are at most
`exact · u² + N / c² + prompt`. With `exact` no less than all the units and every cell open it is the teacher's softmax.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .plans import PiecewisePlan

__all__ = ["piecewise_attention"]


def _parts(grid: tuple[int, int], side: int) -> Tensor:
    """Which part of `side` x `side` each token lies in, row by row, as a one-hot `(N, parts)`."""
    rows, columns = torch.arange(grid[0]) // side, torch.arange(grid[1]) // side
    return F.one_hot((rows[:, None] * -(-grid[1] // side) + columns).flatten())


def _mean(x: Tensor, part: Tensor) -> Tensor:
    """The mean of each part's tokens, `(B,h,parts,d)`."""
    return part.mT @ x / part.sum(0)[:, None]


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
    """The rows of the image, `(B,h,N,d)`; after qk-norm: q, k, v `(B,h,N,d)`, prompt keys and values `(B,h,P,d)`."""
    exact = exact_tokens(q, k, v, grid, plan, prompt)  # (B,h,T,N)
    q = q * q.shape[-1] ** -0.5
    tile, cell = (_parts(grid, side).to(q.device, q.dtype) for side in (plan.tile, plan.cell))
    k_cell, v_cell = _mean(k, cell), _mean(v, cell)
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
    """Which tokens are exact for each tile, `(B,h,T,N)` bool; in float32 at least, lest near-equal scores swap."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(dtype) * q.shape[-1] ** -0.5, k.to(dtype), v.to(dtype)
    sides = (plan.tile, plan.unit, plan.cell, plan.sample)
    tile, unit, cell, sample = (_parts(grid, side).to(q.device, dtype) for side in sides)
    power = tile.mT @ q.square() / tile.sum(0)[:, None]  # (B,h,T,d)
    asked, of = _mean(q, sample), (tile.mT @ sample)  # (B,h,R,d); how many of a tile's queries each stands for, (T,R)
    to_prompt = asked[..., :0] if prompt is None else asked @ prompt[0].to(dtype).mT
    off = (v - cell @ _mean(v, cell)).square().sum(-1)  # (B,h,N)

    def logits(part: Tensor) -> Tensor:
        return asked @ _mean(k, part).mT + part.sum(0).log()

    def score(mass: Tensor, part: Tensor) -> Tensor:
        variance = _mean((k - part @ _mean(k, part)).square(), part)
        x = (power @ variance.mT).clamp(max=3.0)
        error = x.exp() * x.expm1() * (off @ part / part.sum(0))[:, :, None]
        return of @ mass * error.sqrt()

    to_cell, to_unit = logits(cell), logits(unit)
    mass = torch.cat([to_cell, to_prompt], -1).softmax(-1)[..., : to_cell.shape[-1]]
    anything = torch.ones(*q.shape[:2], tile.shape[1], cell.shape[1], dtype=torch.bool, device=q.device)
    opened = _choose(score(mass, cell), (tile.mT @ cell) > 0, anything, plan.opened)

    by = of.argmax(0)  # the tile of each sample
    allowed = (opened.to(dtype) @ (cell.mT @ unit)) > 0  # the units of the open cells, (B,h,T,U)
    to_unit = to_unit.masked_fill(~allowed[:, :, by], -math.inf)
    closed = to_cell.masked_fill(opened[:, :, by], -math.inf)
    mass = torch.cat([to_unit, closed, to_prompt], -1).softmax(-1)[..., : to_unit.shape[-1]]
    taken = _choose(score(mass, unit), (tile.mT @ unit) > 0, allowed, plan.exact)
    return (taken.to(dtype) @ unit.mT) > 0

"""Piecewise attention beside what else is exact for a part of the keys, at as many keys per query (ours).

`tools/world compare_piecewise` asks each form, without any training, for its error of the prediction on the small
world's teachers. All are dense attention with masks: what is compared is what they leave out, not their time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from edit_core import EDiTConfig, apply_edit
from edit_core.attention import SideAttention
from edit_core.attention.call import Grid, Image, Projections, Sides
from edit_core.attention.linear import merge_heads, split_heads
from edit_core.attention.pieces import Piecewise
from edit_core.attention.piecewise_naive import exact_tokens
from edit_core.attention.plans import PiecewisePlan, plan_of
from edit_core.backbones import backbone_named
from edit_core.distill.distance import teacher_distance
from edit_core.files import write_file
from edit_core.world.codec import CHANNELS
from edit_core.world.draw import batch_of, held_out
from edit_core.world.files import load_teacher

__all__ = ["FORMS", "main"]

TOKEN = 16
"""Pixels per side of a token."""
_BATCH = 4


class _Heads(NamedTuple):
    """A call of one attention, `(B, h, ., d)` each; queries in units of the logits."""

    q: Tensor
    k: Tensor
    v: Tensor
    prompt: tuple[Tensor, Tensor] | None
    grid: Grid


class _Form(NamedTuple):
    """What is exact, and what becomes of the rest."""

    title: str
    exact: Callable[[_Heads, int], Tensor]
    """Which tokens are exact for each tile, to `(B, h, T, N)`, of as many keys per query as are given."""
    tile: Callable[[Grid], int]
    """Side of the squares of queries that share a choice."""
    cell: Callable[[Grid], int]
    """Side of what is pooled."""
    order: int | None
    """Of the Taylor series of a pooled cell about its mean key; None where the rest is dropped."""


def _squares(grid: Grid, side: int) -> Tensor:
    """Which square each token lies in, `(N, squares)` of 0 and 1."""
    y, x = (torch.arange(size) // side for size in grid)
    return F.one_hot((y[:, None] * -(-grid[1] // side) + x).flatten()).float()


def _plan(grid: Grid) -> PiecewisePlan:
    return plan_of(grid, EDiTConfig.preset("piecewise"))


def _tile(grid: Grid) -> int:
    return _plan(grid).tile


def _cell(grid: Grid) -> int:
    return _plan(grid).cell


def _block(grid: Grid) -> int:
    """Of four such cells, and the others' means, there are as many keys as `balanced` has, or nearly."""
    return 4 if math.prod(grid) <= 256 else 8


def _ours(call: _Heads, _: int) -> Tensor:
    q = call.q * call.q.shape[-1] ** 0.5
    return exact_tokens(q, call.k, call.v, call.grid, _plan(call.grid), call.prompt)


def _window(call: _Heads, keys: int, pooled: bool) -> Tensor:
    """The tokens that lie nearest to the tile's middle: itself and a halo."""
    height, width = call.grid
    tile = _squares(call.grid, _tile(call.grid))
    at = torch.stack(torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"), -1).view(-1, 2).float()
    middle = tile.mT @ at / tile.sum(0)[:, None]
    far = (middle[:, None] - at).abs().amax(-1) + 1e-3 * torch.cdist(middle, at)  # square, and rounder where that ties
    if pooled:
        keys -= math.prod(-(-size // _cell(call.grid)) for size in call.grid)
    near = torch.zeros_like(far, dtype=torch.bool).scatter_(1, far.topk(keys, largest=False).indices, True)
    return near.expand(*call.q.shape[:2], -1, -1)


def _by_mass(call: _Heads, _: int) -> Tensor:
    """A tile's own cell and the three that get most of its attention by their mean keys, as PISA's zero-order form."""
    cell = _squares(call.grid, _block(call.grid))
    logits = call.q @ (cell.mT @ call.k / cell.sum(0)[:, None]).mT + cell.sum(0).log()
    rest = [] if call.prompt is None else [call.q @ call.prompt[0].mT]
    mass = cell.mT @ torch.cat([logits, *rest], -1).softmax(-1)[..., : cell.shape[1]]  # (B, h, T, M)
    mass = mass.masked_fill(torch.eye(cell.shape[1], dtype=torch.bool), math.inf)
    taken = torch.zeros_like(mass).scatter_(-1, mass.topk(4, -1).indices, 1.0)
    return (taken @ cell.mT) > 0


FORMS = {
    "windows": _Form("fixed windows, the rest dropped", partial(_window, pooled=False), _tile, _cell, None),
    "windows_pooled": _Form("fixed windows, the rest pooled", partial(_window, pooled=True), _tile, _cell, 0),
    "zero_order": _Form("PISA's zero-order form: whole cells by mass", _by_mass, _block, _block, 0),
    "first_order": _Form("PISA's first-order form: likewise, with a Taylor term", _by_mass, _block, _block, 1),
    "ours": _Form("`piecewise`, balanced", _ours, _tile, _cell, 0),
}
"""By name. Windows are as CLEAR (arXiv 2412.16112) and DiTFastAttn (arXiv 2406.08552) use them, PISA is arXiv
2602.01077; all are written anew, for tiles as ours."""


def _attend(form: _Form, call: _Heads, keys: int, counted: list[float]) -> Tensor:
    """The image's rows `(B, h, N, d)`; what a query attends to of the image is counted."""
    q, k, v = call.q, call.k, call.v
    exact = form.exact(call, keys)  # (B, h, T, N)
    cell = _squares(call.grid, form.cell(call.grid))
    of = _squares(call.grid, form.tile(call.grid)).argmax(-1)  # the tile of each query
    left = cell.sum(0) - exact.float() @ cell  # (B, h, T, M)
    count = exact.sum(-1).float() + (0 if form.order is None else (left > 0).sum(-1))
    counted.append(float(count.mean()))
    k_cell, v_cell = (cell.mT @ x / cell.sum(0)[:, None] for x in (k, v))
    logits, values = [(q @ k.mT).masked_fill(~exact[:, :, of], -math.inf)], [v]
    if call.prompt is not None:
        logits.append(q @ call.prompt[0].mT)
        values.append(call.prompt[1])
    if form.order is not None:
        logits.append(q @ k_cell.mT + left.log()[:, :, of])
        values.append(v_cell)
    weights = torch.cat(logits, -1).softmax(-1)
    y = weights @ torch.cat(values, 2)
    if form.order == 1:  # exp(q·k) is exp(q·k_m) (1 + q·(k - k_m)), whose second part sums to 0 in the denominator
        off_k, off_v = k - cell @ k_cell, v - cell @ v_cell
        pooled = weights[..., -cell.shape[1] :]
        for m in range(cell.shape[1]):
            inside = cell[:, m] > 0
            both = off_k[:, :, inside].mT @ off_v[:, :, inside] / inside.sum()  # (B, h, d, d)
            y = y + pooled[..., m : m + 1] * (q @ both)
    return y


class _Compared(Piecewise):
    """Piecewise attention's place in a transformer, for another form."""

    def __init__(self, form: _Form, keys: int, counted: list[float]) -> None:
        super().__init__(EDiTConfig.preset("piecewise"))
        self.attend = partial(_attend, form, keys=keys, counted=counted)

    def _rows(self, sides: Sides, image: Image, made: Projections, prompt: Projections | None) -> Tensor:
        q, k, v = (split_heads(x, image.heads) for x in made)
        more = None if prompt is None else (split_heads(prompt.k, image.heads), split_heads(prompt.v, image.heads))
        call = _Heads(q * q.shape[-1] ** -0.5, k, v, more, image.grid)
        return merge_heads(self.attend(call=call))


def compared(backbone: str, name: str, size: int, scenes: int) -> dict[str, Any]:
    """A form's row: its keys per query, and its error of the prediction over some held-out scenes."""
    transformer, counted = load_teacher(backbone), list[float]()
    grid, config = (size // TOKEN, size // TOKEN), EDiTConfig.preset("piecewise")
    shown = held_out(scenes)
    batches = [batch_of(backbone, shown[i : i + _BATCH], size) for i in range(0, scenes, _BATCH)]
    with apply_edit(transformer, config) as handle:
        for side in handle.sides.modules():
            if isinstance(side, SideAttention):
                side.form = _Compared(FORMS[name], _plan(grid).keys(grid), counted)
        error = teacher_distance(transformer, handle, backbone_named(backbone), batches).prediction
    keys = sum(counted) / len(counted)
    return {
        "backbone": backbone,
        "form": name,
        "tokens": math.prod(grid),
        "scenes": scenes,
        "keys": keys,
        "error": error,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="tools/world compare_piecewise",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--scenes", type=int, default=32, help="that errors are means over; a quarter at 1,024 tokens")
    parser.add_argument("--results", type=Path, default=Path("docs/piecewise.json"), help="the file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for size, scenes in ((256, options.scenes), (512, max(1, options.scenes // 4))):
        for backbone in CHANNELS:
            for name in FORMS:
                rows.append(compared(backbone, name, size, scenes))
                print(json.dumps(rows[-1]))
    write_file(options.results, (json.dumps(rows, indent=1) + "\n").encode())

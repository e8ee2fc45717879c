"""Piecewise attention: softmax attention that is exact where it matters and pooled elsewhere, without any weights.

The grid is cut three times: into tiles of queries, units of keys and cells of keys, all squares. The queries of a tile
share per head a choice of units, whose tokens they attend to one by one; what is left of every cell counts as the
cell's mean key and mean value, as often as it has tokens left. Choosing every unit is softmax attention.

Source: the zero-order form of PISA, "Piecewise Sparse Attention", arXiv 2602.01077, with units smaller than what is
pooled, and another choice of them: by what pooling would get wrong, mass times spread. The specification is
:mod:`edit_core.attention.piecewise_naive`.

Tokens, means and prompt are rows of one memory per head. What a tile attends to is a list of rows, gathered into
a dense block, so that the rest is two batched products and a softmax.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Grid
from .linear import merge_heads, split_heads, without_autocast
from .plans import PiecewisePlan
from .squares import Layout, cover, cut, layout_of, whole

__all__ = ["piecewise_attention"]

TOGETHER = 4 << 20
"""Bytes of keys up to which several heads are worked on at a time, on a CPU: what is gathered from is to stay in the
cache, and a single head's rows are too short to be read well."""
CHUNK = 4 << 20
"""Bytes per thread of what lies between the operators, on a CPU."""
CHUNK_ELSEWHERE = 256 << 20
"""The same on other devices, all together: a launch has a price, and memory an end."""
SPREAD = 3.0
"""The largest variance of a part's logits that the choice believes in."""
DENSE = 32
"""Few samples against the keys of all units, up to so many times as many, are faster than against gathered ones."""
CHOOSING = 4 << 20
"""Bytes of the logits that a choice is made by, at a time."""


class _Space:
    """Memory that is used again by every chunk: fresh memory is taken from the system page by page each time.

    Empty, it gives None, which `out=` takes for memory of its own: what autograd keeps must not be written over, and
    a compiler knows better.
    """

    def __init__(self, like: Tensor) -> None:
        self._kept: dict[str, Tensor] | None = None
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            self._kept = {}
        self._like = like

    @property
    def at_once(self) -> bool:
        return self._kept is None

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor | None:
        if self._kept is None:
            return None
        count = math.prod(shape)
        if name not in self._kept or self._kept[name].numel() < count:
            self._kept[name] = self._like.new_empty(count, dtype=dtype)
        return self._kept[name][:count].view(shape)


class _Parts(NamedTuple):
    """Units or cells, for `G` heads; everything at least float32."""

    keys: Tensor
    """Mean keys, `(G, M, d)`."""
    values: Tensor
    """Mean values, `(G, M, d)`."""
    squares: Tensor
    """Mean squares of the keys' channels, `(G, M, d)`."""
    lengths: Tensor
    """Mean squared lengths of the values, `(G, M)`."""
    logs: Tensor
    """Logarithm of how many tokens there are, `(G or 1, M)`."""


def _means(tokens: Tensor, weights: Tensor | None, space: _Space) -> tuple[Tensor, Tensor]:
    """Means of tokens `(G, U, u², d)` and of their squares, 2 x `(G, U, d)`, at least float32.

    Only the choice sees the squares. Weights are `(G or 1, U, 1, u²)`, or None for equal ones.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    if weights is not None:
        tokens = tokens.to(wide)
        squares = torch.matmul(weights.detach(), tokens.detach().square())
        return torch.matmul(weights, tokens).squeeze(-2), squares.squeeze(-2)
    found = []
    for head in [tokens] if space.at_once else tokens.split(1):  # by heads, which stay in the cache
        buffer = space("wide", *head.shape, dtype=wide)
        if head.dtype != wide:  # in bfloat16, the difference of squares would be all rounding
            head = head.to(wide) if buffer is None else buffer.copy_(head)
        mean = head.mean(-2)
        head = head.detach()
        found.append((mean, torch.mul(head, head, out=buffer).mean(-2)))
    if len(found) == 1:
        return found[0]
    means, squares = zip(*found, strict=True)
    return torch.cat(means), torch.cat(squares)


def _cells(units: _Parts, layout: Layout) -> _Parts:
    """The cells that units make."""
    count = F.pad(units.logs, (0, 1), value=-math.inf)[:, layout.units]  # (G or 1, M, f²)
    total = count.logsumexp(-1, keepdim=True)
    weights = (count - total.clamp(min=torch.finfo(count.dtype).min)).exp().unsqueeze(-2)  # 0 for empty ones
    inside = layout.units.clamp(max=len(layout.cell) - 1).flatten()

    def mean(t: Tensor) -> Tensor:
        return torch.matmul(weights, t.index_select(1, inside).unflatten(1, layout.units.shape)).squeeze(-2)

    lengths = mean(units.lengths.unsqueeze(-1)).squeeze(-1)
    return _Parts(mean(units.keys), mean(units.values), mean(units.squares), lengths, total.squeeze(-1))


def _samples(q: Tensor, inside: Tensor | None, side: int) -> tuple[Tensor, Tensor | None]:
    """What stands for a tile's queries in the choice: the means of small squares of them.

    Args:
        q: queries by tiles, `(G, T, t², d)`.
        inside: which of them are tokens, `(T, t²)`; None for all.
        side: of the squares; 1 for the queries themselves.

    Returns:
        `(G, T, r, d)`, and how many queries each stands for, `(T, r)`, None if all for the same.
    """
    if side == 1:
        return q, None if inside is None else inside.to(q.dtype)
    t = math.isqrt(q.shape[2])
    down = cover(t, side)
    i = torch.arange(t, device=q.device) // side
    square = (i.view(-1, 1) * down + i).flatten()  # (t²,)
    of = (square == torch.arange(down * down, device=q.device).view(-1, 1)).to(q.dtype)  # (r, t²)
    shares = None
    if inside is not None or t % side:
        of = of.expand(q.shape[1], -1, -1) if inside is None else of * inside.unsqueeze(-2)  # (T, r, t²)
        shares = of.sum(-1)
        of = (of / shares.clamp(min=1).unsqueeze(-1)).repeat(q.shape[0], 1, 1)
    else:
        of = (of / side**2).expand(q.shape[0] * q.shape[1], -1, -1)
    return torch.bmm(of, q.flatten(0, 1)).unflatten(0, q.shape[:2]), shares


def _mass(logits: list[Tensor], shares: Tensor | None) -> Tensor:
    """What tiles attend of the first of several `(..., r, K)` to, `(..., K)`, summed over their queries."""
    mass: Tensor = torch.cat(logits, -1).softmax(-1)[..., : logits[0].shape[-1]]
    if shares is not None:
        mass = mass * shares.unsqueeze(-1)
    return mass.sum(-2)


def _wrong(power: Tensor, parts: _Parts, off: Tensor) -> Tensor:
    """What a tile gets wrong by a part's mean, for what the part weighs.

    That is the deviation of `exp(logit)` in the part, where logits are normal and keys' channels independent, times
    that of the values from their cell's mean.

    Args:
        power: mean squares of the queries' channels, `(G, t, d)`.
        parts: units or cells, `M`.
        off: mean squared distances of their values, `(G, M)`.

    Returns:
        `(G, t, M)`.
    """
    variance = (parts.squares - parts.keys.square()).clamp_(min=0)
    x = torch.bmm(power, variance.transpose(1, 2)).clamp_(max=SPREAD)
    return x.exp().mul_(x.expm1()).mul_(off.clamp(min=0).unsqueeze(1)).sqrt_()


class _Choice(NamedTuple):
    """What is to be known to choose units, for `G` heads."""

    units: _Parts
    cells: _Parts
    off: Tensor
    """How far the units' values lie from their cells' means, squared, `(G, U)`."""
    prompt: tuple[Tensor, Tensor] | None
    """The prompt's keys `(G, d, P)` and what is added to their logits, `(G or 1, P)`."""
    layout: Layout
    plan: PiecewisePlan

    def of(self, heads: slice) -> _Choice:
        """The same for some of the heads."""

        def some(t: Tensor) -> Tensor:
            return t if len(t) == 1 else t[heads]

        return self._replace(
            units=_Parts(*map(some, self.units)),
            cells=_Parts(*map(some, self.cells)),
            off=some(self.off),
            prompt=None if self.prompt is None else (some(self.prompt[0]), some(self.prompt[1])),
        )

    def __call__(self, q: Tensor, shares: Tensor | None, power: Tensor, tiles: slice) -> Tensor:
        """The units that some tiles are exact for, `(G, t, n)`; as many as there are for what is over the edge.

        Args:
            q: samples of their queries in units of the logits, `(G, t, r, d)`.
            shares: how many queries each stands for, `(t, r)` or None.
            power: mean squares of the queries' channels, in the square of those units, `(G, t, d)`.
            tiles: which ones these are.
        """
        groups, count, reps, d = q.shape
        flat, plan, layout = q.flatten(1, 2), self.plan, self.layout  # (G, t·r, d)

        def to(keys: Tensor, bias: Tensor) -> Tensor:  # (G, d, M), (G or 1, M) -> (G, t, r, M)
            logits = torch.bmm(flat, keys).add_(bias.unsqueeze(1))
            return logits.view(groups, count, reps, -1)

        rest = [] if self.prompt is None else [to(*self.prompt)]
        total, places = len(layout.cell), torch.arange(len(layout.units), device=q.device)
        if plan.opened >= len(places):
            ids = torch.arange(total, device=q.device).expand(groups, count, -1)
            mass = _mass([to(self.units.keys.transpose(1, 2), self.units.logs), *rest], shares)
            score, tile = mass * _wrong(power, self.units, self.off), layout.tile
        else:
            cells = to(self.cells.keys.transpose(1, 2), self.cells.logs)
            off = self.cells.lengths - self.cells.values.square().sum(-1)
            score = _mass([cells, *rest], shares) * _wrong(power, self.cells, off)  # (G, t, M)
            own = places == layout.own[tiles].view(-1, 1)
            opened = score.masked_fill_(own, math.inf).topk(plan.opened, -1).indices
            cells = cells.masked_fill(
                torch.zeros_like(score, dtype=torch.bool).scatter_(2, opened, True).unsqueeze(2), -math.inf
            )
            ids = layout.units.index_select(0, opened.flatten()).view(groups, count, -1)  # (G, t, K)
            known = ids.clamp(max=total - 1)
            if reps * total <= DENSE * ids.shape[-1]:
                units = to(self.units.keys.transpose(1, 2), self.units.logs)  # (G, t, r, U)
                units = units.gather(3, known.unsqueeze(2).expand(-1, -1, reps, -1))
                units = units.masked_fill_((ids == total).unsqueeze(2), -math.inf)
            else:
                at = (known + torch.arange(groups, device=q.device).view(-1, 1, 1) * total).flatten()
                keys = self.units.keys.flatten(0, 1).index_select(0, at).view(groups * count, -1, d)
                bias = F.pad(self.units.logs, (0, 1), value=-math.inf).expand(groups, -1).gather(1, ids.flatten(1))
                units = torch.baddbmm(bias.view(groups * count, 1, -1), q.flatten(0, 1), keys.transpose(1, 2))
                units = units.view(groups, count, reps, -1)
            mass = _mass([units, cells, *rest], shares)
            score = mass * _wrong(power, self.units, self.off).gather(2, known)
            score = score.masked_fill_(ids == total, -1)  # after all that there are
            tile = F.pad(layout.tile, (0, 1), value=-1).index_select(0, ids.flatten()).view(ids.shape)
        own = tile == torch.arange(tiles.start, tiles.stop, device=q.device).view(-1, 1)
        chosen = score.masked_fill_(own, math.inf).topk(min(plan.exact, ids.shape[-1]), -1).indices
        return ids.gather(-1, chosen)


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, bias: Tensor, space: _Space, out: Tensor | None
) -> Tensor:
    """Softmax attention of tiles, each to its own rows of a memory.

    Args:
        q: `(n, t², d)`.
        keys: `(rows, d)`, of all heads.
        values: likewise.
        rows: `(n, S)`.
        bias: on the logits, `(n, 1, S)`.
        out: where to write, if not to new memory.

    Returns:
        `(n, t², d)`.
    """
    count, length = rows.shape
    d, at = q.shape[-1], rows.flatten()
    k = torch.index_select(keys, 0, at, out=space("k", count * length, d)).view(count, length, d)
    logits = space("logits", count, q.shape[1], length)
    if q.dtype == torch.float16:  # logits beyond its range would be infinite, and rows of them no numbers
        most = torch.finfo(q.dtype).max
        logits = torch.baddbmm(bias.new_zeros(1), q, k.transpose(1, 2), alpha=d**-0.5, out=logits)
        logits = logits.clamp(-most, most) + bias if space.at_once else logits.clamp_(-most, most).add_(bias)
    else:
        logits = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=d**-0.5, out=logits)
    weights = torch.softmax(logits, -1, out=None if space.at_once else logits)
    v = torch.index_select(values, 0, at, out=space("v", count * length, d)).view(count, length, d)
    return torch.bmm(weights, v, out=out)


def _memory(parts: list[Tensor], whole: Tensor | None) -> Tensor:
    """Rows `(G, ., d)` one after the other, `(G, R, d)`; the first are where they belong already."""
    if whole is None:
        return torch.cat(parts, 1)
    at = parts[0].shape[1]
    for part in parts[1:]:
        whole[:, at : at + part.shape[1]] = part
        at += part.shape[1]
    return whole


def _by_heads(tokens: Tensor, heads: int, pictures: slice, some: slice) -> Tensor:
    """`(B, N, C)` -> `(G, N, d)`, a view for one picture."""
    return split_heads(tokens[pictures], heads)[:, some].flatten(0, 1)


def _groups(batch: int, heads: int, size: int, space: _Space, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Which pictures and heads are worked on at a time; `size` is that of one head's keys in bytes."""
    if space.at_once:
        yield slice(None), slice(None)
        return
    together = max(1, (TOGETHER if device.type == "cpu" else CHUNK_ELSEWHERE) // size)
    for picture in range(batch):
        for start in range(0, heads, together):
            yield slice(picture, picture + 1), slice(start, min(start + together, heads))


def _blocks(groups: int, tiles: int, size: int, space: _Space) -> Iterator[tuple[slice, slice]]:
    """Which heads of a group, and which tiles, choose at a time; `size` is one tile's logits in bytes."""
    if space.at_once or groups * tiles * size <= CHOOSING:
        yield slice(0, groups), slice(0, tiles)
        return
    step = max(1, CHOOSING // size)
    for head in range(groups):
        for start in range(0, tiles, step):
            yield slice(head, head + 1), slice(start, min(start + step, tiles))


def _chunk(queries: Tensor, length: int, space: _Space) -> int:
    """How many tiles attend at a time."""
    count, rows, d = queries.shape
    if space.at_once:
        return count
    size = queries.element_size() * length * (rows + 2 * d)
    allowed = CHUNK * torch.get_num_threads() if queries.device.type == "cpu" else CHUNK_ELSEWHERE
    return max(1, allowed // size)


def piecewise_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    grid: Grid,
    plan: PiecewisePlan,
    prompt: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of image tokens that is exact for the units each tile chose and pooled for the rest.

    Args:
        q: queries after any qk-norm, `(B, N, C)`, any floating dtype.
        k: keys, likewise.
        v: values, likewise.
        heads: number of heads `h`.
        grid: `(H, W)` with `H·W = N`; any, what lies at the edge has fewer tokens.
        plan: how the grid is cut and how much is exact.
        prompt: a prompt's keys and values, each `(B, P, C)`, exact in the same softmax; or None.
        mask: as :func:`torch.nn.functional.scaled_dot_product_attention` takes it, to `(B, h, N, N + P)`. What is the
            same for all heads and queries weighs the tokens of a cell; any other is honoured by attention in full.

    Returns:
        `(B, N, C)` in v's dtype. Differentiable in q, k and v; what is chosen is not.
    """
    keys = q.shape[1] + (0 if prompt is None else prompt[0].shape[1])
    bias = None if mask is None else _key_bias(mask, keys)
    with without_autocast(q.device):
        q, k = q.to(v.dtype), k.to(v.dtype)
        units, cells = (cover(grid[0], side) * cover(grid[1], side) for side in (plan.unit, plan.cell))
        if (plan.exact >= units and plan.opened >= cells) or (mask is not None and bias is None):
            return _dense(q, k, v, heads, prompt, mask)
        return _piecewise(q, k, v, heads, grid, plan, prompt, bias)


def _key_bias(mask: Tensor, keys: int) -> Tensor | None:
    """A mask that is the same for all heads and queries as `(B or 1, N+P)`, added to the logits; None for others."""
    if (mask.dim() > 1 and mask.shape[-2] != 1) or (mask.dim() > 2 and mask.shape[-3] != 1):
        return None
    mask = mask.expand(*mask.shape[:-1], keys).reshape(-1, keys)
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
    return mask


def _dense(
    q: Tensor, k: Tensor, v: Tensor, heads: int, prompt: tuple[Tensor, Tensor] | None, mask: Tensor | None
) -> Tensor:
    if prompt is not None:
        k, v = torch.cat([k, prompt[0].to(k.dtype)], 1), torch.cat([v, prompt[1].to(v.dtype)], 1)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    q, k, v = (split_heads(t, heads) for t in (q, k, v))
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _piecewise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    grid: Grid,
    plan: PiecewisePlan,
    prompt: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
) -> Tensor:
    """See :func:`piecewise_attention`; `bias` is `(B or 1, N+P)` or None."""
    batch, tokens, channels = q.shape
    d, space = channels // heads, _Space(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    layout = layout_of(grid, plan, q.device)
    t = plan.tile
    units, tiles = len(layout.cell), len(layout.own)
    kept = None if bias is None else bias.isfinite().any(-1)  # a picture with nothing to attend to gives zeros
    if bias is not None and kept is not None:
        bias = bias.to(wide).masked_fill(~kept.unsqueeze(-1), 0)
    out = None if space.at_once else torch.empty(batch, tokens, channels, dtype=v.dtype, device=v.device)
    y = v
    for pictures, some in _groups(batch, heads, tokens * d * q.element_size(), space, q.device):
        qs, *ks = (_by_heads(x, heads, pictures, some) for x in (q, k, v))  # (G, N, d)
        of_prompt = [] if prompt is None else [_by_heads(x.to(v.dtype), heads, pictures, some) for x in prompt]
        memory = _Memory.of(ks, of_prompt, bias, pictures, grid, plan, layout, space)
        by_tiles = cut(qs, grid, t, space("q", len(qs), tiles * t * t, d))
        done = space("done", *by_tiles.shape)
        inside = layout.inside[0]  # (T, t²)
        with torch.no_grad():
            shares = None if inside is None else (inside / inside.sum(-1, keepdim=True)).to(wide).unsqueeze(-2)
            power = _means(by_tiles.detach(), shares, space)[1].div_(d)  # (G, T, d)
        reps = cover(t, plan.sample) ** 2
        size = reps * min(units, plan.opened * layout.units.shape[1]) * wide.itemsize
        for group, part in _blocks(len(qs), tiles, size, space):
            with torch.no_grad():
                samples, shares = _samples(
                    by_tiles[group, part], inside if inside is None else inside[part], plan.sample
                )
                samples = samples.to(wide) * d**-0.5
                chosen = memory.choice.of(group)(samples, shares, power[group, part], part)
                rows, seen = memory.rows(chosen, group, q.dtype)
            queries = by_tiles[group, part].flatten(0, 1)
            chunk = _chunk(queries, rows.shape[1], space)
            for start in range(0, len(queries), chunk):
                at = slice(start, start + chunk)
                to = None if done is None else done[group, part].view(-1, t * t, d)[at]
                y = _attend(queries[at], memory.keys, memory.values, rows[at], seen[at], space, to)
        y = y.view(by_tiles.shape) if done is None else done
        y = whole(y, grid, t, None if out is None else _by_heads(out, heads, pictures, some))
    if out is None:
        out = merge_heads(y.view(batch, heads, tokens, d))
    return out if kept is None else out * kept.view(-1, 1, 1)


class _Memory(NamedTuple):
    """Everything that `G` heads can attend to: tokens by units, the cells' means, the prompt, and one empty row."""

    keys: Tensor
    """`(G·R, d)`."""
    values: Tensor
    """`(G·R, d)`."""
    seen: Tensor
    """What is added to each row's logits, `(G or 1, R)`."""
    choice: _Choice

    @staticmethod
    def of(
        tokens: list[Tensor],
        prompt: list[Tensor],
        bias: Tensor | None,
        pictures: slice,
        grid: Grid,
        plan: PiecewisePlan,
        layout: Layout,
        space: _Space,
    ) -> _Memory:
        """Keys and values `(G, N, d)`, likewise of a prompt, and a bias `(B or 1, N+P)` of some of the pictures."""
        (groups, count, d), size = tokens[0].shape, plan.unit**2
        units, cells = len(layout.cell), len(layout.units)
        of_prompt = prompt[0].shape[1] if prompt else 0
        wholes = [space(name, groups, units * size + cells + of_prompt + 1, d) for name in ("keys", "values")]
        k, v = (
            cut(x, grid, plan.unit, None if whole is None else whole[:, : units * size])
            for x, whole in zip(tokens, wholes, strict=True)
        )
        wide = torch.promote_types(k.dtype, torch.float32)
        weights, seen, inside = None, torch.zeros(1, units, size, dtype=wide, device=k.device), layout.inside[1]
        seen_prompt = seen.new_zeros(1, of_prompt)
        if bias is not None:
            some = bias if len(bias) == 1 else bias[pictures]
            some = some.repeat_interleave(groups // len(some), 0)  # (G, N+P)
            seen = cut(some[:, :count].unsqueeze(-1), grid, plan.unit).squeeze(-1)  # (G, U, u²)
            seen_prompt = some[:, count:]
        if inside is not None:
            seen = seen.masked_fill(~inside, -math.inf)
        logs = seen.logsumexp(-1)  # (G or 1, U)
        if bias is not None or inside is not None:
            weights = (seen - logs.clamp(min=torch.finfo(wide).min).unsqueeze(-1)).exp().unsqueeze(-2)
        (keys, squares), (values, lengths) = (_means(x, weights, space) for x in (k, v))
        lengths = lengths.sum(-1)
        of_units = _Parts(keys, values, squares, lengths, logs)
        of_cells = _cells(of_units, layout)
        with torch.no_grad():
            around = of_cells.values.index_select(1, layout.cell)
            off = lengths + ((around - 2 * values) * around).sum(-1)
            of_prompt_keys = (prompt[0].to(wide).transpose(1, 2), seen_prompt) if prompt else None
            choice = _Choice(of_units, of_cells, off, of_prompt_keys, layout, plan)
        parts = [[x.flatten(1, 2), mean.to(x.dtype)] for x, mean in ((k, of_cells.keys), (v, of_cells.values))]
        for i, part in enumerate(parts):
            part += [*prompt[i : i + 1], k.new_zeros(groups, 1, d)]
        seen = torch.cat([seen.flatten(1), of_cells.logs, seen_prompt.expand(len(seen), -1)], 1)
        flat = [_memory(p, whole).flatten(0, 1) for p, whole in zip(parts, wholes, strict=True)]
        return _Memory(flat[0], flat[1], F.pad(seen, (0, 1), value=-math.inf), choice)

    def rows(self, chosen: Tensor, group: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What tiles of some heads attend to: rows `(g·t, S)` and what is added to their logits, `(g·t, 1, S)`.

        Args:
            chosen: units `(g, t, n)`.
            group: which heads.
            dtype: of the logits.
        """
        layout, units, cells = self.choice.layout, self.choice.units, self.choice.cells
        total, size, length = len(layout.cell), self.choice.plan.unit**2, self.seen.shape[1]
        groups, count = chosen.shape[:2]
        exact = chosen.unsqueeze(-1) * size + torch.arange(size, device=chosen.device)
        exact = exact.masked_fill_(chosen.unsqueeze(-1) == total, length - 1).flatten(2)
        rest = torch.arange(total * size, length - 1, device=chosen.device).expand(groups, count, -1)
        rows = torch.cat([exact, rest], -1)  # (g, t, S)
        heads = torch.arange(group.start, group.stop, device=chosen.device).view(-1, 1, 1) * length
        # How much of each cell is left, as a share of what it counts for.
        of = layout.cell.index_select(0, chosen.clamp(max=total - 1).flatten()).view(chosen.shape)
        share = (units.logs - cells.logs.index_select(1, layout.cell)).exp().nan_to_num(0)  # (G or 1, U)
        share = F.pad(share, (0, 1)) if len(share) == 1 else F.pad(share, (0, 1))[group]
        share = share.expand(groups, -1).gather(1, chosen.flatten(1)).view(chosen.shape)
        left = 1 - share.new_zeros(groups, count, cells.keys.shape[1]).scatter_add_(2, of, share)
        left = left.masked_fill_(left < 64 * torch.finfo(left.dtype).eps, 0).log_()
        at = rows if len(self.seen) == 1 else rows + heads
        seen = self.seen.flatten().index_select(0, at.flatten()).view(rows.shape)
        seen[..., exact.shape[-1] : exact.shape[-1] + left.shape[-1]] += left
        return (rows + heads).flatten(0, 1), seen.to(dtype).flatten(0, 1).unsqueeze(1)

"""What linear attention's queries find in the keys' state, with all that is added to it, in one pass."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import features, on_device_of, precision, rows

__all__ = ["Local", "read"]

_BLOCK = 128  # tokens per program; half of them for wide factors or with the local branch, which takes registers


class Local(NamedTuple):
    """A depthwise 3x3 convolution of the values, added to the rows."""

    v: Tensor
    """The base's values `(B, N, C)`."""
    weight: Tensor
    """`(C, 1, 3, 3)`, like the bias in v's dtype."""
    bias: Tensor
    """`(C,)`."""
    grid: tuple[int, int]
    """`(H, W)` with `H·W = N`."""


class _Tokens(NamedTuple):
    """Tokens `(B, N, C)` as a kernel finds them, their channels side by side."""

    at: Tensor
    batch: int
    """Elements from one picture to the next."""
    token: int


class _Near(NamedTuple):
    """:class:`Local` for a kernel."""

    v: _Tokens
    weight: Tensor
    bias: Tensor
    height: int
    width: int


@triton.jit
def _read(
    q,
    state,
    soft,
    local,
    out,
    tokens,
    eps,
    share,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    KERNEL: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    HOW: tl.constexpr,
):
    head, batch = tl.program_id(0), tl.program_id(2)
    first = (tl.program_id(1) * BLOCK).to(tl.int64)
    heads = tl.num_programs(0)
    n, d = tl.arange(0, BLOCK), tl.arange(0, D_PADDED)
    token, channel = n[:, None], d[None, :]
    inside = (first + token < tokens) & (channel < D)

    queries = q.at + batch.to(tl.int64) * q.batch + first * q.token + head * D
    phi = features(tl.load(queries + token * q.token + channel, mask=inside, other=0.0).to(tl.float32), KERNEL)
    phi = tl.where(inside, phi, 0.0).to(ROUND)
    state += (batch * heads + head).to(tl.int64) * (D * (D + 1))
    known = (d[:, None] < D) & (channel < D)
    products = tl.load(state + d[:, None] * (D + 1) + channel, mask=known, other=0.0)
    sums = tl.load(state + d * (D + 1) + D, mask=d < D, other=0.0)
    y = tl.dot(phi.to(DOT), products.to(ROUND).to(DOT), input_precision=HOW)
    y = y / (tl.sum(phi.to(tl.float32) * sums[None, :], 1) + eps)[:, None]

    if soft is not None:
        rows_at = soft.at + batch.to(tl.int64) * soft.batch + first * soft.token + head * D
        other = tl.load(rows_at + token * soft.token + channel, mask=inside, other=0.0).to(tl.float32)
        y = other + share * (y - other)
    if local is not None:
        v, height, width = local.v, local.height, local.width
        values = v.at + batch.to(tl.int64) * v.batch + first * v.token + head * D
        row, column = (first + token) // width, (first + token) % width
        y += tl.load(local.bias + head * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        for tap in range(9):  # not unrolled: all nine loads at once would spill registers
            down, right = tap // 3 - 1, tap % 3 - 1
            there = inside & (row + down >= 0) & (row + down < height)
            there = there & (column + right >= 0) & (column + right < width)
            near = tl.load(values + (token + down * width + right) * v.token + channel, mask=there, other=0.0)
            factor = tl.load(local.weight + (head * D + d) * 9 + tap, mask=d < D, other=0.0)
            y += near.to(tl.float32) * factor.to(tl.float32)[None, :]

    out += (batch * tokens + first) * (heads * D) + head * D
    tl.store(out + token * (heads * D) + channel, y, mask=inside)


def read(
    q: Tensor,
    state: Tensor,
    kernel: str,
    eps: float,
    dtype: torch.dtype,
    soft: Tensor | None = None,
    share: float = 1.0,
    local: Local | None = None,
) -> Tensor:
    """`φ(q_i)·Σ_j φ(k_j)ᵀ v_j / (φ(q_i)·Σ_j φ(k_j) + eps)`, mixed with the prompt's rows and the local branch added.

    The specifications are :func:`edit_core.attention.naive.linear_attention` and, of what is added,
    :func:`~edit_core.attention.naive.hybrid_attention` with `normaliser=token_ratio`. Has no gradient.

    Args:
        q: queries `(B, N, C)` before their features, float32, float16 or bfloat16; any strides but the last.
        state: of :func:`.state.state`, `(B, h, d, d+1)`, float32, contiguous.
        kernel: `relu`, `squared_relu` or `elu`.
        eps: added to the denominator.
        dtype: of the result.
        soft: rows `(B, N, C)` of the softmax over the prompt, or None.
        share: of the linear rows beside these.
        local: the local branch, or None.

    Returns:
        `(B, N, C)`.
    """
    batch, tokens, channels = q.shape
    heads, d = state.shape[1:3]
    y = torch.empty(batch, tokens, channels, device=q.device, dtype=dtype)
    near = None if local is None else _Near(_tokens(local.v), local.weight.contiguous(), local.bias, *local.grid)
    block = _BLOCK if q.dtype == torch.bfloat16 and local is None else _BLOCK // 2
    padded = max(16, triton.next_power_of_2(d))
    with on_device_of(q):
        _read[(heads, triton.cdiv(tokens, block), batch)](
            _tokens(q),
            state,
            None if soft is None else _tokens(soft),
            near,
            y,
            tokens,
            eps,
            share,
            D=d,
            D_PADDED=padded,
            BLOCK=block,
            KERNEL=kernel,
            **precision(q.dtype, wide=True),  # the sums over all keys
            num_warps=8 if padded > 64 else 4,
        )
    return y


def _tokens(tokens: Tensor) -> _Tokens:
    at = rows(tokens)
    return _Tokens(at, at.stride(0), at.stride(1))

"""A depthwise 3x3 convolution of tokens where they lie: SpatialCompressor's, and the local branch's by itself."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device_of, rows

__all__ = ["depthwise"]

_TOKENS, _CHANNELS = 16, 128  # per program


@triton.jit
def _depthwise(
    x,
    weight,
    bias,
    out,
    tokens,
    channels,
    height,
    width,
    out_width,
    x_batch,
    x_token,
    STRIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    inside = (token < tokens)[:, None] & (channel < channels)[None, :]
    row, column = token // out_width * STRIDE, token % out_width * STRIDE
    x += batch * x_batch
    known = channel < channels
    y = tl.zeros((TOKENS, CHANNELS), tl.float32)
    y += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(9):
        down, right = row + tap // 3 - 1, column + tap % 3 - 1
        there = (down >= 0) & (down < height) & (right >= 0) & (right < width)
        near = tl.load(
            x + ((down * width + right) * x_token)[:, None] + channel[None, :], mask=inside & there[:, None], other=0.0
        )
        y += near.to(tl.float32) * tl.load(weight + channel * 9 + tap, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(out + ((batch * tokens + token) * channels)[:, None] + channel[None, :], y, mask=inside)


def depthwise(tokens: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """`DepthwiseConv3x3(tokens)`, padded by one, with a stride; the sum is taken in float32. Has no gradient.

    The specification is that of SpatialCompressor and of the local branch in
    :func:`edit_core.attention.naive.edit_attention`.

    Args:
        tokens: `(B, N, C)`, float32, float16 or bfloat16; any strides but the last.
        grid: `(H, W)` with `H·W = N`.
        weight: `(C, 1, 3, 3)`.
        bias: `(C,)`.
        stride: of both sides.

    Returns:
        `(B, ceil(H/stride)·ceil(W/stride), C)` in the tokens' dtype.
    """
    x = rows(tokens)
    batch, _, channels = x.shape
    out_height, out_width = (triton.cdiv(side, stride) for side in grid)
    y = torch.empty(batch, out_height * out_width, channels, device=x.device, dtype=x.dtype)
    programs = (triton.cdiv(channels, _CHANNELS), triton.cdiv(y.shape[1], _TOKENS), batch)
    with on_device_of(x):
        _depthwise[programs](
            x,
            weight.contiguous(),
            bias,
            y,
            y.shape[1],
            channels,
            *grid,
            out_width,
            x.stride(0),
            x.stride(1),
            STRIDE=stride,
            TOKENS=_TOKENS,
            CHANNELS=_CHANNELS,
            num_warps=4,
        )
    return y

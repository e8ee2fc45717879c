"""ConvFusion behind its 3x3 convolution: GroupNorm, LeakyReLU, the 1x1 convolution and the sum with the queries.

Two small kernels find what GroupNorm multiplies and adds per channel; a third reads the bottleneck's tokens once,
norms them on the way into the matrix product, and adds the queries on the way out.
"""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import on_device_of, precision, rows

__all__ = ["conv_fusion"]

_CHUNK, _CHANNELS = 128, 64  # tokens and channels per program of the statistics
_TOKENS, _OUT, _HIDDEN = 128, 128, 32  # a tile of the matrix product


@triton.jit
def _statistics(
    u,
    out,
    tokens,
    hidden,
    u_batch,
    u_token,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    # Mean and squared distances from it, chunk by chunk: no difference of large squares that float32 would lose.
    chunk, batch = tl.program_id(1), tl.program_id(2)
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    token = (chunk * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    inside = (token < tokens)[:, None] & (channel < hidden)[None, :]
    u += batch.to(tl.int64) * u_batch
    x = tl.load(u + (token * u_token)[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 0) / tl.minimum(tokens - chunk * CHUNK, CHUNK)
    apart = tl.where(inside, x - mean[None, :], 0.0)
    out += (batch * tl.num_programs(1) + chunk).to(tl.int64) * 2 * hidden
    tl.store(out + channel, mean, mask=channel < hidden)
    tl.store(out + hidden + channel, tl.sum(apart * apart, 0), mask=channel < hidden)


@triton.jit
def _scale_and_shift(
    parts,
    weight,
    bias,
    out,
    tokens,
    hidden,
    chunks,
    eps,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group, batch = tl.program_id(0), tl.program_id(1)
    channel = group * WIDTH + tl.arange(0, WIDTH_PADDED)
    own = tl.arange(0, WIDTH_PADDED) < WIDTH
    parts += batch.to(tl.int64) * chunks * 2 * hidden
    total = tl.zeros((WIDTH_PADDED,), tl.float32)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        inside = (chunk < chunks)[:, None] & own[None, :]
        means = tl.load(parts + (chunk * 2 * hidden)[:, None] + channel[None, :], mask=inside, other=0.0)
        total += tl.sum(means * tl.minimum(tokens - chunk * CHUNK, CHUNK).to(tl.float32)[:, None], 0)
    count = tokens * WIDTH
    mean = tl.sum(total, 0) / count
    total = tl.zeros((WIDTH_PADDED,), tl.float32)
    for start in range(0, chunks, BLOCK):
        chunk = start + tl.arange(0, BLOCK)
        inside = (chunk < chunks)[:, None] & own[None, :]
        at = parts + (chunk * 2 * hidden)[:, None] + channel[None, :]
        apart = tl.where(inside, tl.load(at, mask=inside, other=0.0) - mean, 0.0)
        within = tl.load(at + hidden, mask=inside, other=0.0)
        total += tl.sum(within + apart * apart * tl.minimum(tokens - chunk * CHUNK, CHUNK).to(tl.float32)[:, None], 0)
    inverse = 1.0 / tl.sqrt(tl.sum(total, 0) / count + eps)
    scale = tl.load(weight + channel, mask=own, other=0.0).to(tl.float32) * inverse
    shift = tl.load(bias + channel, mask=own, other=0.0).to(tl.float32) - mean * scale
    out += batch * 2 * hidden
    tl.store(out + channel, scale, mask=own)
    tl.store(out + hidden + channel, shift, mask=own)


@triton.jit
def _project(
    u,
    norm,
    weight,
    bias,
    q,
    out,
    tokens,
    hidden,
    channels,
    u_batch,
    u_token,
    q_batch,
    q_token,
    TOKENS: tl.constexpr,
    OUT: tl.constexpr,
    HIDDEN: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    HOW: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    channel = tl.program_id(0) * OUT + tl.arange(0, OUT)
    here, known = token < tokens, channel < channels
    u += batch * u_batch
    norm += batch * 2 * hidden
    y = tl.zeros((TOKENS, OUT), tl.float32)
    for start in range(0, hidden, HIDDEN):
        h = start + tl.arange(0, HIDDEN)
        inner = h < hidden
        x = tl.load(u + (token * u_token)[:, None] + h[None, :], mask=here[:, None] & inner[None, :], other=0.0)
        scale = tl.load(norm + h, mask=inner, other=0.0)
        shift = tl.load(norm + hidden + h, mask=inner, other=0.0)
        x = x.to(tl.float32) * scale[None, :] + shift[None, :]
        x = tl.where(x < 0, 0.01 * x, x)  # LeakyReLU's own slope
        w = tl.load(weight + channel[None, :] * hidden + h[:, None], mask=known[None, :] & inner[:, None], other=0.0)
        y = tl.dot(x.to(ROUND).to(DOT), w.to(DOT), y, input_precision=HOW)
    y += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    inside = here[:, None] & known[None, :]
    q += batch * q_batch
    y += tl.load(q + (token * q_token)[:, None] + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out + ((batch * tokens + token) * channels)[:, None] + channel[None, :], y, mask=inside)


def conv_fusion(
    u: Tensor,
    q: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    groups: int,
    eps: float,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """`q + Conv1x1(LeakyReLU(GroupNorm(u)))`; statistics and sums in float32. Has no gradient.

    The specification is :func:`edit_core.attention.naive.conv_fusion` behind its first convolution.

    Args:
        u: what the 3x3 convolution gives, as tokens `(B, N, C/r)`, float32, float16 or bfloat16; any strides but the
            last.
        q: queries `(B, N, C)`, likewise.
        norm_weight: GroupNorm's `(C/r,)`.
        norm_bias: GroupNorm's `(C/r,)`.
        groups: GroupNorm's.
        eps: GroupNorm's.
        weight: the 1x1 convolution's `(C, C/r)`.
        bias: the 1x1 convolution's `(C,)`.

    Returns:
        `(B, N, C)` in q's dtype.
    """
    u, q = rows(u), rows(q)
    batch, tokens, hidden = u.shape
    channels, chunks, width = q.shape[-1], triton.cdiv(tokens, _CHUNK), hidden // groups
    parts = torch.empty(batch, chunks, 2, hidden, device=u.device, dtype=torch.float32)
    norm = torch.empty(batch, 2, hidden, device=u.device, dtype=torch.float32)
    y = torch.empty(batch, tokens, channels, device=q.device, dtype=q.dtype)
    with on_device_of(u):
        _statistics[(triton.cdiv(hidden, _CHANNELS), chunks, batch)](
            u, parts, tokens, hidden, u.stride(0), u.stride(1), CHUNK=_CHUNK, CHANNELS=_CHANNELS, num_warps=4
        )
        _scale_and_shift[(groups, batch)](
            parts,
            norm_weight,
            norm_bias,
            norm,
            tokens,
            hidden,
            chunks,
            eps,
            CHUNK=_CHUNK,
            WIDTH=width,
            WIDTH_PADDED=triton.next_power_of_2(width),
            BLOCK=64,
            num_warps=4,
        )
        _project[(triton.cdiv(channels, _OUT), triton.cdiv(tokens, _TOKENS), batch)](
            u,
            norm,
            weight.contiguous(),
            bias,
            q,
            y,
            tokens,
            hidden,
            channels,
            u.stride(0),
            u.stride(1),
            q.stride(0),
            q.stride(1),
            TOKENS=_TOKENS,
            OUT=_OUT,
            HIDDEN=_HIDDEN,
            **precision(u.dtype),
            num_warps=8,
            num_stages=3,
        )
    return y

"""What linear attention's keys leave of themselves, in one pass over keys and values as they lie in memory."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import features, on_device_of, precision, rows

__all__ = ["state"]

_BLOCK = 64  # tokens at a time
_PROGRAMS = 256  # enough for the largest devices, and few enough for their partial sums to stay in the cache


@triton.jit
def _partial_states(
    k,
    v,
    out,
    tokens,
    per_chunk,
    k_batch,
    k_token,
    v_batch,
    v_token,
    D: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    KERNEL: tl.constexpr,
    ROUND: tl.constexpr,
    DOT: tl.constexpr,
    HOW: tl.constexpr,
):
    head, chunk, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = chunk * per_chunk
    count = tl.minimum(tokens - first, per_chunk)
    k += batch.to(tl.int64) * k_batch + first.to(tl.int64) * k_token + head * D
    v += batch.to(tl.int64) * v_batch + first.to(tl.int64) * v_token + head * D
    n, d = tl.arange(0, BLOCK), tl.arange(0, D_PADDED)
    products = tl.zeros((D_PADDED, D_PADDED), tl.float32)
    sums = tl.zeros((D_PADDED,), tl.float32)
    for start in range(0, per_chunk, BLOCK):
        token = (start + n)[:, None]
        inside = (token < count) & (d[None, :] < D)
        phi = features(tl.load(k + token * k_token + d[None, :], mask=inside, other=0.0).to(tl.float32), KERNEL)
        phi = tl.where(inside, phi, 0.0).to(ROUND)  # features of nothing are not all zero
        values = tl.load(v + token * v_token + d[None, :], mask=inside, other=0.0)
        sums += tl.sum(phi.to(tl.float32), 0)
        products = tl.dot(tl.trans(phi.to(DOT)), values.to(ROUND).to(DOT), products, input_precision=HOW)
    heads, chunks = tl.num_programs(0), tl.num_programs(1)
    out += ((batch * chunks + chunk) * heads + head).to(tl.int64) * (D * (D + 1))
    row = d[:, None] * (D + 1)
    tl.store(out + row + d[None, :], products, mask=(d[:, None] < D) & (d[None, :] < D))
    tl.store(out + d * (D + 1) + D, sums, mask=d < D)


def state(k: Tensor, v: Tensor, heads: int, kernel: str) -> Tensor:
    """`Σ_j φ(k_j)ᵀ [v_j, 1]` per head, summed in float32, the same each time: chunks of tokens, then their sum.

    The specification is :func:`edit_core.attention.naive.linear_attention`. Has no gradient.

    Args:
        k: keys `(B, M, C)` before their features, float32, float16 or bfloat16; any strides but the last.
        v: values `(B, M, C)`, likewise.
        heads: number of heads `h`.
        kernel: `relu`, `squared_relu` or `elu`.

    Returns:
        `(B, h, d, d+1)`, float32.
    """
    k, v = rows(k), rows(v)
    batch, tokens, channels = k.shape
    d = channels // heads
    blocks = triton.cdiv(tokens, _BLOCK)
    per_chunk = triton.cdiv(blocks, max(1, _PROGRAMS // (batch * heads))) * _BLOCK
    chunks = triton.cdiv(tokens, per_chunk)
    parts = torch.empty(batch, chunks, heads, d, d + 1, device=k.device, dtype=torch.float32)
    padded = max(16, triton.next_power_of_2(d))
    with on_device_of(k):
        _partial_states[(heads, chunks, batch)](
            k,
            v,
            parts,
            tokens,
            per_chunk,
            k.stride(0),
            k.stride(1),
            v.stride(0),
            v.stride(1),
            D=d,
            D_PADDED=padded,
            BLOCK=_BLOCK,
            KERNEL=kernel,
            **precision(k.dtype, wide=kernel == "squared_relu"),
            num_warps=8 if padded > 64 else 4,
            num_stages=2,
        )
    return parts.sum(1)

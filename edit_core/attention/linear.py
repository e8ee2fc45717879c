"""Linear attention between non-negative features: the sum over the keys is taken once, not once per query."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "linear_attention",
    "merge_heads",
    "read",
    "split_heads",
    "state",
    "without_autocast",
]


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """`(B, N, C)` -> `(B, h, N, d)`, a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """`(B, h, N, d)` -> `(B, N, C)`, a view where the memory is `(B, N, h, d)`."""
    return tokens.transpose(1, 2).flatten(2)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """For sums and logits that autocast would take in its own dtype."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def state(keys_values: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """What keys leave of themselves, `Σ_j k_jᵀ [v_j, 1]`: all that linear attention's queries ever see of them.

    Args:
        keys_values: keys and values, each `(B, h, M, d)`; several pairs, such as an image's and a prompt's, or slices
            of either, are nowhere put together.

    Returns:
        `(B, h, d, d+1)`, float32, or float64 for float64.
    """
    return reduce(torch.add, (_state(k, v) for k, v in keys_values))


def _state(k: Tensor, v: Tensor) -> Tensor:
    # Float16 overflows in these sums above ~4k tokens. Compressed K and V are a quarter of the tokens, so float32 is
    # cheap; SANA's own code takes it for all of them.
    wide = torch.promote_types(k.dtype, torch.float32)
    with without_autocast(k.device):
        k, v = k.to(wide), v.to(wide)
        return torch.cat([k.transpose(-1, -2) @ v, k.sum(-2).unsqueeze(-1)], dim=-1)


def read(q: Tensor, state: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What queries `(B, h, N, d)` find in a :func:`state`: rows `(B, h, N, d)` in a dtype, and denominators.

    A denominator is `q·Σk + eps`, of shape `(B, N, h)`, at least float32.
    """
    d = q.shape[-1]
    # bfloat16 has float32's range, and its matrix product accumulates in float32. Float16 does not fit the sums.
    inner = torch.bfloat16 if q.dtype == torch.bfloat16 else state.dtype
    with without_autocast(q.device):
        both = q.to(inner) @ state.to(inner)  # (B, h, N, d+1)
        normaliser = both[..., d].to(state.dtype).add(eps).transpose(1, 2).contiguous()  # (B, N, h)
        # The first factor's layout decides the result's: the product is written token-major, ready for the projection.
        y = torch.mul(normaliser.reciprocal().to(inner).unsqueeze(-1), both[..., :d].transpose(1, 2))  # (B, N, h, d)
        return y.to(dtype).transpose(1, 2), normaliser


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """Bidirectional linear attention, `y_i = (q_i · Σ_j k_jᵀ v_j) / (q_i · Σ_j k_j + eps)` per head, in `O(N + M)`.

    Source: EDiT, arXiv 2503.16726, "Linear compressed attention". The specification is
    :func:`edit_core.attention.naive.linear_attention`.

    Args:
        q: queries of shape `(B, h, N, d)`, non-negative, any floating dtype.
        k: keys of shape `(B, h, M, d)`, non-negative, the same dtype.
        v: values of shape `(B, h, M, d)`, the same dtype, or a narrower one.
        eps: added to the denominator.

    Returns:
        `(B, h, N, d)` in v's dtype, a view of `(B, N, h, d)` memory. The sums over `j` are taken in float32, or in
        float64 for float64.
    """
    return read(q, state([(k, v)]), eps, v.dtype)[0]

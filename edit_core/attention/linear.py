"""Linear attention between non-negative features: the sum over the keys is taken once, not once per query."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_attention", "linear_attention_with_normaliser", "merge_heads", "split_heads"]


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """`(B, N, C)` -> `(B, h, N, d)`, a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """`(B, h, N, d)` -> `(B, N, C)`, a view where the memory is `(B, N, h, d)`."""
    return tokens.transpose(1, 2).flatten(2)


def linear_attention_with_normaliser(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """:func:`linear_attention` and its denominator `q·Σk + eps`, of shape `(B, N, h)`, float32."""
    device = q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # which would take the sums in its own dtype
            return _linear_attention(q, k, v, eps)
    return _linear_attention(q, k, v, eps)


def _linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    d = v.shape[-1]
    # Float16 overflows in these sums above ~4k tokens; K and V are a quarter of the tokens, so float32 is cheap.
    k32, v32 = k.float(), v.float()
    state = torch.cat([k32.transpose(-1, -2) @ v32, k32.sum(-2).unsqueeze(-1)], dim=-1)  # (B, h, d, d+1)
    # bfloat16 has float32's range, and its matrix product accumulates in float32. Float16 does not fit the sums.
    dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    both = q.to(dtype) @ state.to(dtype)  # (B, h, N, d+1)
    normaliser = both[..., d].float().add(eps).transpose(1, 2).contiguous()  # (B, N, h)
    # The first factor's layout decides the result's: the product is written token-major, ready for the projection.
    y = torch.mul(normaliser.reciprocal().to(dtype).unsqueeze(-1), both[..., :d].transpose(1, 2))  # (B, N, h, d)
    return y.to(q.dtype).transpose(1, 2), normaliser


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """Bidirectional linear attention, `y_i = (q_i · Σ_j k_jᵀ v_j) / (q_i · Σ_j k_j + eps)` per head, in `O(N + M)`.

    Source: EDiT, arXiv 2503.16726, "Linear compressed attention". The specification is
    :func:`edit_core.attention.naive.linear_attention`.

    Args:
        q: queries of shape `(B, h, N, d)`, non-negative, any floating dtype.
        k: keys of shape `(B, h, M, d)`, non-negative, the same dtype.
        v: values of shape `(B, h, M, d)`, the same dtype.
        eps: added to the denominator.

    Returns:
        `(B, h, N, d)` in q's dtype, a view of `(B, N, h, d)` memory. The sums over `j` are taken in float32.
    """
    return linear_attention_with_normaliser(q, k, v, eps)[0]

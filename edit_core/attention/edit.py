"""EDiT's linear compressed self-attention and MM-EDiT's hybrid joint attention, between a base's projections.

A base model keeps its own linears: it hands in its projections `q, k, v` and gets back what goes into its output
projection. All tokens are `(B, N, C)`; the specifications are in :mod:`edit_core.attention.naive`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EDiTConfig
from .linear import linear_attention, linear_attention_with_normaliser, merge_heads, split_heads
from .modules import ConvFusion, Grid, LayerFactory, SpatialCompressor

__all__ = ["SITES", "EDiTAttention", "HybridAttention", "Norm", "Projections", "Softmax", "softmax_attention"]

Norm = Callable[[Tensor], Tensor]
"""A base's qk-norm, over the last dimension of `(B, N, h, d)`."""
Softmax = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""A host's softmax attention: `(B, N, C), (B, M, C), (B, M, C), heads -> (B, N, C)`."""


class Projections(NamedTuple):
    """What a base's own linears made of its tokens, each `(B, N, C)`."""

    q: Tensor
    k: Tensor
    v: Tensor


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """PyTorch's fused attention on `(B, N, C)` tokens."""
    q, k, v = (split_heads(t, heads) for t in (q, k, v))  # (B, h, N or M, d)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


def _normed(tokens: Tensor, heads: int, norm: Norm | None) -> Tensor:
    return tokens if norm is None else norm(tokens.unflatten(-1, (heads, -1))).flatten(2)


class EDiTAttention(nn.Module):
    """Linear compressed attention (EDiT) for one self-attention: the side weights and the function.

    Args:
        dim: channels `C` of the base.
        config: the student's choices.
        layers: where the layers come from.
    """

    def __init__(
        self,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.conv_fusion = ConvFusion(dim, config, layers, device, dtype)
        self.compress_k = SpatialCompressor(dim, config, layers, device, dtype)
        self.compress_v = SpatialCompressor(dim, config, layers, device, dtype)

    def features(
        self, x: Tensor, base: Projections, grid: Grid, heads: int, norm_q: Norm | None, norm_k: Norm | None
    ) -> Projections:
        """Queries `(B, N, C)` and compressed keys and values `(B, M, C)`, normed but not yet rectified."""
        q = _normed(self.conv_fusion(x, base.q, grid), heads, norm_q)  # (B, N, C)
        k = _normed(self.compress_k(base.k, grid), heads, norm_k)  # (B, M, C)
        return Projections(q, k, self.compress_v(base.v, grid))

    def forward(
        self,
        x: Tensor,
        base: Projections,
        grid: Grid,
        heads: int,
        norm_q: Norm | None = None,
        norm_k: Norm | None = None,
    ) -> Tensor:
        """Attention of the image tokens to themselves, before the output projection.

        Args:
            x: the tokens that the projections were made from, `(B, N, C)`.
            base: the base's `q, k, v`, each `(B, N, C)`, before any qk-norm.
            grid: `(H, W)` with `H·W = N`.
            heads: number of heads `h`.
            norm_q: the base's query norm over `(B, N, h, d)`, or None.
            norm_k: the base's key norm, or None.

        Returns:
            `(B, N, C)`.
        """
        q, k, v = self.features(x, base, grid, heads, norm_q, norm_k)
        q, k, v = (split_heads(t, heads) for t in (F.relu(q), F.relu(k), v))  # (B, h, N or M, d)
        return merge_heads(linear_attention(q, k, v, self.config.eps))  # (B, N, C)


class HybridAttention(EDiTAttention):
    """MM-EDiT's hybrid joint attention: linear between image tokens, softmax wherever the prompt takes part.

    `Y_I = η · LinAttn(Q_I, K_I, V_I) + (1-η) · SDPA(Q_I, K_P, V_P)` and
    `Y_P = SDPA(Q_P, [K_I; K_P], [V_I; V_P])`. Source: arXiv 2503.16726, MM-EDiT.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        base: Projections,
        prompt: Projections,
        grid: Grid,
        heads: int,
        norm_q: Norm | None = None,
        norm_k: Norm | None = None,
        softmax: Softmax = softmax_attention,
        prompt_rows: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Joint attention of image and prompt tokens, before the output projections.

        Args:
            x: the image tokens that `base` was made from, `(B, N, C)`.
            base: the base's image projections, each `(B, N, C)`, before any qk-norm.
            prompt: the base's prompt projections, each `(B, P, C)`, after their own qk-norm.
            grid: `(H, W)` with `H·W = N`.
            heads: number of heads `h`.
            norm_q: the base's norm of image queries over `(B, N, h, d)`, or None.
            norm_k: the base's norm of image keys, or None.
            softmax: the host's attention function.
            prompt_rows: False for a block that emits no prompt tokens.

        Returns:
            image rows `(B, N, C)`, and prompt rows `(B, P, C)` or None.
        """
        q, k, v = self.features(x, base, grid, heads, norm_q, norm_k)
        q_lin, k_lin = F.relu(q), F.relu(k)
        if self.config.softmax_features == "post":
            q, k = q_lin, k_lin
        q_heads, k_heads, v_heads = (split_heads(t, heads) for t in (q_lin, k_lin, v))  # (B, h, N or M, d)
        y_lin, z_lin = linear_attention_with_normaliser(q_heads, k_heads, v_heads, self.config.eps)
        if self.config.normaliser == "token_ratio":
            y_soft = softmax(q, prompt.k, prompt.v, heads)  # (B, N, C)
            share = x.shape[1] / (x.shape[1] + prompt.k.shape[1])
            y_image = torch.lerp(y_soft, merge_heads(y_lin), share)  # (B, N, C)
        else:
            y_image = merge_heads(_exact_share(y_lin, z_lin, q, prompt, heads))  # (B, N, C)
        if not prompt_rows:
            return y_image, None
        keys, values = torch.cat([k, prompt.k], 1), torch.cat([v, prompt.v], 1)  # (B, M+P, C)
        return y_image, softmax(prompt.q, keys, values, heads)  # (B, N, C), (B, P, C)


def _exact_share(y_lin: Tensor, z_lin: Tensor, q: Tensor, prompt: Projections, heads: int) -> Tensor:
    """Both branches by the share of their own normalisers; `(B, h, N, d)`.

    Fused attention keeps its normaliser to itself, so the `(B, h, N, P)` logits are written out here.
    """
    q, k, v = (split_heads(t, heads) for t in (q, prompt.k, prompt.v))
    logits = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, h, N, P)
    log_z_soft = logits.logsumexp(-1)  # (B, h, N)
    y_soft = (logits - log_z_soft.unsqueeze(-1)).exp() @ v.float()  # (B, h, N, d)
    share = torch.sigmoid(z_lin.log().transpose(1, 2) - log_z_soft).unsqueeze(-1)  # (B, h, N, 1)
    return torch.lerp(y_soft, y_lin.float(), share).to(y_lin.dtype)


SITES: dict[str, type[EDiTAttention]] = {"self": EDiTAttention, "joint": HybridAttention}
"""The kinds of attention that a block can hold, by the name that weights files use."""

"""EDiT's linear compressed self-attention and MM-EDiT's hybrid joint attention, between a base's projections.

A base model keeps its own linears: it hands in its projections `q, k, v` and gets back what goes into its output
projection. All tokens are `(B, N, C)`; the specifications are in :mod:`edit_core.attention.naive`.

What EDiT (arXiv 2503.16726) is compared with are other choices of the same parts (:class:`~edit_core.EDiTConfig`): the
all-linear attention of SANA (arXiv 2410.10629) and of LinFusion (arXiv 2409.02097), and PixArt-Σ's softmax over
compressed keys and values (arXiv 2403.04692).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import EDiTConfig
from .linear import (
    joint_linear_attention,
    linear_attention,
    linear_attention_with_normaliser,
    merge_heads,
    split_heads,
    without_autocast,
)
from .modules import ConvFusion, Grid, LayerFactory, MLPFusion, SpatialCompressor, as_nchw, as_tokens

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


def one_plus_elu(tokens: Tensor) -> Tensor:
    """`1 + ELU(x)`: `exp(x)` below zero, `1 + x` above; LinFusion's features.

    Written so that half precision keeps what is small: `ELU(x) + 1` would round it against 1. Float32 for float16,
    which would lose what is under 6e-8, and with it rows that have nothing larger.
    """
    tokens = tokens.to(torch.float32 if tokens.dtype == torch.float16 else tokens.dtype)
    return (tokens.clamp(max=0).exp() + F.relu(tokens)).to(tokens.dtype)


def squared_relu(tokens: Tensor) -> Tensor:
    """`ReLU(x)²`, float32 for float16, which would overflow."""
    return F.relu(tokens).to(torch.float32 if tokens.dtype == torch.float16 else tokens.dtype).square()


KERNELS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "squared_relu": squared_relu, "elu": one_plus_elu}
"""What makes features of queries and keys, by the config's name."""


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
        if config.query == "conv_fusion":
            self.conv_fusion = ConvFusion(dim, config, layers, device, dtype)
        elif config.query == "mlp":
            self.mlp_q = MLPFusion(dim, config, layers, device, dtype)
        if config.key == "compressor":
            self.compress_k = SpatialCompressor(dim, config, layers, device, dtype)
            self.compress_v = SpatialCompressor(dim, config, layers, device, dtype)
        elif config.key == "conv_fusion":
            self.conv_fusion_k = ConvFusion(dim, config, layers, device, dtype)
        elif config.key == "mlp":
            self.mlp_k = MLPFusion(dim, config, layers, device, dtype)
        if config.local:
            self.local = layers.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)

    def features(
        self, x: Tensor, base: Projections, grid: Grid, heads: int, norm_q: Norm | None, norm_k: Norm | None
    ) -> Projections:
        """Queries `(B, N, C)`, keys and values `(B, M, C)`, normed but not yet rectified; `M` is `N` uncompressed."""
        q, k, v = base
        if self.config.query == "conv_fusion":
            q = self.conv_fusion(x, q, grid)  # (B, N, C)
        elif self.config.query == "mlp":
            q = self.mlp_q(x, q)  # (B, N, C)
        if self.config.key == "compressor":
            k, v = self.compress_k(k, grid), self.compress_v(v, grid)  # (B, M, C)
        elif self.config.key == "conv_fusion":
            k = self.conv_fusion_k(x, k, grid)  # (B, N, C)
        elif self.config.key == "mlp":
            k = self.mlp_k(x, k)  # (B, N, C)
        return Projections(_normed(q, heads, norm_q), _normed(k, heads, norm_k), v)

    def rectified(self, tokens: Tensor) -> Tensor:
        """Non-negative features of queries or keys, `(B, N, C)`."""
        return KERNELS[self.config.kernel](tokens)

    def with_local(self, y: Tensor, v: Tensor, grid: Grid) -> Tensor:
        """Rows and, where the config asks for it, what a depthwise convolution gathers of the values around them.

        Args:
            y: what attention gives the image tokens, `(B, N, C)`.
            v: the base's values, `(B, N, C)`.
            grid: `(H, W)` with `H·W = N`.
        """
        return y + as_tokens(self.local(as_nchw(v, grid))) if self.config.local else y  # (B, N, C)

    def forward(
        self,
        x: Tensor,
        base: Projections,
        grid: Grid,
        heads: int,
        norm_q: Norm | None = None,
        norm_k: Norm | None = None,
        softmax: Softmax = softmax_attention,
    ) -> Tensor:
        """Attention of the image tokens to themselves, before the output projection.

        Args:
            x: the tokens that the projections were made from, `(B, N, C)`.
            base: the base's `q, k, v`, each `(B, N, C)`, before any qk-norm.
            grid: `(H, W)` with `H·W = N`.
            heads: number of heads `h`.
            norm_q: the base's query norm over `(B, N, h, d)`, or None.
            norm_k: the base's key norm, or None.
            softmax: the host's attention function, for `kernel=softmax`.

        Returns:
            `(B, N, C)`.
        """
        q, k, v = self.features(x, base, grid, heads, norm_q, norm_k)  # (B, N or M, C)
        if self.config.kernel == "softmax":
            return self.with_local(softmax(q, k, v, heads), base.v, grid)  # (B, N, C)
        q, k, v = (split_heads(t, heads) for t in (self.rectified(q), self.rectified(k), v))  # (B, h, N or M, d)
        return self.with_local(merge_heads(linear_attention(q, k, v, self.config.eps)), base.v, grid)  # (B, N, C)


class HybridAttention(EDiTAttention):
    """Joint attention of image and prompt tokens: the side weights and the function.

    - MM-EDiT's hybrid, linear between image tokens and softmax wherever the prompt takes part (arXiv 2503.16726):
      `Y_I = η · LinAttn(Q_I, K_I, V_I) + (1-η) · SDPA(Q_I, K_P, V_P)` and `Y_P = SDPA(Q_P, [K_I; K_P], [V_I; V_P])`.
    - `joint=linear`, SANA's for two kinds of tokens: `LinAttn([Q_I; Q_P], [K_I; K_P], [V_I; V_P])`.
    - `kernel=softmax`, PixArt-Σ's KV compression for two kinds: `SDPA([Q_I; Q_P], [K_I; K_P], [V_I; V_P])`, the image's
      keys and values compressed.
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
        image = self.features(x, base, grid, heads, norm_q, norm_k)  # (B, N or M, C)
        if self.config.kernel == "softmax":
            rows = _softmax_rows(image, prompt, heads, softmax, prompt_rows)
        elif self.config.joint == "linear":
            rows = self._linear_rows(image, prompt, heads, prompt_rows)
        else:
            rows = self._hybrid_rows(image, prompt, heads, softmax, prompt_rows)
        return self.with_local(rows[0], base.v, grid), rows[1]  # (B, N, C), (B, P, C)

    def _hybrid_rows(
        self, image: Projections, prompt: Projections, heads: int, softmax: Softmax, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = image
        q_lin, k_lin = self.rectified(q), self.rectified(k)
        if self.config.softmax_features == "post":
            q, k = q_lin.to(q.dtype), k_lin.to(k.dtype)
        q_heads, k_heads, v_heads = (split_heads(t, heads) for t in (q_lin, k_lin, v))  # (B, h, N or M, d)
        y_lin, z_lin = linear_attention_with_normaliser(q_heads, k_heads, v_heads, self.config.eps)
        if self.config.normaliser == "token_ratio":
            y_soft = softmax(q, prompt.k, prompt.v, heads)  # (B, N, C)
            share = q.shape[1] / (q.shape[1] + prompt.k.shape[1])
            y_image = torch.lerp(y_soft, merge_heads(y_lin), share)  # (B, N, C)
        else:
            y_image = merge_heads(_exact_share(y_lin, z_lin, q, prompt, heads))  # (B, N, C)
        if not prompt_rows:
            return y_image, None
        return y_image, softmax(prompt.q, *_all_keys(k, v, prompt), heads)  # (B, N, C), (B, P, C)

    def _linear_rows(
        self, image: Projections, prompt: Projections, heads: int, prompt_rows: bool
    ) -> tuple[Tensor, Tensor | None]:
        both = (image, prompt)
        wanted = both if prompt_rows else (image,)
        queries = [split_heads(self.rectified(kind.q), heads) for kind in wanted]  # (B, h, N, d), (B, h, P, d)
        keys_values = [(split_heads(self.rectified(kind.k), heads), split_heads(kind.v, heads)) for kind in both]
        rows = [merge_heads(y) for y in joint_linear_attention(queries, keys_values, self.config.eps)]
        return rows[0], rows[1] if prompt_rows else None  # (B, N, C), (B, P, C)


def _softmax_rows(
    image: Projections, prompt: Projections, heads: int, softmax: Softmax, prompt_rows: bool
) -> tuple[Tensor, Tensor | None]:
    keys, values = _all_keys(image.k, image.v, prompt)  # (B, M+P, C)
    # Two calls: the teacher's one would copy the image's queries to put the prompt's behind them.
    y_image = softmax(image.q, keys, values, heads)  # (B, N, C)
    return y_image, softmax(prompt.q, keys, values, heads) if prompt_rows else None  # (B, N, C), (B, P, C)


def _all_keys(k: Tensor, v: Tensor, prompt: Projections) -> tuple[Tensor, Tensor]:
    """The image's keys and values and the prompt's, `(B, M+P, C)`."""
    return torch.cat([k, prompt.k], 1), torch.cat([v, prompt.v], 1)


def _exact_share(y_lin: Tensor, z_lin: Tensor, q: Tensor, prompt: Projections, heads: int) -> Tensor:
    """Both branches by the share of their own normalisers; `(B, h, N, d)`.

    Fused attention keeps its normaliser to itself, so the `(B, h, N, P)` logits are written out here, in the dtype of
    `z_lin`, at least float32.
    """
    q, k, v = (split_heads(t, heads).to(z_lin.dtype) for t in (q, prompt.k, prompt.v))
    with without_autocast(q.device):
        logits = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, h, N, P)
        log_z_soft = logits.logsumexp(-1)  # (B, h, N)
        y_soft = (logits - log_z_soft.unsqueeze(-1)).exp() @ v  # (B, h, N, d)
        share = torch.sigmoid(z_lin.log().transpose(1, 2) - log_z_soft).unsqueeze(-1)  # (B, h, N, 1)
        return torch.lerp(y_soft, y_lin.to(z_lin.dtype), share).to(y_lin.dtype)


SITES: dict[str, type[EDiTAttention]] = {"self": EDiTAttention, "joint": HybridAttention}
"""The kinds of attention that a block can hold, by the name that weights files use."""

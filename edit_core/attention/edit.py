"""EDiT's linear compressed self-attention and MM-EDiT's hybrid joint attention, between a base's projections.

A base model keeps its own linears: it hands in its projections `q, k, v` and gets back what goes into its output
projection. All tokens are `(B, N, C)`; the specifications are in :mod:`edit_core.attention.naive`.

What EDiT (arXiv 2503.16726) is compared with are other choices of the same parts (:class:`~edit_core.EDiTConfig`): the
all-linear attention of SANA (arXiv 2410.10629) and of LinFusion (arXiv 2409.02097), and PixArt-Σ's softmax over
compressed keys and values (arXiv 2403.04692).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import KEY_PARTS, QUERY_PARTS, EDiTConfig
from .linear import merge_heads, read, split_heads, state, without_autocast
from .modules import ConvFusion, Grid, LayerFactory, MLPFusion, SpatialCompressor, as_nchw, as_tokens
from .slices import by_bands, joined, slices, written

__all__ = ["SITES", "EDiTAttention", "HybridAttention", "Norm", "Projections", "Softmax", "softmax_attention"]

Norm = Callable[[Tensor], Tensor]
"""A base's qk-norm, over the last dimension of `(B, N, h, d)`."""
Softmax = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""A host's softmax attention: `(B, N, C), (B, M, C), (B, M, C), heads -> (B, N, C)`."""
Rows = Callable[[slice], Tensor]
"""What is computed of a slice of the tokens, `(B, n, C)`; see :mod:`edit_core.attention.slices`."""
ALL = slice(None)


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


def _part(tokens: Tensor, part: slice) -> Tensor:
    return tokens[:, part]


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
        if config.query in ("conv_fusion", "separable"):
            self.conv_fusion = ConvFusion(dim, config, layers, device, dtype, config.query == "separable")
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
        keys, v = self._keys(x, base, grid, heads, norm_k)
        return Projections(self._queries(x, base, grid, heads, norm_q)(ALL), keys(ALL), v)

    def _queries(self, x: Tensor, base: Projections, grid: Grid, heads: int, norm: Norm | None) -> Rows:
        """Normed queries, by slices of the tokens."""
        return self._rows(QUERY_PARTS.get(self.config.query), x, base.q, grid, heads, norm)

    def _keys(self, x: Tensor, base: Projections, grid: Grid, heads: int, norm: Norm | None) -> tuple[Rows, Tensor]:
        """Normed keys by slices of them, and the values `(B, M, C)`."""
        k, v = base.k, base.v
        if self.config.key == "compressor":
            k, v = self.compress_k(k, grid), self.compress_v(v, grid)  # (B, M, C)
        return self._rows(KEY_PARTS.get(self.config.key), x, k, grid, heads, norm), v

    def _rows(self, fusion: str | None, x: Tensor, tokens: Tensor, grid: Grid, heads: int, norm: Norm | None) -> Rows:
        """Queries or keys: what the base projected, with what a fusion adds to it, normed."""
        if fusion is None:
            return lambda part: _normed(_part(tokens, part), heads, norm)
        module = getattr(self, fusion)
        if isinstance(module, ConvFusion) and module.has_kernel(x, tokens):
            fused = module(x, tokens, grid)  # (B, N, C)
            return lambda part: _normed(_part(fused, part), heads, norm)
        gathered = module.gather(x, grid)  # (B, N, C/r) or (B, N, C)
        return lambda part: _normed(module.add(_part(gathered, part), _part(tokens, part)), heads, norm)

    def rectified(self, tokens: Tensor) -> Tensor:
        """Non-negative features of queries or keys, `(B, N, C)`."""
        return KERNELS[self.config.kernel](tokens)

    def _rectified(self, rows: Rows, dtype: torch.dtype, part: slice) -> Tensor:
        return self.rectified(rows(part)).to(dtype)

    def _has_kernels(self, base: Projections) -> bool:
        return self.config.kernel != "softmax" and kernels.chosen("linear", *base)

    def _local(self, v: Tensor, grid: Grid) -> Tensor | None:
        """What a depthwise convolution gathers of the values around each token, if the config asks: `(B, N, C)`."""
        return as_tokens(by_bands(self.local, as_nchw(v, grid), 1)) if self.config.local else None

    def _with_local(self, y: Tensor, v: Tensor, grid: Grid) -> Tensor:
        local = self._local(v, grid)
        return y if local is None else local.add_(y)  # (B, N, C)

    def _state(self, keys: Rows, v: Tensor, heads: int) -> Tensor:
        """What linear attention keeps of normed keys and of values `(B, M, C)`: `(B, h, d, d+1)`."""
        return state(
            (split_heads(self.rectified(keys(part)), heads), split_heads(_part(v, part), heads)) for part in slices(v)
        )

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
        if self._has_kernels(base):
            from ..kernels.attention import image_rows

            return image_rows(self, x, base, grid, heads, norm_q, norm_k)
        if self.config.kernel == "softmax":
            q, k, v = self.features(x, base, grid, heads, norm_q, norm_k)  # (B, N or M, C)
            return self._with_local(softmax(q, k, v, heads), base.v, grid)  # (B, N, C)
        keys, v = self._keys(x, base, grid, heads, norm_k)
        of_keys, dtype = self._state(keys, v, heads), v.dtype  # (B, h, d, d+1)
        del keys, v  # what a compressor made has served
        queries = self._queries(x, base, grid, heads, norm_q)

        def rows(part: slice) -> Tensor:
            q = split_heads(self.rectified(queries(part)), heads)  # (B, h, n, d)
            return merge_heads(read(q, of_keys, self.config.eps, dtype)[0])  # (B, n, C)

        return written(rows, self._local(base.v, grid), base.v)  # (B, N, C)


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
        if self.config.normaliser == "token_ratio" and self._has_kernels(base):
            from ..kernels.attention import joint_rows

            return joint_rows(self, x, base, prompt, grid, heads, norm_q, norm_k, softmax, prompt_rows)
        if self.config.kernel == "softmax":
            image = self.features(x, base, grid, heads, norm_q, norm_k)  # (B, N or M, C)
            y_image, y_prompt = _softmax_rows(image, prompt, heads, softmax, prompt_rows)
            return self._with_local(y_image, base.v, grid), y_prompt  # (B, N, C), (B, P, C)
        keys, v = self._keys(x, base, grid, heads, norm_k)
        queries = partial(self._queries, x, base, grid, heads, norm_q)  # not before the keys have served
        if self.config.joint == "linear":
            rows, y_prompt = self._linear_rows(queries, keys, v, prompt, heads, prompt_rows)
        else:
            share = x.shape[1] / (x.shape[1] + prompt.k.shape[1])
            rows, y_prompt = self._hybrid_rows(queries, keys, v, prompt, heads, softmax, prompt_rows, share)
        del keys, v  # what a compressor made has served
        return written(rows, self._local(base.v, grid), base.v), y_prompt  # (B, N, C), (B, P, C)

    def _hybrid_rows(
        self,
        queries: Callable[[], Rows],
        keys: Rows,
        v: Tensor,
        prompt: Projections,
        heads: int,
        softmax: Softmax,
        prompt_rows: bool,
        share: float,
    ) -> tuple[Rows, Tensor | None]:
        post, eps = self.config.softmax_features == "post", self.config.eps
        y_prompt = None
        if prompt_rows:  # nothing else needs all the image's keys at once
            seen = partial(self._rectified, keys, v.dtype) if post else keys
            k = joined(seen, v, prompt.k)  # (B, N+P or M+P, C)
            if not post:
                keys = partial(_part, k[:, : v.shape[1]])
            y_prompt = softmax(prompt.q, k, torch.cat([v, prompt.v], 1), heads)  # (B, P, C)
        of_keys = self._state(keys, v, heads)  # (B, h, d, d+1)
        find, dtype = queries(), v.dtype

        def rows(part: slice) -> Tensor:
            q = find(part)  # (B, n, C)
            q_lin = self.rectified(q)
            y_lin, z_lin = read(split_heads(q_lin, heads), of_keys, eps, dtype)
            if post:
                q = q_lin.to(q.dtype)
            if self.config.normaliser == "exact":
                return merge_heads(_exact_share(y_lin, z_lin, q, prompt, heads))  # (B, n, C)
            return merge_heads(y_lin).lerp_(softmax(q, prompt.k, prompt.v, heads), 1 - share)  # (B, n, C)

        return rows, y_prompt

    def _linear_rows(
        self,
        queries: Callable[[], Rows],
        keys: Rows,
        v: Tensor,
        prompt: Projections,
        heads: int,
        prompt_rows: bool,
    ) -> tuple[Rows, Tensor | None]:
        k_p = split_heads(self.rectified(prompt.k), heads)  # (B, h, P, d)
        of_keys = self._state(keys, v, heads) + state([(k_p, split_heads(prompt.v, heads))])  # (B, h, d, d+1)
        find, dtype = queries(), v.dtype

        def rows_of(q: Tensor) -> Tensor:
            q = split_heads(self.rectified(q), heads)  # (B, h, n or P, d)
            return merge_heads(read(q, of_keys, self.config.eps, dtype)[0])  # (B, n or P, C)

        return lambda part: rows_of(find(part)), rows_of(prompt.q) if prompt_rows else None


def _softmax_rows(
    image: Projections, prompt: Projections, heads: int, softmax: Softmax, prompt_rows: bool
) -> tuple[Tensor, Tensor | None]:
    keys, values = torch.cat([image.k, prompt.k], 1), torch.cat([image.v, prompt.v], 1)  # (B, M+P, C)
    # Two calls: the teacher's one would copy the image's queries to put the prompt's behind them.
    y_image = softmax(image.q, keys, values, heads)  # (B, N, C)
    return y_image, softmax(prompt.q, keys, values, heads) if prompt_rows else None  # (B, N, C), (B, P, C)


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

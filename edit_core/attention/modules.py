"""The side modules: ConvFusion or MLPFusion enrich queries or keys, SpatialCompressor gathers the keys and values.

Tokens `(B, N, C)` over an `(H, W)` grid are NHWC memory: the convolutions run on channels-last views of them.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..config import EDiTConfig
from .slices import by_bands

__all__ = ["ConvFusion", "Grid", "LayerFactory", "MLPFusion", "SpatialCompressor", "as_nchw", "as_tokens"]

Grid = tuple[int, int]


class LayerFactory(Protocol):
    """Where layers come from: `torch.nn`, or a host's own namespace (ComfyUI's casts weights to the input's dtype)."""

    Linear: Any
    Conv2d: Any
    GroupNorm: Any
    LayerNorm: Any


def as_nchw(tokens: Tensor, grid: Grid) -> Tensor:
    """`(B, N, C)` -> `(B, C, H, W)`, a channels-last view."""
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


def as_tokens(image: Tensor) -> Tensor:
    """`(B, C, H, W)` in channels-last memory -> `(B, N, C)`, a view."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def depthwise(conv: Any, tokens: Tensor, grid: Grid, like: Tensor, stride: int = 1) -> Tensor:
    """A depthwise 3x3 convolution of tokens `(B, N, C')`, as a kernel where that was measured to win: `(B, M, C')`.

    Args:
        like: tokens `(B, N, C)` of the base's width, for which kernels are measured.
    """
    if kernels.chosen("depthwise", like, tokens, conv.weight):
        from ..kernels.attention import compressed

        return compressed(conv, tokens, grid)
    return as_tokens(by_bands(conv, as_nchw(tokens, grid), stride))


class ConvFusion(nn.Module):
    """Adds what a token's neighbours know to its query (or, in an ablation of the paper, to its key).

    `q + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(x))))`: the paper's ConvFusion with its 1x1 convolution moved behind the
    base model's query projection, `Linear(X + Conv1x1(u)) = q + (W·W_up) u + W·b_up`, so that the base keeps its own
    linear. Source: arXiv 2503.16726; the order of operations (and the equal function) is ours.

    Args:
        dim: channels `C`.
        config: for the bottleneck and the norm's groups.
        separable: `DepthwiseConv3x3(Linear(x))` for `Conv3x3(x)`, whose nine taps over all channels are more than half
            of what a linear attention costs at the paper's sizes (ours).
    """

    def __init__(
        self,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        separable: bool = False,
    ) -> None:
        super().__init__()
        hidden = config.hidden(dim)
        self.separable = separable
        if separable:
            self.down = layers.Linear(dim, hidden, device=device, dtype=dtype)
            self.around = layers.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, device=device, dtype=dtype)
        else:
            self.down = layers.Conv2d(dim, hidden, 3, padding=1, device=device, dtype=dtype)
        self.norm = layers.GroupNorm(math.gcd(config.groups, hidden), hidden, device=device, dtype=dtype)
        self.up = layers.Linear(hidden, dim, device=device, dtype=dtype)  # a 1x1 convolution over tokens

    def convolved(self, x: Tensor, grid: Grid) -> Tensor:
        """The 3x3 convolution of tokens `(B, N, C)`, dense or separable: `(B, N, C/r)`."""
        if self.separable:
            return depthwise(self.around, self.down(x), grid, x)  # (B, N, C/r)
        return as_tokens(self.down(as_nchw(x, grid)))  # (B, N, C/r)

    def gather(self, x: Tensor, grid: Grid) -> Tensor:
        """What takes a token's neighbours, or all of them, to know: `(B, N, C/r)` of tokens `(B, N, C)`."""
        u = as_nchw(self.convolved(x, grid), grid)  # (B, C/r, H, W)
        return as_tokens(F.leaky_relu(self.norm(u)))  # (B, N, C/r)

    def add(self, gathered: Tensor, q: Tensor) -> Tensor:
        """Tokens `(B, n, C)` with what was gathered for them, `(B, n, C/r)`."""
        return self.up(gathered).add_(q)  # (B, n, C)

    def has_kernel(self, x: Tensor, q: Tensor) -> bool:
        """Whether all behind the 3x3 convolution runs as one kernel, which takes all tokens at once."""
        return kernels.chosen("conv_fusion", x, q, self.norm.weight, self.up.weight)

    def forward(self, x: Tensor, q: Tensor, grid: Grid) -> Tensor:
        if self.has_kernel(x, q):
            from ..kernels.attention import fused_queries

            return fused_queries(self, x, q, grid)
        return self.add(self.gather(x, grid), q)  # (B, N, C)


class MLPFusion(nn.Module):
    """LinFusion's counterpart of ConvFusion: `q + Linear(LeakyReLU(LayerNorm(Linear(x))))`, for queries and for keys.

    Source: arXiv 2409.02097, whose last linear stands in front of the base model's projection; it is moved behind it as
    :class:`ConvFusion`'s is.
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
        hidden = config.hidden(dim)
        self.down = layers.Linear(dim, hidden, device=device, dtype=dtype)
        self.norm = layers.LayerNorm(hidden, device=device, dtype=dtype)
        self.up = layers.Linear(hidden, dim, device=device, dtype=dtype)

    def gather(self, x: Tensor, grid: Grid) -> Tensor:
        """As :meth:`ConvFusion.gather`; here a token knows nothing but itself."""
        return x  # (B, N, C)

    def add(self, gathered: Tensor, q: Tensor) -> Tensor:
        """Tokens `(B, n, C)` with what their inputs `(B, n, C)` give them."""
        u = F.leaky_relu(self.norm(self.down(gathered)))  # (B, n, C/r)
        return self.up(u).add_(q)  # (B, n, C)

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        return self.add(x, q)  # (B, N, C)


class SpatialCompressor(nn.Module):
    """A depthwise 3x3 convolution with a stride: `(B, N, C)` keys or values -> `(B, ceil(H/s)·ceil(W/s), C)`.

    Source: arXiv 2503.16726; the linear in front of it is the base model's own projection. KV compression
    (`kernel=softmax`) compresses with it too, where PixArt-Σ's own code (arXiv 2403.04692) has one convolution without
    overlap for keys and values both, and a LayerNorm behind it.
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
        self.stride = config.kv_stride
        self.conv = layers.Conv2d(
            dim, dim, 3, stride=config.kv_stride, padding=1, groups=dim, device=device, dtype=dtype
        )

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        return depthwise(self.conv, tokens, grid, tokens, self.stride)  # (B, M, C)

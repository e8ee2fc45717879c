"""The side modules: ConvFusion or MLPFusion enrich queries or keys, SpatialCompressor gathers the keys and values.

Tokens `(B, N, C)` over an `(H, W)` grid are NHWC memory: the convolutions run on channels-last views of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from .call import Grid
from .slices import by_bands

if TYPE_CHECKING:
    from ..config import EDiTConfig

__all__ = [
    "ConvFusion",
    "Fusion",
    "LayerFactory",
    "LocalBranch",
    "MLPFusion",
    "Part",
    "Parts",
    "SeparableFusion",
    "SpatialCompressor",
    "as_nchw",
    "as_tokens",
]

Shapes = Mapping[str, tuple[int, ...]]


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
        from ..kernels.depthwise import depthwise as kernel

        return kernel(tokens, grid, conv.weight, conv.bias, conv.stride[0])
    return as_tokens(by_bands(conv, as_nchw(tokens, grid), stride))


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    bound = math.sqrt(6 / math.prod(shape[1:]))  # He initialisation for a ReLU-like activation
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


class Part:
    """A kind of side module: how it is made, what a new student's holds, and which tensor tells the base's width."""

    reads: ClassVar[frozenset[str]] = frozenset()
    """The config's fields that it is made from."""
    tells: ClassVar[str]
    """A tensor whose first size is the base's channels `C`."""

    @classmethod
    def make(
        cls,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """One for a base of width `dim`, unfilled."""
        raise NotImplementedError

    @classmethod
    def initial(cls, shapes: Shapes, config: EDiTConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """A new student's tensors, float32, by their names in the module; zeros unless a kind says otherwise."""
        return {name: torch.zeros(shape) for name, shape in shapes.items()}

    @classmethod
    def complaint(cls, sizes: tuple[int, int], config: EDiTConfig) -> str | None:
        """What the first two sizes of `tells` have against the config, where it could not be made as they say."""
        return None


Parts = Mapping[str, type[Part]]
"""Kinds of side modules by the names that weights files give them."""


class _Module(nn.Module, Part):
    """A side module that is made by its own constructor."""

    def __init__(
        self,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()

    @classmethod
    def make(
        cls,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        return cls(dim, config, layers, device, dtype)


class Fusion(_Module):
    """What is added to queries or keys through a bottleneck, whose last linear starts at zero."""

    reads = frozenset({"compression"})
    tells = "up.weight"
    norm: Any
    up: Any

    @classmethod
    def initial(cls, shapes: Shapes, config: EDiTConfig, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = {name: _random(shapes[name], generator) for name in ("down.weight", "around.weight") if name in shapes}
        ones = {"norm.weight": torch.ones(shapes["norm.weight"])}
        return super().initial(shapes, config, generator) | drawn | ones

    @classmethod
    def complaint(cls, sizes: tuple[int, int], config: EDiTConfig) -> str | None:
        dim, hidden = sizes
        if dim == hidden * config.compression:
            return None
        return f"compression={config.compression} asks for {dim}x{dim // config.compression}"

    def gather(self, x: Tensor, grid: Grid) -> Tensor:
        """What takes a token's neighbours, or all of them, to know: `(B, N, C/r)` or `(B, N, C)` of `(B, N, C)`."""
        raise NotImplementedError

    def add(self, gathered: Tensor, q: Tensor) -> Tensor:
        """Tokens `(B, n, C)` with what was gathered for them, `(B, n, C/r)` or `(B, n, C)`."""
        raise NotImplementedError

    def by_kernels(self, x: Tensor, q: Tensor, grid: Grid) -> Tensor | None:
        """All of it for all tokens `(B, N, C)`, where that is one kernel's; else None."""
        return None


class ConvFusion(Fusion):
    """Adds what a token's neighbours know to its query (or, in an ablation of the paper, to its key).

    `q + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(x))))`: the paper's ConvFusion with its 1x1 convolution moved behind the
    base model's query projection, `Linear(X + Conv1x1(u)) = q + (W·W_up) u + W·b_up`, so that the base keeps its own
    linear. Source: arXiv 2503.16726; the order of operations (and the equal function) is ours.

    Args:
        dim: channels `C`.
        config: for the bottleneck and the norm's groups.
    """

    reads = frozenset({"compression", "groups"})
    down: Any

    def __init__(
        self,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, config, layers, device, dtype)
        hidden = config.hidden(dim)
        self._make_convolution(dim, hidden, layers, device, dtype)
        self.norm = layers.GroupNorm(math.gcd(config.groups, hidden), hidden, device=device, dtype=dtype)
        self.up = layers.Linear(hidden, dim, device=device, dtype=dtype)  # a 1x1 convolution over tokens

    def _make_convolution(
        self, dim: int, hidden: int, layers: LayerFactory, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        self.down = layers.Conv2d(dim, hidden, 3, padding=1, device=device, dtype=dtype)

    def convolved(self, x: Tensor, grid: Grid) -> Tensor:
        """The 3x3 convolution of tokens `(B, N, C)`: `(B, N, C/r)`."""
        return as_tokens(self.down(as_nchw(x, grid)))  # (B, N, C/r)

    def gather(self, x: Tensor, grid: Grid) -> Tensor:
        u = as_nchw(self.convolved(x, grid), grid)  # (B, C/r, H, W)
        return as_tokens(F.leaky_relu(self.norm(u)))  # (B, N, C/r)

    def add(self, gathered: Tensor, q: Tensor) -> Tensor:
        return self.up(gathered).add_(q)  # (B, n, C)

    def by_kernels(self, x: Tensor, q: Tensor, grid: Grid) -> Tensor | None:
        """All behind the 3x3 convolution is one kernel, which takes all tokens at once."""
        norm, up = self.norm, self.up
        if not kernels.chosen("conv_fusion", x, q, norm.weight, up.weight):
            return None
        from ..kernels.conv_fusion import conv_fusion

        tokens = self.convolved(x, grid)  # (B, N, C/r)
        return conv_fusion(tokens, q, norm.weight, norm.bias, norm.num_groups, norm.eps, up.weight, up.bias)

    def forward(self, x: Tensor, q: Tensor, grid: Grid) -> Tensor:
        fused = self.by_kernels(x, q, grid)
        return self.add(self.gather(x, grid), q) if fused is None else fused  # (B, N, C)


class SeparableFusion(ConvFusion):
    """ConvFusion with `DepthwiseConv3x3(Linear(x))` for `Conv3x3(x)` (ours).

    The nine taps over all channels are more than half of what a linear attention costs at the paper's sizes.
    """

    around: Any

    def _make_convolution(
        self, dim: int, hidden: int, layers: LayerFactory, device: torch.device | None, dtype: torch.dtype | None
    ) -> None:
        self.down = layers.Linear(dim, hidden, device=device, dtype=dtype)
        self.around = layers.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, device=device, dtype=dtype)

    def convolved(self, x: Tensor, grid: Grid) -> Tensor:
        return depthwise(self.around, self.down(x), grid, x)  # (B, N, C/r)


class MLPFusion(Fusion):
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
        super().__init__(dim, config, layers, device, dtype)
        hidden = config.hidden(dim)
        self.down = layers.Linear(dim, hidden, device=device, dtype=dtype)
        self.norm = layers.LayerNorm(hidden, device=device, dtype=dtype)
        self.up = layers.Linear(hidden, dim, device=device, dtype=dtype)

    def gather(self, x: Tensor, grid: Grid) -> Tensor:
        return x  # (B, N, C); here a token knows nothing but itself

    def add(self, gathered: Tensor, q: Tensor) -> Tensor:
        u = F.leaky_relu(self.norm(self.down(gathered)))  # (B, n, C/r)
        return self.up(u).add_(q)  # (B, n, C)

    def forward(self, x: Tensor, q: Tensor) -> Tensor:
        return self.add(x, q)  # (B, N, C)


class SpatialCompressor(_Module):
    """A depthwise 3x3 convolution with a stride: `(B, N, C)` keys or values -> `(B, ceil(H/s)·ceil(W/s), C)`.

    Source: arXiv 2503.16726; the linear in front of it is the base model's own projection. KV compression
    (`kernel=softmax`) compresses with it too, where PixArt-Σ's own code (arXiv 2403.04692) has one convolution without
    overlap for keys and values both, and a LayerNorm behind it.
    """

    reads = frozenset({"kv_stride"})
    tells = "conv.weight"

    def __init__(
        self,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, config, layers, device, dtype)
        self.stride = config.kv_stride
        self.conv = layers.Conv2d(
            dim, dim, 3, stride=config.kv_stride, padding=1, groups=dim, device=device, dtype=dtype
        )

    @classmethod
    def initial(cls, shapes: Shapes, config: EDiTConfig, generator: torch.Generator) -> dict[str, Tensor]:
        """The 3x3 binomial low-pass; without a stride, the identity."""
        row = torch.tensor([0.0, 1.0, 0.0] if config.kv_stride == 1 else [0.25, 0.5, 0.25])
        weight = torch.outer(row, row).expand(shapes["conv.weight"]).clone()
        return super().initial(shapes, config, generator) | {"conv.weight": weight}

    def forward(self, tokens: Tensor, grid: Grid) -> Tensor:
        return depthwise(self.conv, tokens, grid, tokens, self.stride)  # (B, M, C)


class LocalBranch(Part):
    """What a depthwise 3x3 convolution gathers of the values around each token (ours); it starts at zero."""

    tells = "weight"

    @classmethod
    def make(
        cls,
        dim: int,
        config: EDiTConfig,
        layers: LayerFactory = nn,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> nn.Module:
        conv: nn.Module = layers.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        return conv

    @staticmethod
    def rows(conv: nn.Module, v: Tensor, grid: Grid) -> Tensor:
        """Of the base's values `(B, N, C)`, which stay as they are: `(B, N, C)`, its own memory."""
        return as_tokens(by_bands(conv, as_nchw(v, grid), 1))

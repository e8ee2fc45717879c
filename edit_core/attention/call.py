"""What a call of an attention brings along, and what is computed of it by slices of the tokens."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .linear import merge_heads, split_heads

__all__ = [
    "ALL",
    "Grid",
    "Image",
    "Norm",
    "PlacedNorm",
    "Places",
    "Projections",
    "Rows",
    "Sides",
    "Softmax",
    "normed",
    "of_part",
    "softmax_attention",
]

Grid = tuple[int, int]
Softmax = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""A host's softmax attention: `(B, N, C), (B, M, C), (B, M, C), heads -> (B, N, C)`."""
Rows = Callable[[slice], Tensor]
"""What is computed of a slice of the tokens, `(B, n, C)`; see :mod:`edit_core.attention.slices`."""
Sides = Any
"""The module that holds an attention's side modules by their names."""
ALL = slice(None)


class Projections(NamedTuple):
    """What a base's own linears made of its tokens, each `(B, N, C)`."""

    q: Tensor
    k: Tensor
    v: Tensor


class Places(NamedTuple):
    """Where tokens lie: on a grid that has every so many rows and columns of the picture's."""

    grid: Grid
    stride: int = 1

    def of(self, part: slice, device: torch.device) -> Tensor:
        """Rows and columns of some of the tokens, in the picture's grid: `(n, 2)`, int64."""
        token = torch.arange(self.grid[0] * self.grid[1], device=device)[part]
        return self.stride * torch.stack((token // self.grid[1], token % self.grid[1]), -1)


class PlacedNorm(ABC):
    """A base's qk-norm that also turns queries or keys by where they lie, as rotary embeddings do."""

    @abstractmethod
    def placed(self, tokens: Tensor, places: Tensor) -> Tensor:
        """Tokens `(B, n, h, d)` normed and turned, with their rows and columns in the picture's grid, `(n, 2)`."""


Norm = Callable[[Tensor], Tensor] | PlacedNorm
"""A base's qk-norm, over the last dimension of `(B, N, h, d)`; one that asks for it is told the tokens' places."""


class Image(NamedTuple):
    """The image's side of one call, as :meth:`.EDiTAttention.forward` takes it."""

    x: Tensor
    base: Projections
    grid: Grid
    heads: int
    norm_q: Norm | None
    norm_k: Norm | None
    softmax: Softmax
    mask: Tensor | None = None


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """PyTorch's fused attention on `(B, N, C)` tokens."""
    q, k, v = (split_heads(t, heads) for t in (q, k, v))  # (B, h, N or M, d)
    return merge_heads(F.scaled_dot_product_attention(q, k, v))


def of_part(tokens: Tensor, part: slice) -> Tensor:
    """Some of the tokens `(B, N, C)`, a view."""
    return tokens[:, part]


def normed(tokens: Tensor, part: slice, places: Places, heads: int, norm: Norm | None) -> Tensor:
    """The tokens `(B, n, C)` of a slice, by a base's qk-norm if there is one."""
    if norm is None:
        return tokens
    split = tokens.unflatten(-1, (heads, -1))  # (B, n, h, d)
    if isinstance(norm, PlacedNorm):
        return norm.placed(split, places.of(part, tokens.device)).flatten(2)
    return norm(split).flatten(2)

"""The forms' rows with Triton kernels for their parts; forms come here where kernels are chosen.

No gradients. What is not a kernel's (the host's softmax, qk-norms, the 3x3 convolution) is called as elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import chosen
from ..kernels.read import Local, read
from ..kernels.state import state
from .call import Image, Projections, Sides
from .modules import LocalBranch

if TYPE_CHECKING:
    from ..config import EDiTConfig

__all__ = ["hybrid_rows", "linear_rows", "self_rows"]


def self_rows(sides: Sides, config: EDiTConfig, image: Image, features: Projections) -> Tensor:
    """What :meth:`.forms.LinearForm.self_rows` computes, of unrectified features: `(B, N, C)`."""
    q, k, v = features
    return _rows(sides, config, image, q, state(k, v, image.heads, config.kernel))


def linear_rows(
    sides: Sides, config: EDiTConfig, image: Image, features: Projections, prompt: Projections, prompt_rows: bool
) -> tuple[Tensor, Tensor | None]:
    """What :meth:`.joint.AllLinear.rows` computes, of unrectified features: `(B, N, C)`, `(B, P, C)`."""
    q, k, v = features
    of_keys = state(k, v, image.heads, config.kernel)  # (B, h, d, d+1)
    of_keys += state(prompt.k, prompt.v, image.heads, config.kernel)
    y_prompt = read(prompt.q, of_keys, config.kernel, config.eps, v.dtype) if prompt_rows else None
    return _rows(sides, config, image, q, of_keys), y_prompt


def hybrid_rows(
    sides: Sides,
    config: EDiTConfig,
    image: Image,
    features: Projections,
    prompt: Projections,
    seen: Callable[[Tensor], Tensor],
    share: float,
    prompt_rows: bool,
) -> tuple[Tensor, Tensor | None]:
    """What :meth:`.joint.Hybrid.rows` computes with `normaliser=token_ratio`: `(B, N, C)`, `(B, P, C)`.

    Args:
        features: unrectified queries, keys and values.
        seen: what the softmax branches see of queries and keys.
        share: of the image among all tokens.
    """
    q, k, v = features
    of_keys = state(k, v, image.heads, config.kernel)  # (B, h, d, d+1)
    soft = image.softmax(seen(q), prompt.k, prompt.v, image.heads)  # (B, N, C)
    y = _rows(sides, config, image, q, of_keys, soft, share)
    if not prompt_rows:
        return y, None
    keys, values = torch.cat([seen(k), prompt.k], 1), torch.cat([v, prompt.v], 1)  # (B, M+P, C)
    return y, image.softmax(prompt.q, keys, values, image.heads)


def _rows(
    sides: Sides,
    config: EDiTConfig,
    image: Image,
    q: Tensor,
    of_keys: Tensor,
    soft: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    """The image's rows with the local branch, if the config asks for one."""
    v, local = image.base.v, None
    fused = config.local and chosen("linear", v, sides.local.weight, sides.local.bias)
    if fused:
        local = Local(v, sides.local.weight, sides.local.bias, image.grid)
    y = read(q, of_keys, config.kernel, config.eps, v.dtype, soft, share, local)
    if config.local and not fused:  # the host keeps its weights elsewhere, or in another dtype
        y += LocalBranch.rows(sides.local, v, image.grid)
    return y

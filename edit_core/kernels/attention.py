"""EDiT's attentions and side modules with their parts as kernels; the modules come here where a part is chosen.

No gradients. What is not a kernel's (the host's softmax, qk-norms, the 3x3 convolution) is called as elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .choice import chosen
from .conv_fusion import conv_fusion
from .depthwise import depthwise
from .read import Local, read
from .state import state

if TYPE_CHECKING:
    from ..attention.edit import EDiTAttention, Projections, Softmax
    from ..attention.modules import ConvFusion, Grid

__all__ = ["compressed", "fused_queries", "image_rows", "joint_rows"]


def image_rows(
    side: EDiTAttention, x: Tensor, base: Projections, grid: Grid, heads: int, norm_q: Any, norm_k: Any
) -> Tensor:
    """What :meth:`EDiTAttention.forward` computes, with the same arguments: `(B, N, C)`."""
    q, k, v = side.features(x, base, grid, heads, norm_q, norm_k)  # (B, N or M, C)
    return _image(side, q, state(k, v, heads, side.config.kernel), base.v, grid)


def joint_rows(
    side: EDiTAttention,
    x: Tensor,
    base: Projections,
    prompt: Projections,
    grid: Grid,
    heads: int,
    norm_q: Any,
    norm_k: Any,
    softmax: Softmax,
    prompt_rows: bool,
) -> tuple[Tensor, Tensor | None]:
    """What :meth:`HybridAttention.forward` computes with `normaliser=token_ratio`, with the same arguments."""
    config = side.config
    q, k, v = side.features(x, base, grid, heads, norm_q, norm_k)  # (B, N or M, C)
    of_keys = state(k, v, heads, config.kernel)  # (B, h, d, d+1)
    if config.joint == "linear":
        of_keys += state(prompt.k, prompt.v, heads, config.kernel)
        y_prompt = read(prompt.q, of_keys, config.kernel, config.eps, v.dtype) if prompt_rows else None
        return _image(side, q, of_keys, base.v, grid), y_prompt  # (B, N, C), (B, P, C)
    q_soft, k_soft = (side.rectified(q), side.rectified(k)) if config.softmax_features == "post" else (q, k)
    share = q.shape[1] / (q.shape[1] + prompt.k.shape[1])
    y = _image(side, q, of_keys, base.v, grid, softmax(q_soft, prompt.k, prompt.v, heads), share)
    if not prompt_rows:
        return y, None
    keys, values = torch.cat([k_soft, prompt.k], 1), torch.cat([v, prompt.v], 1)  # (B, M+P, C)
    return y, softmax(prompt.q, keys, values, heads)  # (B, N, C), (B, P, C)


def _image(
    side: EDiTAttention,
    q: Tensor,
    of_keys: Tensor,
    v: Tensor,
    grid: Grid,
    soft: Tensor | None = None,
    share: float = 1.0,
) -> Tensor:
    config, local = side.config, None
    fused = config.local and chosen("linear", v, side.local.weight, side.local.bias)
    if fused:
        local = Local(v, side.local.weight, side.local.bias, grid)
    y = read(q, of_keys, config.kernel, config.eps, v.dtype, soft, share, local)
    if config.local and not fused:  # the host keeps its weights elsewhere, or in another dtype
        y += side.local(v.unflatten(1, grid).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
    return y


def fused_queries(fusion: ConvFusion, x: Tensor, q: Tensor, grid: Grid) -> Tensor:
    """What :meth:`ConvFusion.forward` computes, with the same arguments: `(B, N, C)`."""
    tokens = fusion.convolved(x, grid)  # (B, N, C/r)
    norm, up = fusion.norm, fusion.up
    return conv_fusion(tokens, q, norm.weight, norm.bias, norm.num_groups, norm.eps, up.weight, up.bias)


def compressed(conv: Any, tokens: Tensor, grid: Grid) -> Tensor:
    """What a depthwise 3x3 convolution with padding 1 makes of tokens: `(B, M, C)`."""
    return depthwise(tokens, grid, conv.weight, conv.bias, conv.stride[0])

"""The specification: the paper's formulas written out as plainly as they allow. Quadratic, slow, and only for tests.

Source of all formulas: "EDiT: Efficient Diffusion Transformers with Linear Compressed Attention", arXiv 2503.16726.
`p` is the state of one site as it stands in a weights file: `conv_fusion.down.weight` and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import EDiTConfig

__all__ = ["conv_fusion", "edit_attention", "hybrid_attention", "linear_attention", "literal_query"]

Params = Mapping[str, Tensor]
Norm = Callable[[Tensor], Tensor]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """`y_i = Σ_j (q_i·k_j) v_j / (Σ_j q_i·k_j + eps)`; q `(B,h,N,d)`, k and v `(B,h,M,d)` -> `(B,h,N,d)`."""
    similarity = torch.einsum("bhnd,bhmd->bhnm", q, k)
    return similarity @ v / (similarity.sum(-1, keepdim=True) + eps)


def _image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return rearrange(tokens, "b (h w) c -> b c h w", h=grid[0], w=grid[1]).contiguous()


def _tokens(image: Tensor) -> Tensor:
    return rearrange(image, "b c h w -> b (h w) c")


def _bottleneck(x: Tensor, p: Params, grid: tuple[int, int], config: EDiTConfig) -> Tensor:
    """`LeakyReLU(GroupNorm(Conv3x3(X)))`, `(B, C/r, H, W)`."""
    u = F.conv2d(_image(x, grid), p["conv_fusion.down.weight"], p["conv_fusion.down.bias"], padding=1)
    groups = math.gcd(config.groups, u.shape[1])
    return F.leaky_relu(F.group_norm(u, groups, p["conv_fusion.norm.weight"], p["conv_fusion.norm.bias"]))


def _conv1x1(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _tokens(F.conv2d(u, weight[:, :, None, None], bias))


def conv_fusion(x: Tensor, q: Tensor, p: Params, grid: tuple[int, int], config: EDiTConfig) -> Tensor:
    """The built form: `q + Conv1x1'(LeakyReLU(GroupNorm(Conv3x3(X))))`, `(B, N, C)`."""
    u = _bottleneck(x, p, grid, config)
    return q + _conv1x1(u, p["conv_fusion.up.weight"], p["conv_fusion.up.bias"])


def literal_query(
    x: Tensor, weight: Tensor, bias: Tensor, p: Params, grid: tuple[int, int], config: EDiTConfig
) -> Tensor:
    """The paper's form: `ReLU(Linear(X + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(X))))))`, `(B, N, C)`."""
    u = _bottleneck(x, p, grid, config)
    return F.relu(F.linear(x + _conv1x1(u, p["conv_fusion.up.weight"], p["conv_fusion.up.bias"]), weight, bias))


def _compress(tokens: Tensor, p: Params, name: str, grid: tuple[int, int], config: EDiTConfig) -> Tensor:
    """`DepthwiseConv3x3_stride(tokens)`, `(B, M, C)`."""
    weight, bias = p[f"{name}.conv.weight"], p[f"{name}.conv.bias"]
    return _tokens(F.conv2d(_image(tokens, grid), weight, bias, stride=config.kv_stride, padding=1, groups=len(weight)))


def _features(
    x: Tensor,
    base: tuple[Tensor, Tensor, Tensor],
    p: Params,
    grid: tuple[int, int],
    heads: int,
    config: EDiTConfig,
    norm_q: Norm | None,
    norm_k: Norm | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Unrectified `q (B,h,N,d)`, `k, v (B,h,M,d)`."""
    q = rearrange(conv_fusion(x, base[0], p, grid, config), "b n (h d) -> b h n d", h=heads)
    k = rearrange(_compress(base[1], p, "compress_k", grid, config), "b m (h d) -> b h m d", h=heads)
    v = rearrange(_compress(base[2], p, "compress_v", grid, config), "b m (h d) -> b h m d", h=heads)
    return (norm_q(q) if norm_q else q), (norm_k(k) if norm_k else k), v


def edit_attention(
    x: Tensor,
    base: tuple[Tensor, Tensor, Tensor],
    p: Params,
    grid: tuple[int, int],
    heads: int,
    config: EDiTConfig,
    norm_q: Norm | None = None,
    norm_k: Norm | None = None,
) -> Tensor:
    """Linear compressed attention before the output projection; all tokens `(B, N, C)`."""
    q, k, v = _features(x, base, p, grid, heads, config, norm_q, norm_k)
    return rearrange(linear_attention(F.relu(q), F.relu(k), v, config.eps), "b h n d -> b n (h d)")


def hybrid_attention(
    x: Tensor,
    base: tuple[Tensor, Tensor, Tensor],
    prompt: tuple[Tensor, Tensor, Tensor],
    p: Params,
    grid: tuple[int, int],
    heads: int,
    config: EDiTConfig,
    norm_q: Norm | None = None,
    norm_k: Norm | None = None,
) -> tuple[Tensor, Tensor]:
    """MM-EDiT's joint attention before the output projections: image rows `(B, N, C)`, prompt rows `(B, P, C)`.

    `exact` is written as one joint normalisation: the weights of an image row over all image and prompt keys,
    `q·k` and `exp(q·k/√d)`, divided by their common sum.
    """
    q, k, v = _features(x, base, p, grid, heads, config, norm_q, norm_k)
    q_p, k_p, v_p = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in prompt)
    q_soft, k_soft = (F.relu(q), F.relu(k)) if config.softmax_features == "post" else (q, k)
    scale = q.shape[-1] ** -0.5
    logits = torch.einsum("bhnd,bhpd->bhnp", q_soft, k_p) * scale
    if config.normaliser == "token_ratio":
        share = x.shape[1] / (x.shape[1] + k_p.shape[2])
        y_image = share * linear_attention(F.relu(q), F.relu(k), v, config.eps) + (1 - share) * logits.softmax(-1) @ v_p
    else:
        weights = torch.cat([torch.einsum("bhnd,bhmd->bhnm", F.relu(q), F.relu(k)), logits.exp()], -1)
        y_image = weights @ torch.cat([v, v_p], 2) / (weights.sum(-1, keepdim=True) + config.eps)
    keys, values = torch.cat([k_soft, k_p], 2), torch.cat([v, v_p], 2)
    y_prompt = (torch.einsum("bhnd,bhmd->bhnm", q_p, keys) * scale).softmax(-1) @ values
    return rearrange(y_image, "b h n d -> b n (h d)"), rearrange(y_prompt, "b h n d -> b n (h d)")

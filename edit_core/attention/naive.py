"""The specification: the paper's formulas written out as plainly as they allow. Quadratic, slow, and only for tests.

Source: "EDiT: Efficient Diffusion Transformers with Linear Compressed Attention", arXiv 2503.16726; of what it is
compared with, SANA (arXiv 2410.10629), LinFusion (arXiv 2409.02097) and PixArt-Σ (arXiv 2403.04692). `p` is the state
of one site as it stands in a weights file: `conv_fusion.down.weight` and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ..config import EDiTConfig
from .piecewise_naive import piecewise_attention
from .plans import plan_of

__all__ = [
    "conv_fusion",
    "edit_attention",
    "hybrid_attention",
    "linear_attention",
    "literal_mlp",
    "literal_query",
    "mlp_fusion",
    "softmax_attention",
]

Params = Mapping[str, Tensor]
Norm = Callable[[Tensor], Tensor]


def linear_attention(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-6) -> Tensor:
    """`y_i = Σ_j (q_i·k_j) v_j / (Σ_j q_i·k_j + eps)`; q `(B,h,N,d)`, k and v `(B,h,M,d)` -> `(B,h,N,d)`."""
    similarity = torch.einsum("bhnd,bhmd->bhnm", q, k)
    return similarity @ v / (similarity.sum(-1, keepdim=True) + eps)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`y_i = Σ_j softmax_j(q_i·k_j / √d) v_j`; shapes as for :func:`linear_attention`."""
    logits = torch.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5
    return logits.softmax(-1) @ v


def _kernel(t: Tensor, config: EDiTConfig) -> Tensor:
    """Linear attention's features: `ReLU(t)`, `ReLU(t)²`, or LinFusion's `1 + ELU(t)`."""
    if config.kernel == "elu":
        return 1 + F.elu(t)
    return F.relu(t) if config.kernel == "relu" else F.relu(t) ** 2


def _image(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    return rearrange(tokens, "b (h w) c -> b c h w", h=grid[0], w=grid[1]).contiguous()


def _tokens(image: Tensor) -> Tensor:
    return rearrange(image, "b c h w -> b (h w) c")


def _bottleneck(x: Tensor, p: Params, name: str, grid: tuple[int, int], config: EDiTConfig) -> Tensor:
    """`LeakyReLU(GroupNorm(Conv3x3(X)))`, `(B, C/r, H, W)`; separable: with `DepthwiseConv3x3(Linear(X))`."""
    weight, bias = p[f"{name}.down.weight"], p[f"{name}.down.bias"]
    if config.query == "separable" and name == "conv_fusion":
        image = _image(F.linear(x, weight, bias), grid)
        weight, bias = p[f"{name}.around.weight"], p[f"{name}.around.bias"]
        u = F.conv2d(image, weight, bias, padding=1, groups=len(weight))
    else:
        u = F.conv2d(_image(x, grid), weight, bias, padding=1)
    groups = math.gcd(config.groups, u.shape[1])
    return F.leaky_relu(F.group_norm(u, groups, p[f"{name}.norm.weight"], p[f"{name}.norm.bias"]))


def _conv1x1(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return _tokens(F.conv2d(u, weight[:, :, None, None], bias))


def conv_fusion(
    x: Tensor, q: Tensor, p: Params, grid: tuple[int, int], config: EDiTConfig, name: str = "conv_fusion"
) -> Tensor:
    """The built form: `q + Conv1x1'(LeakyReLU(GroupNorm(Conv3x3(X))))`, `(B, N, C)`."""
    u = _bottleneck(x, p, name, grid, config)
    return q + _conv1x1(u, p[f"{name}.up.weight"], p[f"{name}.up.bias"])


def literal_query(
    x: Tensor, weight: Tensor, bias: Tensor, p: Params, grid: tuple[int, int], config: EDiTConfig
) -> Tensor:
    """The paper's form: `ReLU(Linear(X + Conv1x1(LeakyReLU(GroupNorm(Conv3x3(X))))))`, `(B, N, C)`."""
    u = _bottleneck(x, p, "conv_fusion", grid, config)
    return F.relu(F.linear(x + _conv1x1(u, p["conv_fusion.up.weight"], p["conv_fusion.up.bias"]), weight, bias))


def _mlp(x: Tensor, p: Params, name: str) -> Tensor:
    """`Linear(LeakyReLU(LayerNorm(Linear(X))))`, `(B, N, C)`."""
    u = F.linear(x, p[f"{name}.down.weight"], p[f"{name}.down.bias"])
    u = F.leaky_relu(F.layer_norm(u, u.shape[-1:], p[f"{name}.norm.weight"], p[f"{name}.norm.bias"]))
    return F.linear(u, p[f"{name}.up.weight"], p[f"{name}.up.bias"])


def mlp_fusion(x: Tensor, q: Tensor, p: Params, name: str = "mlp_q") -> Tensor:
    """The built form of LinFusion's: `q + Linear'(LeakyReLU(LayerNorm(Linear(X))))`, `(B, N, C)`."""
    return q + _mlp(x, p, name)


def literal_mlp(x: Tensor, weight: Tensor, bias: Tensor, p: Params) -> Tensor:
    """LinFusion's form: `1 + ELU(Linear(X + Linear(LeakyReLU(LayerNorm(Linear(X))))))`, `(B, N, C)`."""
    return 1 + F.elu(F.linear(x + _mlp(x, p, "mlp_q"), weight, bias))


def _compress(tokens: Tensor, p: Params, name: str, grid: tuple[int, int], config: EDiTConfig) -> Tensor:
    """`DepthwiseConv3x3_stride(tokens)`, `(B, M, C)`."""
    weight, bias = p[f"{name}.conv.weight"], p[f"{name}.conv.bias"]
    return _tokens(F.conv2d(_image(tokens, grid), weight, bias, stride=config.kv_stride, padding=1, groups=len(weight)))


def _local(v: Tensor, p: Params, grid: tuple[int, int], config: EDiTConfig) -> Tensor | float:
    """`DepthwiseConv3x3(V)`, `(B, N, C)`, or nothing."""
    if not config.local:
        return 0.0
    weight, bias = p["local.weight"], p["local.bias"]
    return _tokens(F.conv2d(_image(v, grid), weight, bias, padding=1, groups=len(weight)))


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
    q, k, v = base
    if config.query in ("conv_fusion", "separable"):
        q = conv_fusion(x, q, p, grid, config)
    if config.query == "mlp":
        q = mlp_fusion(x, q, p)
    if config.key == "compressor":
        k, v = _compress(k, p, "compress_k", grid, config), _compress(v, p, "compress_v", grid, config)
    if config.key == "conv_fusion":
        k = conv_fusion(x, k, p, grid, config, "conv_fusion_k")
    if config.key == "mlp":
        k = mlp_fusion(x, k, p, "mlp_k")
    q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in (q, k, v))
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
    if config.kernel == "softmax":
        y = softmax_attention(q, k, v)
    elif config.kernel == "piecewise":
        y = piecewise_attention(q, k, v, grid, plan_of(grid, config))
    else:
        y = linear_attention(_kernel(q, config), _kernel(k, config), v, config.eps)
    return rearrange(y, "b h n d -> b n (h d)") + _local(base[2], p, grid, config)


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
    """The joint attention before the output projections: image rows `(B, N, C)`, prompt rows `(B, P, C)`.

    MM-EDiT's hybrid; or, where the config says so, all-linear, softmax or piecewise attention over the keys of both.
    """
    q, k, v = _features(x, base, p, grid, heads, config, norm_q, norm_k)
    q_p, k_p, v_p = (rearrange(t, "b n (h d) -> b h n d", h=heads) for t in prompt)
    if config.kernel == "softmax" or config.joint == "linear":
        queries, keys, values = torch.cat([q, q_p], 2), torch.cat([k, k_p], 2), torch.cat([v, v_p], 2)
        if config.kernel == "softmax":
            y = softmax_attention(queries, keys, values)
        else:
            y = linear_attention(_kernel(queries, config), _kernel(keys, config), values, config.eps)
        y_image, y_prompt = y[:, :, : q.shape[2]], y[:, :, q.shape[2] :]
    elif config.kernel == "piecewise":
        y_image = piecewise_attention(q, k, v, grid, plan_of(grid, config), (k_p, v_p))
        y_prompt = softmax_attention(q_p, torch.cat([k, k_p], 2), torch.cat([v, v_p], 2))
    else:
        y_image, y_prompt = _hybrid(q, k, v, q_p, k_p, v_p, config)
    y_image = rearrange(y_image, "b h n d -> b n (h d)") + _local(base[2], p, grid, config)
    return y_image, rearrange(y_prompt, "b h n d -> b n (h d)")


def _hybrid(
    q: Tensor, k: Tensor, v: Tensor, q_p: Tensor, k_p: Tensor, v_p: Tensor, config: EDiTConfig
) -> tuple[Tensor, Tensor]:
    """MM-EDiT's rows, `(B, h, N, d)` and `(B, h, P, d)`.

    `exact` is written as one joint normalisation: the weights of an image row over all image and prompt keys,
    `q·k` and `exp(q·k/√d)`, divided by their common sum.
    """
    q_lin, k_lin = _kernel(q, config), _kernel(k, config)
    q_soft, k_soft = (q_lin, k_lin) if config.softmax_features == "post" else (q, k)
    if config.normaliser == "token_ratio":
        share = q.shape[2] / (q.shape[2] + k_p.shape[2])
        y_lin, y_soft = linear_attention(q_lin, k_lin, v, config.eps), softmax_attention(q_soft, k_p, v_p)
        y_image = share * y_lin + (1 - share) * y_soft
    else:
        logits = torch.einsum("bhnd,bhpd->bhnp", q_soft, k_p) * q.shape[-1] ** -0.5
        weights = torch.cat([torch.einsum("bhnd,bhmd->bhnm", q_lin, k_lin), logits.exp()], -1)
        y_image = weights @ torch.cat([v, v_p], 2) / (weights.sum(-1, keepdim=True) + config.eps)
    return y_image, softmax_attention(q_p, torch.cat([k_soft, k_p], 2), torch.cat([v, v_p], 2))

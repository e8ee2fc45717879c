"""Runs Triton kernels on the CPU, in Triton's interpreter; for a process of its own, as `TRITON_INTERPRET` is for good.

Each function makes its own inputs, of a seed, and returns the relative error of a kernel against the specification in
float64: tensors need not travel between processes.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from edit_core.attention import naive
from edit_core.config import EDiTConfig

EPS = 1e-6


def start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


def error(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected).norm() / expected.norm())


def fused(batch: int, tokens: int, channels: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Queries, keys and values `(B, N, C)` as strided views of one projection, within a larger batch of it."""
    qkv = torch.randn(2 * batch, tokens, 3 * channels, generator=torch.Generator().manual_seed(seed))
    return qkv.to(dtype)[::2].chunk(3, -1)


def _features(tokens: Tensor, heads: int, kernel: str) -> Tensor:
    return naive._kernel(rearrange(tokens.double(), "b n (h d) -> b h n d", h=heads), EDiTConfig(kernel=kernel))  # type: ignore[arg-type]


def state(
    dtype: torch.dtype, kernel: str, tokens: int, heads: int, d: int, scale: float = 1.0, chunks: int = 0
) -> float:
    from edit_core.kernels import state as module

    _, k, v = fused(2, tokens, heads * d, dtype)
    k = k * scale if scale != 1 else k
    if chunks:
        module._PROGRAMS = 2 * heads * chunks
    phi, values = _features(k, heads, kernel), rearrange(v.double(), "b n (h d) -> b h n d", h=heads)
    expected = torch.cat([phi.mT @ values, phi.sum(-2).unsqueeze(-1)], -1)
    actual = module.state(k, v, heads, kernel)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, module.state(k, v, heads, kernel))
    return error(actual, expected)


def linear(
    dtype: torch.dtype,
    kernel: str,
    grid: tuple[int, int],
    heads: int,
    d: int,
    soft: bool = False,
    local: bool = False,
    scale: float = 1.0,
) -> float:
    from edit_core.kernels.read import Local, read
    from edit_core.kernels.state import state as found

    tokens, channels = grid[0] * grid[1], heads * d
    q, k, v = fused(2, tokens, channels, dtype)
    q, k = (q * scale, k * scale) if scale != 1 else (q, k)
    phi_q, phi_k = (_features(t, heads, kernel) for t in (q, k))
    values = rearrange(v.double(), "b n (h d) -> b h n d", h=heads)
    expected = rearrange(naive.linear_attention(phi_q, phi_k, values, EPS), "b h n d -> b n (h d)")
    options: dict[str, Any] = {}
    if soft:
        rows = fused(2, tokens, channels, dtype, 1)[0]
        options |= {"soft": rows, "share": 0.8}
        expected = 0.8 * expected + 0.2 * rows.double()
    if local:
        weight, bias = torch.randn(channels, 1, 3, 3).to(dtype), torch.randn(channels).to(dtype)
        options["local"] = Local(v, weight, bias, grid)
        state_of = {"local.weight": weight.double(), "local.bias": bias.double()}
        expected = expected + naive._local(v.double(), state_of, grid, EDiTConfig.preset("local"))
    actual = read(q, found(k, v, heads, kernel), kernel, EPS, dtype, **options)
    assert actual.dtype == dtype and actual.is_contiguous()
    return error(actual, expected)


def depthwise(dtype: torch.dtype, grid: tuple[int, int], channels: int, stride: int) -> float:
    from edit_core.kernels.depthwise import depthwise as found

    tokens = fused(2, grid[0] * grid[1], channels, dtype)[1]
    weight, bias = torch.randn(channels, 1, 3, 3).to(dtype), torch.randn(channels).to(dtype)
    config = EDiTConfig(kv_stride=stride)
    p = {"compress.conv.weight": weight.double(), "compress.conv.bias": bias.double()}
    actual = found(tokens, grid, weight, bias, stride)
    assert actual.dtype == dtype
    return error(actual, naive._compress(tokens.double(), p, "compress", grid, config))


def conv_fusion(
    dtype: torch.dtype, grid: tuple[int, int], channels: int, groups: int = 32, offset: float = 0.0
) -> float:
    """With an offset, a bottleneck whose mean is about that many times its deviation."""
    from edit_core.kernels.conv_fusion import conv_fusion as found

    config = EDiTConfig(groups=groups)
    x, q, _ = fused(2, grid[0] * grid[1], channels, dtype)
    hidden = config.hidden(channels)
    groups = math.gcd(groups, hidden)
    shapes = {
        "down.weight": (hidden, channels, 3, 3),
        "down.bias": (hidden,),
        "norm.weight": (hidden,),
        "norm.bias": (hidden,),
        "up.weight": (channels, hidden),
        "up.bias": (channels,),
    }
    torch.manual_seed(0)
    p = {f"conv_fusion.{name}": torch.randn(s) / math.prod(s[1:]) ** 0.5 for name, s in shapes.items()}
    p["conv_fusion.down.bias"] += offset
    p = {name: tensor.to(dtype) for name, tensor in p.items()}
    wide = {name: tensor.double() for name, tensor in p.items()}
    # The bottleneck as a convolution would give it, so that only what the kernel does is judged.
    image = rearrange(x.double(), "b (h w) c -> b c h w", h=grid[0])
    u = torch.nn.functional.conv2d(image, wide["conv_fusion.down.weight"], wide["conv_fusion.down.bias"], padding=1)
    u = rearrange(u, "b c h w -> b (h w) c").to(dtype)
    normed = torch.nn.functional.group_norm(
        u.double().mT, groups, wide["conv_fusion.norm.weight"], wide["conv_fusion.norm.bias"]
    )
    expected = q.double() + naive._conv1x1(
        torch.nn.functional.leaky_relu(normed).unsqueeze(-1), wide["conv_fusion.up.weight"], wide["conv_fusion.up.bias"]
    )
    norm = [p[f"conv_fusion.norm.{name}"] for name in ("weight", "bias")]
    actual = found(u, q, *norm, groups, 1e-5, p["conv_fusion.up.weight"], p["conv_fusion.up.bias"])
    assert actual.dtype == dtype
    return error(actual, expected)


def attention(preset: str, changes: dict[str, Any], joint: bool) -> float:
    """A whole attention, whatever of it has kernels as kernels; and the eager path must not have been what ran."""
    from edit_core import kernels
    from edit_core.attention import EDiTAttention, HybridAttention, Projections
    from edit_core.attention import fused as module

    channels, heads, grid = 32, 2, (5, 6)
    config = EDiTConfig.preset(preset, **changes)
    torch.manual_seed(0)
    side = (HybridAttention if joint else EDiTAttention)(channels, config).requires_grad_(False)
    for parameter in side.parameters():
        parameter.normal_(0, 0.3)
    x, *base = torch.randn(2, 30, 4 * channels).split(channels, -1)
    prompt = torch.randn(2, 7, 3 * channels).chunk(3, -1)
    p = {name: tensor.double() for name, tensor in side.state_dict().items()}
    reads, read = [], module.read
    module.read = lambda *arguments: reads.append(1) or read(*arguments)  # type: ignore[func-returns-value]
    wide = tuple(t.double() for t in base)
    with kernels.using(kernels.PARTS):
        if joint:
            rows = side(x, Projections(*base), Projections(*prompt), grid, heads)
            wanted = naive.hybrid_attention(x.double(), wide, tuple(t.double() for t in prompt), p, grid, heads, config)
        else:
            rows = (side(x, Projections(*base), grid, heads),)
            wanted = (naive.edit_attention(x.double(), wide, p, grid, heads, config),)
    module.read = read
    assert bool(reads) == (config.normaliser == "token_ratio")
    return max(error(y, z) for y, z in zip(rows, wanted, strict=True))


def measured(parts: tuple[str, ...], break_it: str = "") -> dict[str, Any]:
    """What :func:`edit_core.bench.kernels.measure` finds at a small width, perhaps with a broken kernel."""
    from dataclasses import asdict

    from edit_core.bench import kernels as bench
    from edit_core.kernels import depthwise as module

    bench.WIDTHS = {"pixart_sigma": (32, 2)}
    bench.PARTS, bench._SMALL = parts, (3, 5)
    bench._CALLS = bench._ROUNDS = bench._BATCH = 1

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("out of resources\nand more lines")

    depthwise = module.depthwise
    wrong = {"raises": fails, "wrong": lambda *arguments: 2 * depthwise(*arguments)}
    module.depthwise = wrong.get(break_it, depthwise)
    try:
        found = bench.measure(torch.device("cpu"), torch.float32, "pixart_sigma", ((4, 5),))
    finally:
        module.depthwise = depthwise
    return {part: asdict(outcome) for part, outcome in found.items()}

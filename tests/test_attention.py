"""The fast paths against their specification, in values and gradients, and against independent implementations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, SanaLinearAttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edit_core import EDiTConfig, linear_attention
from edit_core.attention import (
    ConvFusion,
    EDiTAttention,
    HybridAttention,
    Projections,
    SpatialCompressor,
    merge_heads,
    naive,
    split_heads,
)
from edit_core.attention.linear import read, state
from edit_core.attention.modules import as_nchw, as_tokens

TOLERANCE = 2e-4  # float32 against float64, relative to the largest value

# torch's GroupNorm refuses groups of a single value, which these narrow models would have on a 1x1 grid.
grids = st.tuples(st.integers(1, 9), st.integers(1, 9)).filter(lambda grid: grid != (1, 1))
batches = st.integers(1, 3)
head_counts = st.integers(1, 24)
head_dims = st.sampled_from([4, 8, 12])
configs = st.builds(
    EDiTConfig,
    compression=st.sampled_from([1, 2, 4]),
    kv_stride=st.sampled_from([1, 2, 3]),
    normaliser=st.sampled_from(["token_ratio", "exact"]),
    softmax_features=st.sampled_from(["pre", "post"]),
    groups=st.sampled_from([1, 2]),
    eps=st.just(0.1),  # a query that is nearly rectified away would divide rounding by rounding
)


def close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE, name: str = "") -> None:
    assert actual.shape == expected.shape, name
    actual, expected = actual.detach().double(), expected.detach().double()
    worst = float((actual - expected).abs().max() / expected.abs().max().clamp(min=1e-3))
    assert worst < tolerance, f"{name}: relative error {worst:.2g}"


def double(tensors: Any) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def compare_gradients(
    fast: list[Tensor], inputs: list[Tensor], slow: list[Tensor], references: list[Tensor], tolerance: float = 2e-3
) -> None:
    """Gradients of the same random projection of both sides' outputs; zeros for what an output does not depend on."""
    weights = [torch.randn_like(y) for y in fast]
    sums = [sum((y * w).sum() for y, w in zip(side, weights, strict=True)) for side in (fast, slow)]
    grads = torch.autograd.grad(sums[0], inputs, materialize_grads=True)
    wanted = torch.autograd.grad(sums[1], references, materialize_grads=True)
    for i, (grad, want) in enumerate(zip(grads, wanted, strict=True)):
        close(grad, want, tolerance, f"gradient {i}")


class HeadNorm(nn.Module):
    """An RMS norm over a head, as SD3.5's."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.2 * torch.randn(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), 1e-6)


def randomised(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn_like(parameter) + (1.0 if parameter.ndim == 0 else 0.0)
    return module


def sample(batch: int, grid: tuple[int, int], dim: int, prompt: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    tokens = grid[0] * grid[1]
    x = torch.randn(batch, tokens, dim, requires_grad=True)
    base = [torch.randn(batch, tokens, dim, requires_grad=True) for _ in range(3)]
    return x, base, [torch.randn(batch, prompt, dim, requires_grad=True) for _ in range(3)]


@given(batches, head_counts, st.integers(1, 40), st.integers(1, 40), head_dims)
def test_linear_attention_equals_the_formula_in_values_and_gradients(b: int, h: int, n: int, m: int, d: int) -> None:
    q, k = ((torch.rand(b, h, t, d) + 0.1).requires_grad_() for t in (n, m))  # the normaliser stays off zero
    v = torch.randn(b, h, m, d, requires_grad=True)
    q64, k64, v64 = double((q, k, v))
    fast, slow = linear_attention(q, k, v), naive.linear_attention(q64, k64, v64)
    close(fast, slow)
    compare_gradients([fast], [q, k, v], [slow], [q64, k64, v64])


@given(batches, head_counts, head_dims, grids, configs, st.booleans())
def test_edit_attention_equals_the_formula_in_values_and_gradients(
    b: int, h: int, d: int, grid: tuple[int, int], config: EDiTConfig, normed: bool
) -> None:
    module = randomised(EDiTAttention(h * d, config))
    norms = (HeadNorm(d), HeadNorm(d)) if normed else (None, None)
    x, base, _ = sample(b, grid, h * d, 1)
    x64, *base64 = double([x, *base])
    state = {name: p.detach().double().requires_grad_() for name, p in module.named_parameters()}
    fast = module(x, Projections(*base), grid, h, *norms)
    slow = naive.edit_attention(x64, tuple(base64), state, grid, h, config, *norms)
    close(fast, slow)
    compare_gradients([fast], [x, *base, *module.parameters()], [slow], [x64, *base64, *state.values()])


@given(batches, head_counts, head_dims, grids, configs, st.integers(1, 12), st.booleans())
def test_hybrid_attention_equals_the_formula_in_values_and_gradients(
    b: int, h: int, d: int, grid: tuple[int, int], config: EDiTConfig, p: int, normed: bool
) -> None:
    module = randomised(HybridAttention(h * d, config))
    norms = (HeadNorm(d), HeadNorm(d)) if normed else (None, None)
    x, base, prompt = sample(b, grid, h * d, p)
    x64, *rest64 = double([x, *base, *prompt])
    state = {name: t.detach().double().requires_grad_() for name, t in module.named_parameters()}
    fast = module(x, Projections(*base), Projections(*prompt), grid, h, *norms)
    slow = naive.hybrid_attention(x64, tuple(rest64[:3]), tuple(rest64[3:]), state, grid, h, config, *norms)
    for y, z in zip(fast, slow, strict=True):
        close(y, z, 1e-3)
    compare_gradients(
        list(fast), [x, *base, *prompt, *module.parameters()], list(slow), [x64, *rest64, *state.values()]
    )


def test_hybrid_attention_without_prompt_rows_gives_the_same_image_rows() -> None:
    module = randomised(HybridAttention(32, EDiTConfig()))
    x, base, prompt = sample(2, (5, 6), 32, 4)
    both = module(x, Projections(*base), Projections(*prompt), (5, 6), 4)
    image, none = module(x, Projections(*base), Projections(*prompt), (5, 6), 4, prompt_rows=False)
    assert none is None
    assert torch.equal(image, both[0])


@given(batches, st.integers(1, 6), grids)
def test_the_papers_literal_query_equals_the_built_one(b: int, h: int, grid: tuple[int, int]) -> None:
    """`Linear(X + Conv1x1(u))` is `q + Conv1x1'(u)` with `Conv1x1' = W · W_up`."""
    dim, config = h * 8, EDiTConfig(compression=2)
    module = randomised(ConvFusion(dim, config)).double()
    weight, bias = torch.randn(dim, dim).double(), torch.randn(dim).double()
    x = torch.randn(b, grid[0] * grid[1], dim).double()
    literal_state = {f"conv_fusion.{name}": p for name, p in module.named_parameters()}
    literal = naive.literal_query(x, weight, bias, literal_state, grid, config)
    folded = {
        "up.weight": weight @ literal_state["conv_fusion.up.weight"],
        "up.bias": weight @ literal_state["conv_fusion.up.bias"],
    }
    module.load_state_dict({**module.state_dict(), **folded})
    close(F.relu(module(x, F.linear(x, weight, bias), grid)), literal, 1e-9)


@given(batches, st.integers(1, 8), st.integers(1, 50))
def test_linear_attention_equals_diffusers_sana_where_the_two_coincide(b: int, h: int, n: int) -> None:
    """Without ConvFusion and compression, EDiT's core is SANA's linear attention."""
    attention = Attention(h * 8, heads=h, dim_head=8, bias=True, processor=SanaLinearAttnProcessor2_0())
    x = torch.randn(b, n, h * 8)
    q, k, v = (split_heads(f(x), h) for f in (attention.to_q, attention.to_k, attention.to_v))
    ours = attention.to_out[0](merge_heads(linear_attention(F.relu(q), F.relu(k), v, eps=1e-15)))
    close(ours, attention(x))


def test_the_exact_normaliser_is_one_joint_normalisation() -> None:
    """Written out per row: every image row's weights over image and prompt keys sum to one."""
    config = EDiTConfig(normaliser="exact", kv_stride=1)
    module = randomised(HybridAttention(16, config)).double()
    x, base, prompt = ([t.double() for t in ts] for ts in ([t] if isinstance(t, Tensor) else t
                       for t in sample(1, (3, 4), 16, 5)))  # fmt: skip
    image, _ = module(x[0], Projections(*base), Projections(*prompt), (3, 4), 2)
    q, k, v = (split_heads(t, 2)[0] for t in module.features(x[0], Projections(*base), (3, 4), 2, None, None))
    k_p, v_p = split_heads(prompt[1], 2)[0], split_heads(prompt[2], 2)[0]
    for head in range(2):
        for i in range(12):
            linear = [float(q[head, i].relu() @ k[head, j].relu()) for j in range(12)]
            soft = [math.exp(float(q[head, i] @ k_p[head, j]) / math.sqrt(8)) for j in range(5)]
            values = torch.cat([v[head], v_p[head]])
            row = (torch.tensor(linear + soft).double()[:, None] * values).sum(0) / (sum(linear) + sum(soft) + 1e-6)
            close(image[0, i, head * 8 : head * 8 + 8], row, 1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [1_000, 65_536])
def test_sums_over_many_tokens_are_exact_in_every_dtype(dtype: torch.dtype, tolerance: float, tokens: int) -> None:
    q, k = (30 * torch.rand(1, 2, tokens, 16).to(dtype) for _ in range(2))  # sums reach millions, float16 ends at 65504
    v = torch.randn(1, 2, tokens, 16).to(dtype) + 1
    y = linear_attention(q, k, v)
    assert y.dtype == dtype
    k64, v64, q64 = (t[:, :, :].double() for t in (k, v, q[:, :, :50]))
    close(y[:, :, :50], naive.linear_attention(q64, k64, v64), tolerance)


def test_a_query_that_is_rectified_away_gives_zeros_not_nan() -> None:
    q = torch.rand(1, 2, 6, 8)
    q[:, :, 3] = 0
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        y = linear_attention(q.to(dtype), torch.rand(1, 2, 6, 8).to(dtype), torch.randn(1, 2, 6, 8).to(dtype))
        assert torch.isfinite(y).all()
        assert (y[:, :, 3] == 0).all()


@given(batches, grids, st.integers(1, 8))
def test_tokens_and_images_are_views_of_the_same_memory(b: int, grid: tuple[int, int], c: int) -> None:
    tokens = torch.randn(b, grid[0] * grid[1], c)
    image = as_nchw(tokens, grid)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert image.data_ptr() == tokens.data_ptr() == as_tokens(image).data_ptr()
    assert torch.equal(as_tokens(image), tokens)


def test_the_result_of_linear_attention_lies_ready_for_the_output_projection() -> None:
    q, k, v = (split_heads(torch.rand(2, 30, 24), 3) for _ in range(3))
    y = linear_attention(q, k, v)
    assert merge_heads(y).data_ptr() == y.data_ptr()
    assert merge_heads(y).is_contiguous()


def test_the_normaliser_is_the_denominator() -> None:
    q, k, v = (torch.rand(2, 3, 7, 4) for _ in range(3))
    _, normaliser = read(q, state([(k, v)]), 0.5, v.dtype)
    close(normaliser, torch.einsum("bhnd,bhmd->bnh", q, k) + 0.5)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (7, 1), (5, 6), (8, 8)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_the_compressor_keeps_every_corner_of_the_grid(height: int, width: int, stride: int) -> None:
    compressor = SpatialCompressor(8, EDiTConfig(kv_stride=stride))
    out = compressor(torch.randn(2, height * width, 8), (height, width))
    assert out.shape == (2, math.ceil(height / stride) * math.ceil(width / stride), 8)

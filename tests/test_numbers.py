"""Numbers that do not break: float16 at its limits, rows without a feature, thin grids, and NaN that stays where it is.

The float64 reference of a large case is the fast path itself in float64, which the first tests here hold to the
specification in :mod:`edit_core.attention.naive`.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import models
from torch import Tensor

from edit_core import EDiTConfig, EDiTConfigError, apply_edit, linear_attention
from edit_core.attention import SITES, EDiTAttention, Projections, naive
from edit_core.config import PRESETS

HEADS, DIM = 2, 16
HALF = {"float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES = {"float32": torch.float32, **HALF}
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
"""Largest error against float64, relative to the largest value."""

presets = st.sampled_from([*PRESETS])
sites = st.sampled_from([*SITES])
# Thin and odd grids as well; torch's GroupNorm refuses a group of one value, which a real model's never is.
grids = st.one_of(
    st.tuples(st.just(1), st.integers(1, 40)),
    st.tuples(st.integers(1, 40), st.just(1)),
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
)


SOFTMAX = ("softmax", "piecewise")
"""Kernels whose logits are a softmax's, also between image tokens."""


def config_of(preset: str, site: str = "self", exact: bool = False) -> EDiTConfig:
    """A preset with groups of two channels, and with the exact normaliser where it is asked for and known."""
    config = EDiTConfig.preset(preset)
    changes: dict[str, Any] = {"groups": 2} if {"conv_fusion", "separable"} & {config.query, config.key} else {}
    if exact and site == "joint" and config.joint == "hybrid" and config.kernel not in SOFTMAX:
        changes["normaliser"] = "exact"
    return EDiTConfig.preset(preset, **changes)


def build(site: str, config: EDiTConfig, dim: int = DIM) -> EDiTAttention:
    """Side weights as after a training, in float64. Every query has a feature, so that no row is rounding alone."""
    module = SITES[site](dim, config, dtype=torch.float64).requires_grad_(False)
    for name, parameter in module.named_parameters():
        parameter += 0.05 * torch.randn_like(parameter)
        if name.endswith(".up.bias"):
            parameter[:: dim // HEADS] += 4
    return module


def sample(
    batch: int, tokens: int, prompt: int, scale: float = 1.0, dim: int = DIM
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Float64 tokens, a base's projections of them, and the prompt's; `scale` is of queries, keys and values."""
    x = torch.randn(batch, tokens, dim, dtype=torch.float64)
    base, other = (
        [scale * torch.randn(batch, count, dim, dtype=torch.float64) for _ in range(3)] for count in (tokens, prompt)
    )
    return x, base, other


def run(
    module: EDiTAttention,
    grid: tuple[int, int],
    x: Tensor,
    base: list[Tensor],
    prompt: list[Tensor],
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, ...]:
    """Image rows, and of a joint attention prompt rows, in a dtype."""
    module.to(dtype)
    x, *rest = (t.to(dtype) for t in (x, *base, *prompt))
    if type(module) is EDiTAttention:
        return (module(x, Projections(*rest[:3]), grid, HEADS),)
    return module(x, Projections(*rest[:3]), Projections(*rest[3:]), grid, HEADS)  # type: ignore[arg-type, return-value]


def specified(
    module: EDiTAttention, grid: tuple[int, int], x: Tensor, base: list[Tensor], prompt: list[Tensor]
) -> tuple[Tensor, ...]:
    """What :func:`run` should give in float64."""
    state, config = dict(module.to(torch.float64).named_parameters()), module.config
    if type(module) is EDiTAttention:
        return (naive.edit_attention(x, tuple(base), state, grid, HEADS, config),)  # type: ignore[arg-type]
    return naive.hybrid_attention(x, tuple(base), tuple(prompt), state, grid, HEADS, config)  # type: ignore[arg-type]


def assert_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for y, z in zip(actual, expected, strict=True):
        assert torch.isfinite(y).all()
        error = float((y.double() - z).abs().max() / z.abs().max().clamp(min=1e-6))
        assert error < tolerance, f"relative error {error:.2g}"


# --- against float64 --------------------------------------------------------------------------------------------------


@given(presets, sites, grids, st.integers(1, 3), st.integers(1, 9), st.floats(-3, 4), st.booleans())
def test_every_form_is_its_formula_on_any_grid_and_at_any_scale(
    preset: str, site: str, grid: tuple[int, int], batch: int, prompt: int, power: float, exact: bool
) -> None:
    config = config_of(preset, site, exact)
    module = build(site, config)
    # `exact` is specified by exponentials of unshifted logits, which leave even float64 beyond a few hundred.
    scale = 10 ** min(power, 0.3 if config.normaliser == "exact" else 4)
    inputs = sample(batch, grid[0] * grid[1], prompt, scale)
    assert_close(run(module, grid, *inputs), specified(module, grid, *inputs), 1e-7)


@given(presets, sites, grids, st.sampled_from([*DTYPES.values()]), st.integers(1, 9), st.floats(-3, 3.5), st.booleans())
def test_lower_precision_rounds_but_does_not_break(
    preset: str, site: str, grid: tuple[int, int], dtype: torch.dtype, prompt: int, power: float, exact: bool
) -> None:
    config = config_of(preset, site, exact)
    softmax = site == "joint" or config.kernel in SOFTMAX
    module = build(site, config)
    # A softmax of large logits is as sharp as their rounding: beyond some size nothing is left to compare.
    scale = 10 ** min(power, 0.0 if softmax else 3.5)
    x, base, others = sample(2, grid[0] * grid[1], prompt, scale)
    rounded = [t.to(dtype).double() for t in (x, *base, *others)]
    rounded[1][..., :: DIM // HEADS] = rounded[1][..., :: DIM // HEADS].abs() + scale  # also where nothing is added
    module.to(dtype)
    inputs = rounded[0], rounded[1:4], rounded[4:]
    assert_close(run(module, grid, *inputs, dtype), specified(module, grid, *inputs), ROUNDING[dtype])


def extreme(tokens: int, quiet_prompt: bool) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries, keys and values up to float16's limit of 65504, and a prompt of one token."""
    x, base, prompt = sample(1, tokens, 1, 3e3)
    x *= 100
    for tensor, every in zip(base, (1000, 999, 997), strict=True):
        tensor.view(-1)[::every] = 6e4 if every != 997 else -6e4
        tensor.clamp_(-6e4, 6e4)
    if quiet_prompt:  # logits in the tens; of larger ones a share's sigmoid keeps the sign alone
        prompt[1] *= 1e-6
    return x.half().double(), [t.half().double() for t in base], [t.half().double() for t in prompt]


@pytest.mark.parametrize("exact", [False, True], ids=["token_ratio", "exact"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("preset", PRESETS)
def test_float16_holds_65536_tokens_of_extreme_activations(preset: str, site: str, exact: bool) -> None:
    config = config_of(preset, site, exact)
    if exact != (config.normaliser == "exact"):
        pytest.skip("has one normaliser")
    side = 64 if preset == "kv_compression" else 256  # it is quadratic, and its softmax is the host's
    module = build(site, config)
    inputs = extreme(side * side, exact)
    fast = run(module, (side, side), *inputs, torch.float16)
    if config.kernel in SOFTMAX:  # a softmax of such logits is as sharp as their rounding
        assert all(torch.isfinite(y).all() for y in fast)
    else:
        assert_close(fast, run(module, (side, side), *inputs), 5e-3)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel", ["relu", "squared_relu"])
@pytest.mark.parametrize("site", SITES)
def test_rows_and_keys_without_a_feature_give_zeros_and_finite_gradients(
    site: str, kernel: str, dtype: torch.dtype
) -> None:
    config = EDiTConfig(kernel=kernel, query="plain", key="plain", joint="linear")  # type: ignore[arg-type]
    for dead in ("some queries", "all queries", "all keys"):
        _, base, prompt = sample(2, 12, 1)
        which = slice(3, 5) if dead == "some queries" else slice(None)
        (base[1] if dead == "all keys" else base[0])[:, which] = -1
        if dead == "all keys":
            prompt[1][:] = -1
        module = SITES[site](DIM, config, dtype=dtype)
        tensors = [t.to(dtype).requires_grad_() for t in (*base, *prompt)]
        x = torch.randn(2, 12, DIM, dtype=dtype)
        y = run(module, (3, 4), x, tensors[:3], tensors[3:], dtype)
        assert all(torch.isfinite(rows).all() for rows in y)
        assert (y[0][:, which] == 0).all()
        assert (y[0] == 0).all() == (dead != "some queries")
        sum(rows.float().sum() for rows in y).backward()  # type: ignore[union-attr]
        assert all(torch.isfinite(t.grad).all() for t in tensors if t.grad is not None)


@pytest.mark.parametrize("normaliser", ["token_ratio", "exact"])
@pytest.mark.parametrize("kernel", ["relu", "squared_relu"])
def test_a_hybrid_row_without_a_feature_still_sees_the_prompt(kernel: str, normaliser: str) -> None:
    config = EDiTConfig(kernel=kernel, query="plain", key="plain", normaliser=normaliser)  # type: ignore[arg-type]
    x, base, prompt = sample(2, 12, 1)
    base[0][:, 3:5] = -base[0][:, 3:5].abs()
    module = build("joint", config)
    inputs = x, base, prompt
    wanted = specified(module, (3, 4), *inputs)
    share = 12 / 13 if normaliser == "token_ratio" else 0.0
    torch.testing.assert_close(wanted[0][:, 3:5], ((1 - share) * prompt[2]).expand(2, 2, DIM), rtol=1e-4, atol=1e-4)
    assert_close(run(module, (3, 4), *inputs), wanted, 1e-7)
    assert_close(run(module, (3, 4), *inputs, torch.float16), wanted, ROUNDING[torch.float16])


def test_an_eps_that_float32_would_lose_is_refused() -> None:
    """Below float32's smallest number, a row without a feature would be 0 / 0, and the picture black."""
    for eps in (1e-50, 1e-39, 5e-324, 0, 1, 10**400, float("nan"), float("inf")):
        with pytest.raises(EDiTConfigError, match="eps must be a number from 1e-30 and under 1"):
            EDiTConfig(eps=eps)
    zeros = torch.zeros(1, 1, 2, 4)
    for dtype in DTYPES.values():
        assert (linear_attention(zeros.to(dtype), zeros.to(dtype), zeros.to(dtype), eps=1e-30) == 0).all()


# --- NaN and infinities -----------------------------------------------------------------------------------------------


@given(presets, sites, st.integers(0, 6), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.data())
def test_what_is_not_finite_reaches_what_the_formula_says_and_nothing_else(
    preset: str, site: str, where: int, value: float, data: st.DataObject
) -> None:
    """One bad number in one of the inputs: the same outputs as the specification's are finite, and right."""
    grid, module = (3, 4), build(site, config_of(preset, site))
    x, base, prompt = sample(3, 12, 2)
    bad = [x, *base, *prompt][where]
    place = [data.draw(st.integers(0, size - 1)) for size in bad.shape]
    bad[tuple(place)] = value
    for y, z in zip(run(module, grid, x, base, prompt), specified(module, grid, x, base, prompt), strict=True):
        good = torch.isfinite(z)
        torch.testing.assert_close(y[good], z[good])
        # PyTorch's fused attention gives zeros where all of a row's logits are -inf, as for a row that is masked.
        assert not torch.isfinite(y[~good]).any() or (
            math.isinf(value) and (site == "joint" or preset == "kv_compression")
        )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_bad_picture_does_not_touch_the_others_of_its_batch(
    preset: str, site: str, value: float, dtype: torch.dtype
) -> None:
    grid, module = (5, 6), build(site, config_of(preset, site))
    x, base, prompt = sample(3, 30, 2)
    clean = run(module, grid, x, base, prompt, dtype)
    for bad in (x, *base, *prompt):
        bad[1, 0, 1] = value
    dirty = run(module, grid, x, base, prompt, dtype)
    for y, z in zip(dirty, clean, strict=True):
        assert torch.equal(y[[0, 2]], z[[0, 2]])
        assert not torch.isfinite(y[1]).all()


def test_nan_in_a_query_is_its_rows_in_a_value_its_channels_and_in_a_key_its_heads() -> None:
    for place, poisoned in (
        ("query", (slice(None), 1, 2)),
        ("key", (slice(None), 1)),
        ("value", (slice(None), 1, slice(None), 3)),
    ):
        q, k, v = torch.rand(3, 1, 2, 5, 4)
        {"query": q, "key": k, "value": v}[place][0, 1, 2, 3] = torch.nan
        expected = torch.zeros(1, 2, 5, 4, dtype=torch.bool)
        expected[poisoned] = True
        assert torch.equal(linear_attention(q, k, v).isnan(), expected), place


@pytest.mark.parametrize("backbone", models.SHIPPED)
def test_a_bad_latent_does_not_touch_the_others_of_its_batch(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.make(backbone)
    randn = torch.randn

    def poisoned(*shape: Any, **options: Any) -> Tensor:
        made = randn(*shape, **options)
        if len(shape) == 4:
            made[0, 0, 3, 3] = torch.nan
        return made

    with torch.no_grad(), apply_edit(model, models.trained_like(model)):
        clean = models.forward(model)
        monkeypatch.setattr(torch, "randn", poisoned)
        dirty = models.forward(model)
    assert dirty[0].isnan().any()
    assert torch.equal(dirty[1], clean[1])

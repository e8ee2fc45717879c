"""Piecewise attention against its specification and against the softmax it replaces."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from edit_core.attention import merge_heads, piecewise_naive, softmax_attention, split_heads
from edit_core.attention import piecewise as module
from edit_core.attention.piecewise import piecewise_attention
from edit_core.attention.plans import PiecewisePlan

HEADS = 3
MANY = 10**6


@st.composite
def plans(draw: st.DrawFn, most: int = 12) -> PiecewisePlan:
    unit = draw(st.integers(2, 3))  # single tokens have no spread: all would tie
    own = draw(st.integers(1, 2))
    tile = unit * own
    cell = tile * draw(st.integers(1, 3))
    exact, opened = draw(st.integers(own**2, most)), draw(st.integers(1, most))
    sample = draw(st.sampled_from([side for side in range(1, tile + 1) if tile % side == 0]))
    return PiecewisePlan(unit, tile, cell, exact, opened, sample)


grids = st.tuples(st.integers(1, 13), st.integers(1, 13))
prompts = st.sampled_from([0, 4])
seeds = st.integers(0, 2**16)


def sample(grid: tuple[int, int], prompt: int, batch: int = 2, seed: int = 0, dtype: Any = torch.float64) -> Any:
    """q, k and v of an image `(B, N, C)`, and keys and values of a prompt, or None."""
    draw = torch.Generator().manual_seed(seed)
    count = grid[0] * grid[1]
    tokens = torch.randn(3, batch, count + prompt, HEADS * 8, dtype=torch.float64, generator=draw).to(dtype)
    tokens[0] *= 3  # attention that is not all alike
    q, k, v = tokens[:, :, :count].unbind()
    return (q, k, v), (tuple(tokens[1:, :, count:].unbind()) if prompt else None)


def naive(q: Tensor, k: Tensor, v: Tensor, grid: Any, plan: PiecewisePlan, prompt: Any) -> Tensor:
    q, k, v, *more = (split_heads(t, HEADS) for t in (q, k, v, *(prompt or ())))
    return merge_heads(piecewise_naive.piecewise_attention(q, k, v, grid, plan, tuple(more) or None))  # type: ignore[arg-type]


def softmax(q: Tensor, k: Tensor, v: Tensor, prompt: Any, mask: Tensor | None = None) -> Tensor:
    q, k, v = (
        split_heads(t, HEADS)
        for t in (q, *(torch.cat([t, *p], 1) for t, *p in zip((k, v), *_alone(prompt), strict=True)))
    )
    return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


def _alone(prompt: Any) -> list[Any]:
    return [] if prompt is None else [prompt]


def general(q: Tensor, k: Tensor, v: Tensor, grid: Any, plan: PiecewisePlan, prompt: Any, mask: Any = None) -> Tensor:
    """What does not notice that everything is exact."""
    bias = None if mask is None else module._key_bias(mask, k.shape[1] + (0 if prompt is None else prompt[0].shape[1]))
    return module._piecewise(q, k, v, HEADS, grid, plan, prompt, bias)


def apart(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-3))


@settings(max_examples=50)
@given(grids, plans(), prompts, st.integers(1, 2), seeds)
def test_values_are_the_specifications(
    grid: tuple[int, int], plan: PiecewisePlan, prompt: int, batch: int, seed: int
) -> None:
    tokens, more = sample(grid, prompt, batch, seed)
    with torch.no_grad():
        expected = naive(*tokens, grid, plan, more)
        assert apart(piecewise_attention(*tokens, HEADS, grid, plan, more), expected) < 1e-9


@settings(max_examples=25)
@given(grids, plans(), prompts, seeds)
def test_gradients_are_the_specifications(grid: tuple[int, int], plan: PiecewisePlan, prompt: int, seed: int) -> None:
    tokens, more = sample(grid, prompt, 2, seed)
    inputs = [t.requires_grad_() for t in (*tokens, *(more or ()))]
    fast = piecewise_attention(*inputs[:3], HEADS, grid, plan, tuple(inputs[3:]) or None)  # type: ignore[arg-type]
    slow = naive(*inputs[:3], grid, plan, tuple(inputs[3:]) or None)
    assert apart(fast, slow) < 1e-9
    weights = torch.randn_like(slow)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (fast, slow)), strict=True)
    for got, wanted in pairs:
        assert apart(got, wanted) < 1e-8


@settings(max_examples=40)
@given(grids, plans(), prompts, st.sampled_from([None, "bool", "float"]), seeds)
def test_choosing_everything_is_softmax(
    grid: tuple[int, int], plan: PiecewisePlan, prompt: int, kind: str | None, seed: int
) -> None:
    plan = dataclasses.replace(plan, exact=MANY, opened=MANY)
    tokens, more = sample(grid, prompt, 2, seed)
    mask = None
    if kind is not None:
        mask = torch.randn(2, 1, 1, grid[0] * grid[1] + prompt, dtype=torch.float64)
        mask[..., 0] = 1  # something is seen
        mask = mask > 0 if kind == "bool" else mask
    with torch.no_grad():
        expected = softmax(*tokens, more, mask)
        assert apart(piecewise_attention(*tokens, HEADS, grid, plan, more, mask), expected) < 1e-12
        assert apart(general(*tokens, grid, plan, more, mask), expected) < 1e-9


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CHUNK", "CHOOSING", "TOGETHER"):
        monkeypatch.setattr(module, name, 2500)


@pytest.mark.parametrize("grid", [(16, 16), (11, 18)])
@pytest.mark.parametrize("prompt", [0, 4])
@pytest.mark.parametrize("opened", [2, MANY])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_change_nothing(
    grid: tuple[int, int], prompt: int, opened: int, masked: bool, small_chunks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, more = sample(grid, prompt)
    mask = torch.rand(2, 1, 1, grid[0] * grid[1] + prompt) < 0.7 if masked else None
    plan = PiecewisePlan(2, 4, 8, 7, opened, 2)
    seen = []
    monkeypatch.setattr(module, "_attend", lambda *args, to=module._attend: (seen.append(1), to(*args))[1])
    with torch.no_grad():
        pieces = piecewise_attention(*tokens, HEADS, grid, plan, more, mask)
    assert len(seen) > 20
    with torch.enable_grad():  # all at once
        assert apart(pieces, piecewise_attention(*tokens, HEADS, grid, plan, more, mask)) < 1e-12
    assert len(seen) < 10**6


@settings(max_examples=20)
@given(grids, plans(), prompts, seeds)
def test_what_a_mask_hides_has_no_influence(grid: tuple[int, int], plan: PiecewisePlan, prompt: int, seed: int) -> None:
    tokens, more = sample(grid, prompt, 2, seed)
    hidden = torch.rand(2, grid[0] * grid[1], generator=torch.Generator().manual_seed(seed)) < 0.5
    hidden[:, 0] = False
    mask = F.pad(~hidden, (0, prompt), value=True)[:, None, None]
    q, k, v = tokens
    with torch.no_grad():
        before = piecewise_attention(q, k, v, HEADS, grid, plan, more, mask)
        k, v = (t.where(~hidden.unsqueeze(-1), 50.0) for t in (k, v))
        assert apart(piecewise_attention(q, k, v, HEADS, grid, plan, more, mask), before) < 1e-9


def test_a_mask_weighs_the_tokens_of_a_cell() -> None:
    """A token twice as likely counts as two, here as a copy of it would in softmax, where all of a cell are alike."""
    grid, plan = (8, 8), PiecewisePlan(2, 2, 4, 2, 1)
    (q, k, v), _ = sample(grid, 0, 1)
    k, v = (t.view(1, 2, 4, 2, 4, -1)[:, :, :1, :, :1].expand(1, 2, 4, 2, 4, -1).reshape(1, 64, -1) for t in (k, v))
    mask = torch.randn(1, 1, 1, 64, dtype=torch.float64)
    assert apart(piecewise_attention(q, k, v, HEADS, grid, plan, None, mask), softmax(q, k, v, None, mask)) < 1e-9


def test_other_masks_are_honoured() -> None:
    tokens, more = sample((6, 6), 4)
    plan = PiecewisePlan(2, 2, 4, 2, 1)
    for shape in ((36, 40), (2, 1, 36, 40), (2, HEADS, 1, 40)):
        mask = torch.rand(shape) < 0.7
        got = piecewise_attention(*tokens, HEADS, (6, 6), plan, more, mask)
        assert apart(got, softmax(*tokens, more, mask)) < 1e-12


def test_a_picture_with_nothing_to_see_gives_zeros() -> None:
    tokens, _ = sample((6, 6), 0)
    mask = torch.ones(2, 1, 1, 36, dtype=torch.bool)
    mask[1] = False
    plan = PiecewisePlan(2, 2, 4, 2, 1)
    inputs = [t.requires_grad_() for t in tokens]
    y = piecewise_attention(*inputs, HEADS, (6, 6), plan, None, mask)
    assert not y[1].any() and y[0].abs().sum() > 0
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(y.sum(), inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, 2])
def test_a_picture_does_not_depend_on_its_batch_nor_on_threads(dtype: torch.dtype, step: int) -> None:
    grid, plan = (32, 32), PiecewisePlan(4, 8, 16, 12, 2, step)
    tokens, more = sample(grid, 4, 3, dtype=dtype)
    tokens = [t.repeat(1, 1, 2) for t in tokens]  # of 16 channels a head
    more = [t.repeat(1, 1, 2) for t in more]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with torch.no_grad():
                results.append(piecewise_attention(*tokens, HEADS, grid, plan, more))
                ones = [
                    piecewise_attention(
                        *(t[i : i + 1] for t in tokens), HEADS, grid, plan, [t[i : i + 1] for t in more]
                    )
                    for i in range(3)
                ]
                results.append(torch.cat(ones))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert apart(other, results[0]) < (1e-4 if dtype == torch.float32 else 1e-2)
        # A swapped choice would show in whole tiles.
        assert float((other - results[0]).float().norm() / results[0].float().norm()) < 1e-4


def test_samples_stand_for_queries_that_are_alike() -> None:
    grid, more = (16, 16), None
    (q, k, v), _ = sample(grid, 0)
    q = q.view(2, 8, 2, 8, 2, -1)[:, :, :1, :, :1].expand(2, 8, 2, 8, 2, -1).reshape(2, 256, -1)
    every = piecewise_attention(q, k, v, HEADS, grid, PiecewisePlan(2, 4, 8, 6, 2), more)
    assert apart(piecewise_attention(q, k, v, HEADS, grid, PiecewisePlan(2, 4, 8, 6, 2, sample=2), more), every) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    grid, plan = (16, 16), PiecewisePlan(2, 4, 8, 16, 2)
    tokens, more = sample(grid, 4)
    exact = piecewise_attention(*tokens, HEADS, grid, plan, more)
    half = [t.to(dtype) for t in (*tokens, *more)]
    got = piecewise_attention(*half[:3], HEADS, grid, plan, (half[3], half[4]))
    assert got.dtype == dtype
    whole = softmax(*tokens, more)
    # Near ties are decided otherwise; what matters is how far both are from softmax.
    far, near = (float((y.double() - whole).norm() / whole.norm()) for y in (got, exact))
    assert far < 1.05 * near + 0.01


def test_autocast_does_not_reach_the_choice() -> None:
    grid, plan = (16, 16), PiecewisePlan(2, 4, 8, 6, 2)
    tokens, more = sample(grid, 4, dtype=torch.float32)
    plain = piecewise_attention(*tokens, HEADS, grid, plan, more)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(piecewise_attention(*tokens, HEADS, grid, plan, more), plain)


@pytest.mark.parametrize(("grad", "grid"), [(False, (12, 12)), (True, (9, 14))])
def test_compiles_into_one_graph(grad: bool, grid: tuple[int, int]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager" if grad else "eager")
    compiled = torch.compile(piecewise_attention, backend=counter, fullgraph=True)
    tokens, more = sample(grid, 4)
    plan = PiecewisePlan(2, 4, 8, 6, 2, 2)
    with torch.set_grad_enabled(grad):
        inputs = [t.requires_grad_(grad) for t in tokens]
        got, expected = (f(*inputs, HEADS, grid, plan, more) for f in (compiled, piecewise_attention))
        assert apart(got, expected) < 1e-12 and counter.frame_count == 1
        if grad:
            for pair in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, expected)), strict=True):
                assert apart(*pair) < 1e-10


def test_memory_is_bounded_by_chunks() -> None:
    """Beside the result there is never more than some heads' tokens and a chunk of what they attend to."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            output = func(*args, **(kwargs or {}))
            if isinstance(output, Tensor) and output.storage_offset() == 0:
                largest = max(largest, output.untyped_storage().nbytes())
            return output

    heads, d, side = 4, 64, 64
    q, k, v = torch.randn(1, side * side, 3 * heads * d).chunk(3, -1)
    inputs = q.untyped_storage().nbytes()
    module_chunk, whole = module.CHUNK * torch.get_num_threads(), side * side * heads * d * 4
    with torch.no_grad(), Largest():
        piecewise_attention(q, k, v, heads, (side, side), PiecewisePlan(4, 8, 16, 24, 8, 2))
    assert largest <= max(inputs, whole, module_chunk, 2 * module.TOGETHER)


@pytest.mark.parametrize(
    "numbers",
    [
        (0, 4, 8, 1, 1),
        (2, 3, 6, 1, 1),
        (2, 4, 6, 1, 1),
        (2, 4, 8, 0, 1),
        (2, 4, 8, 4, 0),
        (2, 4, 8, 3, 1),
        (2, 4, 8, 4, 1, 0),
    ],
)
def test_plans_that_make_no_sense(numbers: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="has to"):
        PiecewisePlan(*numbers)


def test_everything_alike_is_its_mean() -> None:
    """No spread anywhere: all scores tie, and any choice is right."""
    q, k, v = (torch.ones(1, 35, HEADS * 4, dtype=torch.float64) for _ in range(3))
    y = piecewise_attention(q, k, v, HEADS, (5, 7), PiecewisePlan(1, 2, 4, 5, 2))
    assert apart(y, v) < 1e-12
    assert apart(softmax_attention(q, k, v, HEADS), v) < 1e-12 and math.isfinite(float(y.sum()))

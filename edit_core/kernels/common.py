"""What the kernels share: features on load, and what a matrix product's factors are rounded to."""
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRETED", "features", "on_device_of", "precision", "rows"]


@triton.jit
def features(x, kernel: tl.constexpr):
    """A form's `rectified` on a float32 tile; not a number stays so, as it does in PyTorch."""
    positive = tl.where(x < 0, 0.0, x)
    if kernel == "squared_relu":
        result = positive * positive
    elif kernel == "elu":
        result = tl.exp(tl.where(x < 0, x, 0.0)) + positive
    else:
        tl.static_assert(kernel == "relu")
        result = positive
    return result


INTERPRETED = not isinstance(features, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this was imported: kernels then run on the CPU, for tests."""


def precision(dtype: torch.dtype, wide: bool = False) -> dict[str, Any]:
    """How a kernel multiplies matrices for inputs of a dtype, always summing in float32: its `ROUND`, `DOT` and `HOW`.

    bfloat16 and float16 are multiplied in themselves, as the eager path does; float32 as three products of
    TensorFloat-32, which together keep nearly all of it: without the matrix units kernels spill their registers.

    Args:
        dtype: of the inputs.
        wide: whether a factor can be too large for float16; the product is then taken as one of TensorFloat-32, which
            has float16's mantissa and float32's range.
    """
    if dtype == torch.float32:
        return {"ROUND": tl.float32, "DOT": tl.float32, "HOW": "tf32x3"}
    if dtype == torch.float16 and wide:
        return {"ROUND": tl.float32, "DOT": tl.float32, "HOW": "tf32"}
    half = tl.float16 if dtype == torch.float16 else tl.bfloat16
    # The interpreter's product of bfloat16 takes the numbers' bits for integers.
    return {"ROUND": half, "DOT": tl.float32 if INTERPRETED else half, "HOW": "ieee"}


def rows(tokens: Tensor) -> Tensor:
    """Tokens `(B, N, C)` whose channels lie side by side, as kernels read them; any view of a fused qkv does."""
    return tokens if tokens.stride(-1) == 1 else tokens.contiguous()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Where Triton is to launch: it takes the current device, not the tensors'."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

"""Which Triton kernels win on this machine's CUDA device: `python -m edit_core.bench.kernels` finds and remembers it.

Each is held against its specification and timed against the eager path.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from ..attention import EDiTAttention, Grid, HybridAttention, Projections, SideAttention, naive
from ..backbones import BACKBONES
from ..config import EDiTConfig
from ..kernels import PARTS, available, using
from ..kernels.choice import remember
from ..runtime import TOLERANCES, timed

__all__ = ["GRIDS", "WIDTHS", "Outcome", "measure"]

WIDTHS = {name: (backbone.real.channels, backbone.real.heads) for name, backbone in BACKBONES.items()}
"""Channels and heads of the real models."""
GRIDS: tuple[Grid, ...] = ((32, 32), (64, 64), (128, 128))
"""Pictures of 512² to 2048² pixels."""
_BATCH, _CALLS, _ROUNDS = 2, 10, 15  # both conditions of cfg; calls per timing, timings per size
_SMALL: Grid = (9, 15)  # odd sides, for formulas that are quadratic and in float64

_CONFIGS = {
    "linear": EDiTConfig(kernel="squared_relu", query="plain", key="plain", local=True),
    "conv_fusion": EDiTConfig(),
    "depthwise": EDiTConfig(),
}
"""In which attention a part is held against its specification."""


@dataclass(frozen=True)
class Outcome:
    """What became of one part."""

    chosen: bool
    """Whether it is right, and faster than the eager path at every size."""
    error: float | None = None
    """Relative, of an attention with this part's kernels against :mod:`edit_core.attention.naive`."""
    speed: dict[str, float] = field(default_factory=dict)
    """By number of tokens, how many times as fast as the eager path: the median over alternating calls."""
    message: str = ""
    """Why it is not chosen."""


def measure(
    device: torch.device, dtype: torch.dtype, backbone: str, grids: Sequence[Grid] = GRIDS
) -> dict[str, Outcome]:
    """Decides, part by part, whether kernels are used on a device from now on, and remembers it in the user's cache.

    Never raises because of a kernel: one that does not compile, or not run, is not chosen, and its outcome says why.

    Args:
        device: where; a CUDA device, or the CPU in Triton's interpreter.
        dtype: float32, float16 or bfloat16.
        backbone: the name of the one whose widths are taken.
        grids: the sizes to win at.

    Raises:
        OSError: the cache cannot be written.
    """
    channels, heads = WIDTHS[backbone]
    outcomes = {part: _outcome(part, device, dtype, channels, heads, grids) for part in PARTS}
    remember(device, dtype, channels, {part: asdict(outcome) for part, outcome in outcomes.items()})
    return outcomes


@torch.inference_mode()
def _outcome(
    part: str, device: torch.device, dtype: torch.dtype, channels: int, heads: int, grids: Sequence[Grid]
) -> Outcome:
    error, speed = None, {}
    try:
        error = max(_error(joint, part, device, dtype, channels, heads) for joint in (False, True))
        if not error <= TOLERANCES[dtype]:
            return Outcome(False, error, message=f"off its specification by {error:.2g}")
        for grid in grids:
            speed[str(grid[0] * grid[1])] = _speed(part, device, dtype, channels, heads, grid)
    except Exception as problem:  # compilers and drivers raise every kind there is
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        return Outcome(False, error, speed, f"{type(problem).__name__}: {reason}")
    slow = [tokens for tokens, times in speed.items() if times <= 1]
    return Outcome(not slow, error, speed, f"slower at {slow[0]} tokens" if slow else "")


def _attention(
    kind: type[SideAttention], part: str, device: torch.device, dtype: torch.dtype, channels: int
) -> SideAttention:
    """Random in all its parts, so that an error in any of them shows."""
    attention = kind(channels, _CONFIGS[part]).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in attention.parameters():
        bound = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.5
        parameter.uniform_(-bound, bound, generator=generator)
    attention = attention.to(device, dtype)
    return attention.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # as weights files have it


def _tokens(
    tokens: int, device: torch.device, dtype: torch.dtype, channels: int, seed: int = 0
) -> tuple[Tensor, Projections]:
    """What attention is made from, `(B, N, C)`, and its queries, keys and values, as views of one projection."""
    both = torch.randn(_BATCH, tokens, 4 * channels, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    x, qkv = both.split((channels, 3 * channels), -1)
    return x.contiguous(), Projections(*qkv.chunk(3, -1))


def _double(tokens: Projections) -> Projections:
    return Projections(*(t.double() for t in tokens))


def _error(joint: bool, part: str, device: torch.device, dtype: torch.dtype, channels: int, heads: int) -> float:
    attention = _attention(HybridAttention if joint else EDiTAttention, part, device, dtype, channels)
    x, base = _tokens(_SMALL[0] * _SMALL[1], device, dtype, channels)
    _, prompt = _tokens(20, device, dtype, channels, 1)
    state = {name: tensor.double() for name, tensor in attention.state_dict().items()}
    wide, rest = _double(base), (state, _SMALL, heads, _CONFIGS[part])
    with using([part]):
        if isinstance(attention, HybridAttention):
            actual = attention(x, base, prompt, _SMALL, heads)[0]
            expected = naive.hybrid_attention(x.double(), wide, _double(prompt), *rest)[0]
        else:
            actual = attention(x, base, _SMALL, heads)
            expected = naive.edit_attention(x.double(), wide, *rest)
    return float((actual.double() - expected).norm() / expected.norm())


def _speed(part: str, device: torch.device, dtype: torch.dtype, channels: int, heads: int, grid: Grid) -> float:
    attention = _attention(EDiTAttention, part, device, dtype, channels)
    x, base = _tokens(grid[0] * grid[1], device, dtype, channels)
    calls: dict[str, Callable[[], Tensor]] = {
        "linear": lambda: attention(x, base, grid, heads),
        "conv_fusion": lambda: attention.get_submodule("conv_fusion")(x, base.q, grid),
        "depthwise": lambda: attention.get_submodule("compress_k")(base.k, grid),
    }

    def several(parts: tuple[str, ...]) -> float:
        with using(parts):
            return timed(lambda: [calls[part]() for _ in range(_CALLS)], device)[1]

    several(()), several((part,))
    return statistics.median(several(()) / several((part,)) for _ in range(_ROUNDS))


def main() -> int:
    argparse.ArgumentParser(prog="python -m edit_core.bench.kernels", description=__doc__).parse_args()
    if not available():
        print("kernels cannot be measured here: that takes a CUDA device and Triton", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    for backbone in {widths: name for name, widths in WIDTHS.items()}.values():
        for dtype in (torch.bfloat16, torch.float16):
            for part, found in measure(device, dtype, backbone).items():
                speeds = ", ".join(f"{times:.2f}x at {tokens} tokens" for tokens, times in found.speed.items())
                verdict = "chosen" if found.chosen else f"not chosen: {found.message}"
                print(f"{backbone} {str(dtype).removeprefix('torch.')} {part}: {speeds or 'not timed'}; {verdict}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

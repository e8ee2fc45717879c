"""`python -m edit_core.kernels`: measures the kernels on this machine's CUDA device and remembers which win."""

from __future__ import annotations

import argparse
import sys

import torch

from .choice import available
from .measure import WIDTHS, measure


def main() -> int:
    argparse.ArgumentParser(prog="python -m edit_core.kernels", description=__doc__).parse_args()
    if not available():
        print("kernels cannot be measured here: that takes a CUDA device and Triton", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    for backbone in WIDTHS:
        for dtype in (torch.bfloat16, torch.float16):
            for part, found in measure(device, dtype, backbone).items():
                speeds = ", ".join(f"{times:.2f}x at {tokens} tokens" for tokens, times in found.speed.items())
                verdict = "chosen" if found.chosen else f"not chosen: {found.message}"
                print(f"{backbone} {str(dtype).removeprefix('torch.')} {part}: {speeds or 'not timed'}; {verdict}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

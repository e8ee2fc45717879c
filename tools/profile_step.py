"""Writes docs/profile.md: where the time of one step goes, and how near that is to what this machine can do.

Two blocks of each transformer stand for all of them. Every operator's own time, as PyTorch's profiler has it, is put
down to a part of the model by its name and by the shapes it was given.
"""

from __future__ import annotations

import time
from collections import defaultdict
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from edit_core.backbones import BACKBONES
from edit_core.bench.contenders import contender, install, processors
from edit_core.bench.subjects import transformer
from edit_core.config import DEFAULT
from edit_core.runtime import device_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "profile.md"
BLOCKS, SIDES, CONTENDERS = 2, (1024, 2048), ("teacher", "paper", DEFAULT)
PARTS = ("projections and MLP", "softmax attention", "ConvFusion", "compressors, local branch", "K·V", "Q·KV",
         "norms, elementwise", "other")  # fmt: skip
CPU = torch.device("cpu")
_GROUPS = {
    "group_norm": "ConvFusion", "leaky_relu": "ConvFusion",
    **dict.fromkeys(("norm", "add", "mul", "gelu", "silu", "clamp", "relu", "pow", "sub", "div", "lerp", "copy_",
                     "mean", "rsqrt", "cat", "square", "reciprocal", "sum"), "norms, elementwise"),
}  # fmt: skip
"""By a part of an operator's name, the first that fits."""


class Cost(NamedTuple):
    """Of one operator's call: its part of the model, floating-point operations, bytes read and written at least."""

    part: str
    flops: float
    moved: float


def cost_of(name: str, shapes: list[list[int]], hidden: int) -> Cost:
    """The cost of an operator's call in float32.

    Args:
        name: as the profiler has it, such as `aten::addmm`.
        shapes: of its inputs; empty for what is no tensor.
        hidden: channels of ConvFusion's bottleneck.
    """
    sizes = [prod(shape) for shape in shapes if shape]
    if name in ("aten::addmm", "aten::mm"):
        left, right = [shape for shape in shapes if len(shape) == 2][-2:]
        part = "ConvFusion" if hidden in right else "projections and MLP"
        return Cost(part, 2 * prod(left) * right[1], 4 * (prod(left) + prod(right) + left[0] * right[1]))
    if name == "aten::bmm":
        left, right = shapes[:2]
        part = "K·V" if left[2] > right[2] else "Q·KV"  # tokens are summed over, or are rows
        return Cost(part, 2 * prod(left) * right[2], 4 * (prod(left) + prod(right) + prod(left[:2]) * right[2]))
    if name == "aten::mkldnn_convolution":
        image, weight = shapes[:2]
        if weight[2] == 2:
            return Cost("other", 2 * prod(image) * weight[0], 4 * sum(sizes))  # patches, without overlap
        if weight[1] > 1:
            tokens = image[0] * image[2] * image[3]
            return Cost("ConvFusion", 2 * tokens * prod(weight), 4 * (prod(image) + prod(weight) + tokens * weight[0]))
        part = "ConvFusion" if weight[0] == hidden else "compressors, local branch"
        return Cost(part, 18 * prod(image), 8 * prod(image))  # at stride 1; at 2 a quarter
    if "_scaled_dot_product" in name:  # the kernel; what chooses it has the same name without the first underscore
        q, k = shapes[:2]
        return Cost("softmax attention", 4 * prod(q) * k[2], 8 * (prod(q) + prod(k)))
    if "scaled_dot_product" in name:
        return Cost("softmax attention", 0, 0)
    part = next((part for word, part in _GROUPS.items() if word in name), "other")
    return Cost(part, 0, 4 * (sum(sizes) + max(sizes, default=0)) if part != "other" else 0)


def measured(call: Any, hidden: int) -> dict[str, list[float]]:
    """Of each part: seconds, operations and bytes of one call."""
    call()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        call()
    found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for event in profiler.key_averages(group_by_input_shape=True):
        cost = cost_of(event.key, event.input_shapes, hidden)
        working = event.self_cpu_time_total > 0
        for i, value in enumerate((event.self_cpu_time_total / 1e6, cost.flops, cost.moved)):
            found[cost.part][i] += value if i == 0 else value * event.count * working
    return found


def machine() -> tuple[float, float]:
    """This machine's own operations per second, in a product of large matrices, and bytes per second, in a copy."""
    a, b = torch.randn(4096, 2048), torch.randn(2048, 2048)
    source, target = torch.empty(2, 1 << 26)

    def fastest(call: Any) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    flops = 2 * a.numel() * b.shape[1] / fastest(lambda: a @ b)
    return flops, 8 * source.numel() / fastest(lambda: target.copy_(source))


def tables(flops: float, bandwidth: float) -> list[str]:
    lines = []
    for kind in BACKBONES.values():
        for side in SIDES:
            subject = transformer(kind, side, 1, torch.float32, CPU, BLOCKS)
            depth = kind.real.blocks
            hidden = subject.attentions[0].inner_dim // 4
            own = {name: processors(subject, contender(name, CPU, torch.float32, subject.heads, subject.head_dim))
                   for name in CONTENDERS}  # fmt: skip
            lines += ["", f"## {kind.title}, {(side // 16) ** 2} tokens", ""]
            lines += ["| part | attention | s per step | share | GFLOPs | GB | of the roofline |"]
            lines += ["|---|---|---|---|---|---|---|"]
            for name in CONTENDERS:
                install(subject.attentions, own[name])
                found = measured(subject.call, hidden)
                whole = sum(seconds for seconds, _, _ in found.values())
                for part in (part for part in PARTS if part in found):
                    seconds, work, moved = (value * depth / BLOCKS for value in found[part])
                    least = max(work / flops, moved / bandwidth)
                    roof = f"{least / seconds:.0%}" if least else "–"
                    share = f"{found[part][0] / whole:.1%}"
                    cells = (part, name, f"{seconds:.3g}", share, f"{work / 1e9:.0f}", f"{moved / 1e9:.1f}", roof)
                    lines.append(f"| {' | '.join(cells)} |")
                lines.append(f"| **all** | {name} | {whole * depth / BLOCKS:.3g} | 100% | | | |")
    return lines


@torch.inference_mode()
def main() -> None:
    flops, bandwidth = machine()
    lines = [
        "# Where the time of a step goes",
        "",
        "Written by `make profile`. One call of each transformer at its real width with random weights, batch 1, "
        f"float32: {BLOCKS} blocks were run, and all figures multiplied to the real model's depth (the few operators "
        "before and behind the blocks with them). Times are the operators' own, by PyTorch's profiler. The forms are "
        "measured one after the other, and each once, so that layers which are the same in all of them still differ "
        "between their rows; how many times as fast one is as another is on [the page about speed](speed.md), where "
        "they take turns. Of SD3.5's 24 blocks 13 have the second attention, of the 2 here one.",
        "",
        f"{device_name(CPU)}; PyTorch {torch.__version__}. The roofline is this machine's own: "
        f"{flops / 1e9:.0f} GFLOP/s "
        f"in a product of large matrices, {bandwidth / 1e9:.1f} GB/s in a copy, both measured just before. A part's "
        "fraction of it is the time that its operations, or the bytes of its operators' inputs and outputs, would take "
        "at that speed, whichever is longer, over the time that it took; what stays in the cache can be above 100%. "
        "*ConvFusion* holds its convolutions, its linears and its GroupNorm; *K·V* and *Q·KV* are the two products of "
        "linear attention; *softmax attention* is all there is, cross-attention and prompt rows included.",
        *tables(flops, bandwidth),
    ]
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

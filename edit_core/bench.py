"""How fast a transformer is with EDiT, against itself without: one process, calls interleaved, medians."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .apply import apply_edit
from .backbones import BACKBONES
from .config import EDiTConfig
from .models import random_inputs, random_transformer
from .runtime import timed
from .weights import EDiTWeights

__all__ = ["Measurement", "device_name", "measure", "table"]


@dataclass(frozen=True)
class Measurement:
    """Seconds per call of the whole transformer, teacher and EDiT in alternation."""

    backbone: str
    side: int
    """Pixels per side of the square picture."""
    tokens: int
    batch: int
    blocks: int
    dtype: str
    device: str
    backend: str
    """What the teacher's softmax attention runs on."""
    torch: str
    teacher: list[float]
    edit: list[float]

    @property
    def ratio(self) -> float:
        """Median of the ratios of neighbouring calls; over 1 EDiT is the faster."""
        return statistics.median(t / e for t, e in zip(self.teacher, self.edit, strict=True))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ratio": self.ratio}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measurement:
        return cls(**{name: value for name, value in data.items() if name != "ratio"})


def device_name(device: torch.device) -> str:
    """The processor's name, and for a CPU the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        models = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    flags = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {torch.get_num_threads()} threads, {flags}"


@torch.inference_mode()
def measure(
    backbone: str,
    side: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    blocks: int | None = None,
    config: EDiTConfig | None = None,
    layers: str = "all",
) -> Iterator[Measurement]:
    """Times a transformer of real dimensions, with random weights; yields what it has after every pair of calls."""
    transformer = random_transformer(backbone, blocks, dtype, side).to(device)
    config = config or EDiTConfig()
    # Without side weights the smallest differences stand for a student's.
    weights = EDiTWeights.init(transformer, config, trainable="side" if config.side_weights else "low_rank", rank=1)
    inputs = random_inputs(transformer, backbone, side, batch)
    call = partial(transformer, **inputs)
    teacher: list[float] = []
    edit: list[float] = []
    for i in range(repeats + 1):  # the first pair warms up
        _, seconds = timed(call, device)
        with apply_edit(transformer, weights, layers=layers):
            if i == 0:
                call()
                continue
            edit.append(timed(call, device)[1])
        teacher.append(seconds)
        yield Measurement(
            backbone=backbone,
            side=side,
            tokens=(side // 16) ** 2,
            batch=batch,
            blocks=len(transformer.transformer_blocks),
            dtype=str(dtype).removeprefix("torch."),
            device=device_name(device),
            backend=f"torch scaled_dot_product_attention on {device.type}",
            torch=torch.__version__,
            teacher=teacher,
            edit=edit,
        )


def table(measurements: list[Measurement]) -> str:
    """A Markdown table, under a line for each device, dtype and backend in it."""
    lines = sorted({f"{m.device}; {m.dtype}; PyTorch {m.torch}; teacher on {m.backend}." for m in measurements})
    rows = [
        "| model | picture | tokens | batch | teacher, s per step | EDiT, s per step | speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for m in measurements:
        title = f"{BACKBONES[m.backbone].title}, {m.blocks} blocks"
        times = " | ".join(f"{statistics.median(t):.2f} ({min(t):.2f}–{max(t):.2f})" for t in (m.teacher, m.edit))
        rows.append(f"| {title} | {m.side}² | {m.tokens} | {m.batch} | {times} | {m.ratio:.2f}× |")
    return "\n".join([*lines, "", *rows])

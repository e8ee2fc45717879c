"""Times contenders in alternation, and measures the memory that their calls take."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from ..backbones import Backbone
from ..errors import EDiTError
from ..runtime import device_name, timed
from .contenders import Contender, contender, install, processors
from .report import Measurement
from .subjects import Subject, layer, transformer

__all__ = ["measure", "peak_memory"]


@torch.inference_mode()
def measure(
    level: str,
    backbone: Backbone,
    side: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
    names: Sequence[str],
    blocks: int | None = None,
    layers: str = "all",
    optional: bool = False,
) -> Iterator[Measurement]:
    """Times contenders on a subject of real dimensions; yields what it has after every round of calls.

    A first round warms up, a second one measures memory, and neither is timed.

    Args:
        level: `layer` or `transformer`.
        backbone: whose dimensions.
        side: pixels per side of the square picture.
        batch: pictures per call.
        dtype: of weights and computation.
        device: where.
        repeats: timed rounds.
        names: of the contenders, see :func:`~edit_core.bench.contenders.contender`.
        blocks: a transformer's, if fewer than the real one's.
        layers: of a transformer, the blocks that contenders replace.
        optional: whether contenders that cannot run here are left out, and named in the measurement.

    Raises:
        EDiTModelError: a size that cannot be drawn, or a bad number of blocks.
        EDiTError: a contender that does not exist, or is not optional and cannot run; a bad `layers` text.
    """
    grid = backbone.check_size(side, side)
    if level == "layer":
        subject = layer(backbone, grid, batch, dtype, device)
    else:
        subject = transformer(backbone, side, batch, dtype, device, blocks, layers)
    found, missing = _contenders(names, subject, dtype, device, optional)
    ready = {one.name: processors(subject, one) for one in found}
    backend, versions = _backend(subject, dtype, device), _versions(found, device)
    seconds: dict[str, list[float]] = {name: [] for name in ready}
    peak = {}
    for own in ready.values():
        install(subject.attentions, own)
        subject.call()
    for name, own in ready.items():
        install(subject.attentions, own)
        peak[name] = peak_memory(subject.call, device)
    for _ in range(repeats):
        for name, own in ready.items():
            install(subject.attentions, own)
            seconds[name].append(timed(subject.call, device)[1])
        yield Measurement(
            level=level,
            backbone=backbone.name,
            side=side,
            tokens=grid[0] * grid[1],
            batch=batch,
            blocks=1 if level == "layer" else len(subject.transformer.transformer_blocks),
            dtype=str(dtype).removeprefix("torch."),
            device=device_name(device),
            backend=backend,
            versions=versions,
            seconds=seconds,
            peak=peak,
            missing=missing,
        )


def _contenders(
    names: Sequence[str], subject: Subject, dtype: torch.dtype, device: torch.device, optional: bool
) -> tuple[list[Contender], dict[str, str]]:
    found, missing = [], {}
    for name in dict.fromkeys(names):
        try:
            found.append(contender(name, device, dtype, subject.heads, subject.head_dim))
        except EDiTError as error:
            if not optional:
                raise
            missing[name] = str(error)
    return found, missing


def peak_memory(call: Callable[[], Any], device: torch.device) -> int:
    """Bytes that a call holds at most beyond what was there before it: activations, workspaces and its output.

    On CUDA from the allocator's own statistics. On the CPU the profiler reports every allocation and release of
    PyTorch's allocator, kernels' scratch memory included; what a library takes from the system by itself is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        output = call()
        torch.cuda.synchronize(device)
        del output
        return torch.cuda.max_memory_allocated(device) - before
    with _profile(profile_memory=True) as profiler:
        output = call()
    del output
    assert profiler.profiler is not None  # noqa: S101 - it has run
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _profile(**options: Any) -> profile:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write lines of its own to stderr
    return profile(activities=[ProfilerActivity.CPU], **options)


def _backend(subject: Subject, dtype: torch.dtype, device: torch.device) -> str:
    """What PyTorch's fused attention runs on, as it names its operators."""
    q = torch.zeros(1, subject.heads, 128, subject.head_dim, dtype=dtype, device=device)
    with _profile() as profiler:
        F.scaled_dot_product_attention(q, q, q)
    prefix = "aten::_scaled_dot_product_"
    kernel = next(e.key.removeprefix(prefix) for e in profiler.key_averages() if e.key.startswith(prefix))
    return f"torch scaled_dot_product_attention ({kernel}) on {device.type}"


def _versions(found: Sequence[Contender], device: torch.device) -> dict[str, str]:
    import diffusers

    versions = {"PyTorch": torch.__version__, "diffusers": diffusers.__version__}
    if device.type == "cuda":
        versions["CUDA"] = str(torch.version.cuda)
    return versions | {name: version for one in found for name, version in one.versions}

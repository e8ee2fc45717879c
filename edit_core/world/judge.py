"""What a teacher or a student is worth in the small world: what its pictures get right, how they look, what they cost.

All that is random follows from fixed seeds, so two judgements of the same weights agree.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..apply import EDiTHandle
from ..distill.distance import teacher_distance
from ..distill.losses import dense_tap
from ..distill.objective import call_arguments
from ..distill.picture_metrics import fid
from ..runtime import timed
from .classifier import Classifier
from .codec import decode, encode
from .data import WorldEncoder
from .draw import draw
from .reader import accuracy, read
from .scenes import Scene

__all__ = ["HELD_OUT", "call", "cost", "distance", "pictures", "real", "scenes", "worth"]

HELD_OUT = 1 << 40
"""Seed of the first scene that nothing is trained on."""


def scenes(count: int) -> list[Scene]:
    """The first held-out scenes."""
    return [Scene.random(HELD_OUT + i) for i in range(count)]


def pictures(
    backbone: str,
    transformer: Any,
    asked: Sequence[Scene],
    size: int,
    steps: int = 16,
    first: int = 0,
    count: int | None = None,
) -> Tensor:
    """What a model draws of scenes' captions: `(B, size, size, 3)` uint8.

    Args:
        backbone: `pixart_sigma` or `sd35_medium`.
        transformer: as it is at the moment.
        asked: scenes; the noise's seed is the place in this list.
        size: pixels per side.
        steps: of the sampler.
        first: of the scenes that are drawn.
        count: how many are, at most; all by default.
    """
    chosen = range(len(asked))[first:][:count]
    return draw(backbone, transformer, [asked[i].caption for i in chosen], list(chosen), size, size, steps)


def real(backbone: str, shown: Sequence[Scene], size: int) -> Tensor:
    """The scenes themselves through the codec, `(B, size, size, 3)` uint8: the best that a model could draw."""
    drawn = torch.from_numpy(np.stack([scene.draw(size, size) for scene in shown])).permute(0, 3, 1, 2)
    return decode(backbone, encode(backbone, drawn)).permute(0, 2, 3, 1)


def worth(drawn: Tensor, asked: Sequence[Scene], backbone: str, classifier: Classifier) -> dict[str, float]:
    """Shares of the captions' attributes that are right, by kind, and `frechet`.

    Args:
        drawn: `(B, size, size, 3)` uint8.
        asked: B scenes.
        backbone: whose codec the real pictures go through.
        classifier: whose features are compared with those of as many other real scenes.
    """
    found = accuracy([read(picture.numpy(), scene) for picture, scene in zip(drawn, asked, strict=True)])
    others = [Scene.random(HELD_OUT + (1 << 20) + i) for i in range(len(asked))]
    reference = classifier.images(real(backbone, others, drawn.shape[1]))
    return {**found, "frechet": fid(classifier.images(drawn), reference)}


def distance(backbone: str, transformer: Any, handle: EDiTHandle, size: int, count: int = 64) -> dict[str, float]:
    """A student's error relative to its teacher on noised held-out scenes: `prediction`, and the mean `attention`."""
    shown = scenes(count)
    batches = [_batch(backbone, shown[start : start + 16], size) for start in range(0, count, 16)]
    found = teacher_distance(transformer, handle, backbone, batches)
    return {"prediction": found.prediction, "attention": found.mean_attention}


def _batch(backbone: str, shown: Sequence[Scene], size: int) -> dict[str, Tensor]:
    """Latents and conditions of scenes, as a cache's samples are batched."""
    drawn = torch.from_numpy(np.stack([scene.draw(size, size) for scene in shown])).permute(0, 3, 1, 2)
    condition = WorldEncoder(backbone).encode_prompts([scene.caption for scene in shown])
    return {"latent": encode(backbone, drawn), **condition}


def call(backbone: str, transformer: Any, size: int) -> Callable[[], Tensor]:
    """One call of a transformer halfway to noise, on a scene of this size, for timing and comparing."""
    batch = _batch(backbone, scenes(1), size)
    latent = batch.pop("latent").to(transformer.device, transformer.dtype)
    arguments = call_arguments(backbone, latent, torch.tensor([500], device=latent.device), batch, latent.device)

    @torch.no_grad()
    def once() -> Tensor:
        return transformer(**arguments)[0]

    return once


def cost(backbone: str, transformer: Any, handle: EDiTHandle, size: int, repeats: int = 9) -> dict[str, float]:
    """FLOPs of one call, and the median seconds of calls of teacher and student in alternation."""
    once = call(backbone, transformer, size)
    seconds: dict[str, list[float]] = {"teacher": [], "student": []}
    flops = {}
    for who, tap in (("teacher", dense_tap), ("student", None)):
        handle.tap = tap
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it counts no fused CPU kernels
            once()
        flops[who] = counter.get_total_flops()
    for _ in range(repeats):
        for who, tap in (("teacher", dense_tap), ("student", None)):
            handle.tap = tap
            seconds[who].append(timed(once, transformer.device)[1])
    handle.tap = None
    medians = {who: statistics.median(values) for who, values in seconds.items()}
    return {
        "flops": flops["student"], "teacher_flops": flops["teacher"],
        "seconds": medians["student"], "teacher_seconds": medians["teacher"],
    }  # fmt: skip
